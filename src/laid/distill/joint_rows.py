"""Attention rows over the images of a whole batch: the student's heads against what the teacher's say together.

A short haystack hardly tells heads apart: few images compete, and all are near. Here the question tokens of every sample
look at the visual tokens of all samples of the batch, each where it stands from its own question: a longer haystack, made
of keys that are there anyway. The student sees its gapped positions, the teacher its own, without gaps, so that the target
does not know of distance. Positions are counted from the question, since RoPE knows differences only.

The teacher's heads share the work of finding the needle, and none alone is as sharp as all of them. The target is their
product, each head to the power of what it tells (one minus its entropy's share of log N; a head that looks evenly drops
out), normalised over the N visual tokens:

    P*_r  ~  prod_j (P^t_jr) ** told_jr            L = sum_r m_r sum_i share_ir D(P*_r || P^s_ir) / sum_r m_r

m_r: the teacher's mean mass on the sample's own images times what P*_r tells: rows that find something count. share_ir: the
student's heads divide a row among them by squared overlap (sum_n sqrt(P*_n P^s_n)) ** 2, so that the head that finds the needle
learns to find it far away, and the others are left to their work. D weighs keys by distance, as `RowMatching` does.
This is our reading of the "distance-weighted attention matching" that the paper's abstract names without a formula.
"""

from __future__ import annotations

import math

import torch

from laid.methods.decoder import repeat_kv


def pooled_rows(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Attention of chosen rows over the visual tokens of the whole batch: (batch, heads, rows, N) log-probabilities.

    q: (batch, heads, tokens, head_dim), k: (batch, kv_heads, tokens, head_dim), rotated by positions that are counted
    from each sample's question. rows: (batch, rows) token indices. visual: (batch, tokens), true at N tokens in all.
    """
    heads, dim = q.shape[1], q.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    chosen = q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim)).to(wide)
    keys = repeat_kv(k, heads).transpose(1, 2)[visual].to(wide)  # (N, heads, head_dim)
    return (torch.einsum("bhrd,nhd->bhrn", chosen, keys) * dim**-0.5).log_softmax(-1)


def told(log_p: torch.Tensor) -> torch.Tensor:
    """1 - entropy / log N of distributions over the last axis, N long: 0 looks evenly, 1 at one token only."""
    share = (log_p.exp() * log_p).sum(-1) / math.log(max(2, log_p.shape[-1]))
    return (1 + share).clamp_min(0)  # rounding takes an even row below


def joint_target(teacher: torch.Tensor) -> torch.Tensor:
    """(batch, heads, rows, N) log-probabilities of a layer's heads -> (batch, rows, N), of their weighted product."""
    return (teacher * told(teacher)[..., None]).sum(1).log_softmax(-1)


def joint_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mass: torch.Tensor,
    row_mask: torch.Tensor,
    key_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss above, a scalar in nats.

    student: (batch, student_heads, rows, N), teacher: (batch, teacher_heads, rows, N), log-probabilities of `pooled_rows`.
    mass: (batch, rows), the teacher's share of attention on the sample's own images. row_mask: (batch, rows), true
    where a row counts. key_weights: (N,), not negative, mean 1.
    """
    with torch.no_grad():
        target = joint_target(teacher)
        counts = mass * told(target) * row_mask
        target = target[:, None]
        overlap = ((student + target) / 2).exp().sum(-1).square()
        share = overlap / overlap.sum(1, keepdim=True).clamp_min(torch.finfo(overlap.dtype).tiny)
    p = target.exp()
    terms = p * (target - student) - p + student.exp()
    if key_weights is not None:
        terms = terms * key_weights.to(terms.dtype)
    total = (terms.sum(-1) * share * counts[:, None]).sum()
    return total / counts.sum().clamp_min(torch.finfo(total.dtype).tiny)
