"""L_KL: the divergence of the student's answers from the teacher's (paper, eq. 8), at answer positions only."""

from __future__ import annotations

import torch

from laid.errors import LaidError


def common_rows(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut both logits (..., vocabulary) to the rows both have, before any softmax.

    Qwen2.5-VL pads its vocabulary to 151,936 rows (3B) or 152,064 (7B, 32B) for one tokenizer of 151,665 tokens: the
    surplus rows name no token, so leaving them out and normalising over the rest loses nothing.
    Raises LaidError when the leading shapes differ.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise LaidError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} are not for the same"
            " positions: pass both at the same answer positions"
        )
    rows = min(student.shape[-1], teacher.shape[-1])
    return student[..., :rows], teacher[..., :rows]


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """tau^2 * KL(p^t(tau) || p^s(tau)), averaged over positions (eq. 8). A scalar, in nats, float32 or float64.

    student: (positions..., vocabulary) logits; teacher: the same positions, perhaps another vocabulary size, perhaps
        from a cache in half precision. Both are raised to float32 first. weights: (positions...), not negative.
    Raises LaidError on different positions, a temperature that is not positive, or no position.
    """
    log_s, log_t = _log_probabilities(student, teacher, temperature)
    return temperature**2 * _mean(_kl(log_t, log_s), weights)


def _log_probabilities(student, teacher, temperature):
    if not temperature > 0:
        raise LaidError(f"temperature must be above 0, got {temperature}")
    student, teacher = common_rows(student, teacher)
    wide = torch.promote_types(student.dtype, torch.float32)
    return ((x.to(wide) / temperature).log_softmax(-1) for x in (student, teacher))


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last dimension; a row with p = 0 (logit -inf) adds nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def _mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if not values.numel():
        raise LaidError("no answer position: the divergence has nothing to average")
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    if not bool(weights.sum() > 0):
        raise LaidError(f"no answer position: the weights of all {values.numel()} positions are 0")
    return (values * weights).sum() / weights.sum()
