"""Chosen rows of attention: where some tokens look. (rows x tokens) per head and never (tokens x tokens)."""

from __future__ import annotations

import torch

from laid.errors import LaidError


def attention_rows(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of chosen attention rows: (batch, heads, rows, tokens), float32; -inf where not allowed.

    q: (batch, heads, tokens, head_dim) and k: (batch, kv_heads, tokens, head_dim), both rotated; keys are not repeated in
    memory. rows: (batch, rows) token indices of the queries. key_mask: (batch, tokens), true for real tokens. Causal by
    token index. Raises LaidError when a row may see no key at all.
    """
    (batch, heads, _, dim), kv_heads, count = q.shape, k.shape[1], rows.shape[1]
    chosen = q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim)).float() * dim**-0.5
    scores = chosen.reshape(batch, kv_heads, -1, dim) @ k.float().transpose(-1, -2)
    scores = scores.view(batch, heads, count, -1)
    allowed = torch.arange(k.shape[2], device=k.device) <= rows[..., None]
    if key_mask is not None:
        allowed = allowed & key_mask.bool()[:, None]
    if not bool(allowed.any(-1).all()):
        raise LaidError(
            "attention rows: a chosen row sees no real token before it; choose rows of real tokens"
        )
    return scores.masked_fill(~allowed[:, None], float("-inf")).log_softmax(-1)
