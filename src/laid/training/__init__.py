"""The recipe: samples, the teacher (cached or online), the step, the processes, checkpoints, export."""
