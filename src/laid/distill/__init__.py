"""What LAid is, as functions of tensors: alignment (eq. 7), gaps, dilution, gain, KL, schedules, objective (eq. 8).

Opens no file and reads no configuration.
"""
