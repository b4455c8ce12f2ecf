"""Qwen2.5-VL: the family the code was written for; every default of `Family` is its own."""

from laid.models.families.base import Family


class Qwen25VL(Family):
    model_type = "qwen2_5_vl"
