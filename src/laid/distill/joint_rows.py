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
learns to find it far away, and the others are left to their work. D weighs keys by distance:

    D(P* || P^s) = sum_n weight_n ( P*_n log(P*_n / P^s_n) - P*_n + P^s_n )

Each term is at least 0 and 0 only at equality, so weights cannot turn it negative; with all weights 1 it is KL(P* || P^s).
This is our reading of the "distance-weighted attention matching" that the paper's abstract names without a formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from laid.distill.attention_rows import question_rows, rows_of, scaled_scores
from laid.models.decoder import rotate


def joint_rows(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    plain: torch.Tensor,
    visual: torch.Tensor,
    mask: torch.Tensor,
    answer: torch.Tensor,
    turn: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    key_weights: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The loss above for a batch, a scalar in nats; 0 where no token is visual.

    student, teacher: queries (batch, heads, tokens, head_dim) and keys (batch, kv_heads, tokens, head_dim), before
    rotation. positions: (3, batch, tokens) of the student's pass, plain: without gaps. visual, mask: (batch, tokens), visual
    tokens and real ones. answer: (batch,), the token that predicts the answer. turn: the rotary embedding,
    (tensor of its format, positions (3, batch, n)) -> cos, sin (batch, n, head_dim). key_weights: (1, N) distances to the question
    -> (1, N), not negative, mean 1.

    Of the student, nothing is turned but the question's queries and the visual keys, once each.
    """
    if not bool(visual.any()):
        return 0.0 * student[0].float().sum()
    rows, counted = question_rows(visual, answer)
    first = rows[:, :1].expand(3, -1, -1)
    away = positions - positions.gather(2, first)
    own = PooledRows(*student, away, rows, visual, turn).scores.log_softmax(-1)
    with torch.no_grad():
        theirs = PooledRows(*teacher, plain - plain.gather(2, first), rows, visual, turn)
        mass = theirs.visual_mass(mask)
    weights = key_weights(-away.amin(0)[visual][None])[0] if key_weights else None
    return joint_divergence(own, theirs.scores.log_softmax(-1), mass.mean(1), counted, weights)


class PooledRows:
    """Chosen queries and the visual keys of the whole batch, rotated, and their scaled scores.

    q, k: before rotation, as `joint_rows` takes them. positions: (3, batch, tokens), counted from each sample's question.
    rows: (batch, rows) token indices. visual: (batch, tokens), true at N tokens in all. scores: (batch, heads, rows, N),
    float32 or wider.
    """

    def __init__(self, q, k, positions, rows, visual, turn) -> None:
        self._k, self._positions, self._rows, self._visual, self._turn = k, positions, rows, visual, turn
        self._queries = rotate(rows_of(q, rows), *self._angles(q, rows))
        keys = k.transpose(1, 2)[visual].transpose(0, 1)[None]
        self.scores = scaled_scores(self._queries, rotate(keys, *turn(k, positions[:, visual][:, None])))

    def visual_mass(self, mask: torch.Tensor) -> torch.Tensor:
        """Share of each row's attention, over its own sample, on its visual tokens: (batch, heads, rows).

        mask: (batch, tokens), true for real tokens.
        """
        beside = mask & ~self._visual  # all else: few tokens, brought to the front
        at = (~beside).int().argsort(dim=1, stable=True)[:, : int(beside.sum(1).max())]
        keys = rotate(rows_of(self._k, at), *self._angles(self._k, at))
        seen = beside.gather(1, at)[:, None] & (at[:, None] <= self._rows[..., None])
        scores = scaled_scores(self._queries, keys).masked_fill(~seen[:, None], float("-inf"))
        samples = torch.arange(len(mask), device=mask.device)
        owner = samples[:, None].expand_as(mask)[self._visual]
        own = torch.stack([self.scores[k][..., owner == k].logsumexp(-1) for k in samples])
        return (own - scores.logsumexp(-1)).sigmoid()

    def _angles(self, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._turn(x, self._positions.gather(2, at.expand(3, -1, -1)))


def told(log_p: torch.Tensor) -> torch.Tensor:
    """1 - entropy / log N of distributions over the last axis, N long: 0 looks evenly, 1 at one token only."""
    share = torch.einsum("...n,...n->...", log_p.exp(), log_p) / math.log(max(2, log_p.shape[-1]))
    return (1 + share).clamp_min(0)  # rounding takes an even row below


def joint_target(teacher: torch.Tensor) -> torch.Tensor:
    """(batch, heads, rows, N) log-probabilities of a layer's heads -> (batch, rows, N), of their weighted product."""
    return torch.einsum("bjrn,bjr->brn", teacher, told(teacher)).log_softmax(-1)


def joint_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mass: torch.Tensor,
    row_mask: torch.Tensor,
    key_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss above, a scalar in nats.

    student: (batch, student_heads, rows, N), teacher: (batch, teacher_heads, rows, N), log-probabilities of `PooledRows`.
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
