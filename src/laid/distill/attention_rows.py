"""Chosen rows of attention: where the tokens of the question and of the answer look.

(rows x tokens) per head and never (tokens x tokens). `laid.distill.joint_rows` matches such rows.
"""

from __future__ import annotations

import torch

from laid.errors import LaidError


def rows_of(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) at token indices (batch, rows) -> (batch, heads, rows, head_dim)."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def scaled_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k^T / sqrt(head_dim), each key head for its group of query heads: (batch, heads, rows, keys), float32 or wider.

    q: (batch, heads, rows, head_dim), k: (batch or 1, kv_heads, keys, head_dim). Keys are not repeated in memory.
    Raises LaidError when heads is no multiple of kv_heads.
    """
    (batch, heads, rows, dim), kv_heads = q.shape, k.shape[1]
    if heads % kv_heads:
        raise LaidError(f"{heads} query heads cannot share {kv_heads} key heads: not a multiple")
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = (q.to(wide) * dim**-0.5).reshape(batch, kv_heads, -1, dim)
    return (grouped @ k.to(wide).transpose(-1, -2)).view(batch, heads, rows, -1)


def attention_rows(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of chosen attention rows: (batch, heads, rows, tokens), float32; -inf where not allowed.

    q: (batch, heads, tokens, head_dim) and k: (batch, kv_heads, tokens, head_dim), both rotated. rows: (batch, rows)
    token indices of the queries. key_mask: (batch, tokens), true for real tokens. Causal by token index.
    Raises LaidError when a row may see no key at all.
    """
    scores = scaled_scores(rows_of(q, rows), k)
    allowed = torch.arange(k.shape[2], device=k.device) <= rows[..., None]
    if key_mask is not None:
        allowed = allowed & key_mask.bool()[:, None]
    if not bool(allowed.any(-1).all()):
        raise LaidError(
            "attention rows: a chosen row sees no real token before it; choose rows of real tokens"
        )
    return scores.masked_fill(~allowed[:, None], float("-inf")).log_softmax(-1)


def question_rows(image_mask: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the question, from the first after the last image to the one that predicts the answer.

    image_mask: (batch, tokens), true for visual tokens. answer: (batch,) token index. Returns (batch, rows) token
    indices and which of them count: shorter questions are filled up with their answer's token.
    """
    at = torch.arange(image_mask.shape[1], device=image_mask.device)
    # behind the last visual token stands <|vision_end|>
    first = torch.where(image_mask.any(-1), (image_mask * at).amax(-1) + 2, 0)
    rows = first[:, None] + torch.arange(int((answer - first).max()) + 1, device=image_mask.device)
    return torch.minimum(rows, answer[:, None]), rows <= answer[:, None]
