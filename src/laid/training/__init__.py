"""The recipe: samples, the teacher (cached or online), the step, checkpoints, export."""
