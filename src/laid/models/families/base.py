"""What the code asks of a model family. The defaults are Qwen2.5-VL's; a family's file changes what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Family:
    """One architecture of transformers (docs/guides/families.md).

    model_type: as in config.json; the decoder's own config has it with "_text".
    sections: frequencies turned by (time, height, width) where a config does not say.
    query_norm: queries and keys pass `q_norm` and `k_norm`, of one weight for all heads, after q_proj and k_proj.
    no_mask: what the decoder takes for "causal, nothing padded" where attention has a causal form of its own.
    """

    model_type: str
    sections: tuple[int, ...] = (16, 24, 24)
    query_norm: bool = False
    no_mask: Mapping[str, None] | None = {"full_attention": None, "sliding_attention": None}

    def mask(self, added: Tensor) -> Any:
        """The decoder's attention_mask for one of our own, (B, 1, T, T), which every layer adds to its scores."""
        return {"full_attention": added, "sliding_attention": added}

    def axis_of_frequency(self, sections: Sequence[int]) -> Tensor:
        """(head_dim / 2,) of 0 time, 1 height, 2 width: the M-RoPE axis that turns each frequency."""
        return torch.cat([torch.full((n,), i % 3, dtype=torch.long) for i, n in enumerate(sections)])

    def image_features(self, model: nn.Module, pixels: Tensor, grid: Tensor) -> Sequence[Tensor]:
        """Per image (tokens, k * hidden): what goes where its visual tokens stand, k kinds of it side by side.

        pixels: (patches, values); grid: (images, 3) patches along time, height, width. The first kind goes into the
        embeddings, the others where `deep_inputs` says.
        """
        return model.model.get_image_features(pixels, grid).pooler_output

    def deep_inputs(self, deep: Sequence[Tensor], mask: Tensor) -> dict[str, Any]:
        """The decoder's arguments for features beyond the first kind.

        deep: (N, hidden) each, of the N places where mask (B, T) is true.
        """
        raise NotImplementedError(f"{self.model_type} has one kind of visual features")

    def queries(self, attention: nn.Module) -> nn.Module:
        """The module that makes the queries before rotation: (B, T, heads * head_dim) or (B, T, heads, head_dim)."""
        return attention.q_norm if self.query_norm else attention.q_proj

    def keys(self, attention: nn.Module) -> nn.Module:
        """The module that makes the keys before rotation: (B, T, kv_heads * head_dim) or (B, T, kv_heads, head_dim)."""
        return attention.k_norm if self.query_norm else attention.k_proj
