"""Qwen2-VL: another vision tower; decoder, positions and prompt are Qwen2.5-VL's."""

from laid.models.families.base import Family


class Qwen2VL(Family):
    model_type = "qwen2_vl"
