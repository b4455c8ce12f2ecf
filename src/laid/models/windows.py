"""The vision tower's attention, all windows of one length at once.

transformers' "sdpa" calls the kernel for one window or image after the other, some 1,400 times a layer for 64 photographs, and
asks the GPU for their lengths each time. Here windows of one length are a batch: photographs have few lengths.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from laid.models.decoder import vision_tower

# A name with "flash" in it is handed all windows and where they begin.
AT_ONCE = "laid_windows_as_flash"


def windows_at_once(model: nn.Module) -> None:
    """Let the vision tower inside `model` attend within all windows of one length at once, where it runs on sdpa."""
    config = vision_tower(model).config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = AT_ONCE


def attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_kwargs):
    """transformers' AttentionInterface. query, key, value: (1, heads, tokens, head_dim); cu_seq_lens_q: where windows begin, and the end."""
    groups, back = _groups(cu_seq_lens_q)
    found = []
    for at in groups:  # (windows, length)
        q, k, v = (x[0][:, at].transpose(0, 1) for x in (query, key, value))
        said = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        found.append(said.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)[back][None], None


def _groups(bounds: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of each length (windows, length) places of their tokens; and where each token is found in all of these one after the other.

    Kept on the tensor, which all layers of a pass share: they wait for the device once.
    """
    if not hasattr(bounds, "laid_groups"):
        where: dict[int, list[int]] = {}
        edges = bounds.tolist()
        for start, stop in itertools.pairwise(edges):
            where.setdefault(stop - start, []).append(start)
        groups = [
            (torch.tensor(starts)[:, None] + torch.arange(length)).to(bounds.device)
            for length, starts in where.items()
            if length
        ]
        bounds.laid_groups = groups, torch.cat([at.flatten() for at in groups]).argsort()
    return bounds.laid_groups


AttentionInterface.register(AT_ONCE, attention)
