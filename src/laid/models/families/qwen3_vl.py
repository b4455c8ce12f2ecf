"""Qwen3-VL: normalised queries and keys, interleaved M-RoPE, visual features of several depths (DeepStack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laid.models.families.base import Family


class Qwen3VL(Family):
    model_type = "qwen3_vl"
    sections = (24, 20, 20)
    query_norm = True
    no_mask = None  # its decoder makes the mask itself, and takes none for "causal"

    def mask(self, added: Tensor) -> Tensor:
        return added

    def axis_of_frequency(self, sections: Sequence[int]) -> Tensor:
        """Time, height and width in turn, and time where their share is used up (transformers,
        Qwen3VLTextRotaryEmbedding.recomposition_frequencies)."""
        axis = torch.zeros(sum(sections), dtype=torch.long)
        for which in (1, 2):
            axis[which : 3 * sections[which] : 3] = which
        return axis

    def image_features(self, model: nn.Module, pixels: Tensor, grid: Tensor) -> list[Tensor]:
        found = model.model.get_image_features(pixels, grid)
        kinds = (found.pooler_output, *found.deepstack_features)
        return [torch.cat(of_image, dim=-1) for of_image in zip(*kinds, strict=True)]

    def deep_inputs(self, deep: Sequence[Tensor], mask: Tensor) -> dict[str, Any]:
        """Added to the hidden states after the first layers, one kind a layer."""
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": list(deep)}
