"""L_total = lambda_LAid L_LAid + lambda_KL L_KL + lambda_SFT L_SFT (paper, eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from laid.distill.schedule import LambdaSchedule
from laid.errors import LaidError


@dataclass(frozen=True)
class Objective:
    """The three lambdas, each a constant or a schedule over progress, and `rows` for attention-row matching.

    A part with lambda 0 is not asked for, so that an ablation is a zero and costs nothing. L_LAid is summed over
    aligned layer pairs by the caller, as eq. 7 sums over layers.
    """

    laid: LambdaSchedule = field(default_factory=lambda: LambdaSchedule(0.0))
    kl: LambdaSchedule = field(default_factory=lambda: LambdaSchedule(0.0))
    sft: LambdaSchedule = field(default_factory=lambda: LambdaSchedule(1.0))
    rows: LambdaSchedule = field(default_factory=lambda: LambdaSchedule(0.0))

    @classmethod
    def of(cls, laid: float = 0.0, kl: float = 0.0, sft: float = 1.0, rows: float = 0.0) -> Objective:
        """Constant lambdas."""
        return cls(LambdaSchedule(laid), LambdaSchedule(kl), LambdaSchedule(sft), LambdaSchedule(rows))

    @classmethod
    def from_alpha(cls, alpha: float = 0.3, use_laid: bool = True, use_kl: bool = True) -> Objective:
        """Lambdas from the paper's one "distillation alpha", 0.3.

        The paper never says how alpha maps to eq. 8. Our reading, after Hinton et al. (2015): alpha weighs what comes
        from the teacher, 1 - alpha the labels: lambda_LAid = lambda_KL = alpha, lambda_SFT = 1 - alpha. Leaving a part
        out (the ablations; the 3B student without L_KL) sets its lambda to 0 and changes no other.
        """
        if not 0 <= alpha <= 1:
            raise LaidError(f"distillation alpha is {alpha}, must lie in 0 to 1")
        return cls.of(laid=alpha * use_laid, kl=alpha * use_kl, sft=1 - alpha)

    def needs(self, part: str) -> bool:
        """Whether `part` ever has weight: whether the teacher's tensors for it are needed at all."""
        schedule = getattr(self, part)
        return schedule.value > 0 or (schedule.shape != "constant" and schedule.final > 0)

    def total(self, parts: Mapping[str, torch.Tensor], progress: float = 0.0) -> torch.Tensor:
        """Weighted sum of scalar losses named "laid", "kl", "sft", "rows".

        Raises LaidError when a part has weight now and is missing, when a part is unknown, or when none has weight.
        """
        unknown = set(parts) - {"laid", "kl", "sft", "rows"}
        if unknown:
            raise LaidError(f"objective: unknown parts {sorted(unknown)}, allowed: laid, kl, sft, rows")
        total = None
        for part in ("laid", "kl", "sft", "rows"):
            weight = getattr(self, part)(progress)
            if weight == 0:
                continue
            if part not in parts:
                raise LaidError(f"objective: lambda of {part!r} is {weight:g} but its loss was not computed")
            term = weight * parts[part]
            total = term if total is None else total + term
        if total is None:
            raise LaidError("objective: every lambda is 0, there is nothing to train")
        return total
