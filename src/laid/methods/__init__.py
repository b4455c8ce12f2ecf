"""What changes a student without training: YaRN and SelfExtend, and loading a student under any method."""
