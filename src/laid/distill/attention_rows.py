"""Matching of attention rows: where question and answer tokens look, student against mixed teacher heads.

Our second reading of "distance-weighted attention matching". Only chosen query rows are compared, (rows x tokens) per
head and never (tokens x tokens). The teacher's row for student head i is sum_j a_ij P^t_j, a_i = softmax over teacher
heads of a learned row, so that it stays a distribution. The divergence sums, over keys n,

    weight_n * ( P^t log(P^t / P^s) - P^t + P^s )

Each term is at least 0 and 0 only at equality, so weights cannot turn it negative; with all weights 1 the sum is KL(P^t || P^s).
"""

from __future__ import annotations

import torch
from torch import nn

from laid.errors import LaidError
from laid.methods.decoder import repeat_kv


def attention_rows(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of chosen attention rows: (batch, heads, rows, tokens), float32; -inf where not allowed.

    q: (batch, heads, tokens, head_dim) and k: (batch, kv_heads, tokens, head_dim), both rotated. rows: (batch, rows)
    token indices of the queries. key_mask: (batch, tokens), true for real tokens. Causal by token index.
    Raises LaidError when a row may see no key at all.
    """
    _batch, heads, tokens, dim = q.shape
    chosen = q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = chosen.to(wide) @ repeat_kv(k, heads).to(wide).transpose(-1, -2) * dim**-0.5
    allowed = torch.arange(tokens, device=q.device) <= rows[..., None]
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


def pooled_rows(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Attention rows over the visual tokens of the whole batch: (batch, heads, rows, N), log-probabilities.

    q: (batch, heads, tokens, head_dim), k: (batch, kv_heads, tokens, head_dim), turned by positions that are counted
    from each sample's question. rows: (batch, rows). visual: (batch, tokens), true at N tokens in all.
    """
    heads, dim = q.shape[1], q.shape[3]
    chosen = q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
    keys = repeat_kv(k, heads).transpose(1, 2)[visual]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bhrd,nhd->bhrn", chosen.to(wide), keys.to(wide)) * dim**-0.5
    return scores.log_softmax(-1)


@torch.no_grad()
def matching_heads(
    student: torch.Tensor,
    teacher: torch.Tensor,
    keys: torch.Tensor,
    row_mask: torch.Tensor | None,
    kv_heads: int,
    teacher_kv_heads: int,
) -> torch.Tensor:
    """For each student head the teacher head that looks where it looks: (student_heads, teacher_heads) of 0 and 1.

    Queries and keys of models trained apart lie in unrelated bases; where a head looks does not depend on the basis.
    The overlap of two heads is the mean over rows of sum_n sqrt(p_n q_n) over `keys`. Student heads that share keys are
    given teacher heads that share keys, since one key cannot follow two.

    student: (batch, student_heads, rows, tokens), teacher: (batch, teacher_heads, rows, tokens): log-probabilities of the
    same rows. keys: (batch, tokens), true where looking counts. row_mask: (batch, rows), true where a row counts.
    """
    counted = torch.ones_like(student[:, 0, :, 0]) if row_mask is None else row_mask.to(student.dtype)
    shown = keys[:, None, None].to(student.dtype)
    s, t = ((rows / 2).exp() * shown for rows in (student, teacher))
    overlap = torch.einsum("birn,bjrn,br->ij", s, t, counted)
    chosen = torch.zeros_like(overlap)
    own, group = overlap.shape[0] // kv_heads, overlap.shape[1] // teacher_kv_heads
    for first in range(0, len(overlap), own):
        by_group = overlap[first : first + own].view(own, teacher_kv_heads, group)
        best = int(by_group.amax(-1).sum(0).argmax())
        chosen[torch.arange(first, first + own), best * group + by_group[:, best].argmax(-1)] = 1.0
    return chosen


class RowMatching(nn.Module):
    """Weighted divergence of student rows from learned mixtures of teacher rows, for one pair of layers.

    Parameter: mixture (student_heads, teacher_heads), logits of the mixture, 0 at the start (an even mixture).
    """

    def __init__(self, student_heads: int, teacher_heads: int) -> None:
        super().__init__()
        self.mixture = nn.Parameter(torch.zeros(student_heads, teacher_heads))

    @torch.no_grad()
    def match_(self, chosen: torch.Tensor, share: float = 0.95) -> None:
        """Start with `share` of each mixture on the teacher head that `matching_heads` chose."""
        others = (1.0 - share) / (chosen.shape[1] - 1)
        self.mixture.copy_((chosen * share + (1.0 - chosen) * others).log())

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        key_weights: torch.Tensor | None = None,
        row_mask: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean over batch, student heads and rows of the weighted divergence: a scalar in nats.

        student: (batch, student_heads, rows, tokens), teacher: (batch, teacher_heads, rows, tokens): log-probabilities
        from `attention_rows`. key_weights: (batch, tokens), not negative, e.g. DistanceSchedule.weights.
        row_mask: (batch, rows), true where a row counts (None: all).
        Raises LaidError when rows or heads do not fit.
        """
        heads = (student.shape[1], teacher.shape[1])
        if heads != tuple(self.mixture.shape) or student.shape[2:] != teacher.shape[2:]:
            raise LaidError(
                f"attention rows: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} do not fit a mixture of"
                f" {tuple(self.mixture.shape)} heads over the same rows and tokens"
            )
        weights = self.mixture.softmax(-1).to(teacher.dtype)
        target = torch.einsum("ij,bjrn->birn", weights, teacher.exp())
        seen = target > 0
        log_target = torch.where(seen, target, torch.ones_like(target)).log()
        log_student = torch.where(seen, student, torch.zeros_like(student))
        terms = target * (log_target - log_student) - target + student.exp()
        if key_weights is not None:
            terms = terms * key_weights.to(terms.dtype)[:, None, None]
        sums = terms.sum(-1)
        if row_weights is not None:
            mixed = torch.einsum("ij,bjr->bir", weights, row_weights.to(weights.dtype)).detach()
            mixed = mixed * row_mask[:, None].to(mixed.dtype)
            return (sums * mixed).sum() / mixed.sum().clamp_min(1e-6)
        if row_mask is None:
            return sums.mean()
        counted = row_mask[:, None].to(sums.dtype).expand_as(sums)
        return (sums * counted).sum() / counted.sum()
