"""L_total = lambda_LAid L_LAid + lambda_KL L_KL + lambda_SFT L_SFT (paper, eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from laid.errors import LaidError

if TYPE_CHECKING:
    from laid.settings import TrainedMethod

PARTS = ("laid", "kl", "sft")


@dataclass(frozen=True)
class Objective:
    """The three lambdas.

    A part with lambda 0 is not asked for, so that an ablation is a zero and costs nothing. L_LAid is summed over
    aligned layer pairs by the caller, as eq. 7 sums over layers.
    """

    laid: float = 0.0
    kl: float = 0.0
    sft: float = 1.0

    @classmethod
    def of(cls, method: TrainedMethod) -> Objective:
        """The lambdas of a method."""
        return cls(method.lambda_laid, method.lambda_kl, method.lambda_sft)

    def needs(self, part: str) -> bool:
        """Whether `part` has weight: whether the teacher's tensors for it are needed at all."""
        return getattr(self, part) > 0

    def total(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum of scalar losses named "laid", "kl", "sft".

        Raises LaidError when a part has weight and is missing, or when none has weight.
        """
        total = None
        for part in PARTS:
            weight = getattr(self, part)
            if weight == 0:
                continue
            if part not in parts:
                raise LaidError(f"objective: lambda of {part!r} is {weight:g} but its loss was not computed")
            term = weight * parts[part]
            total = term if total is None else total + term
        if total is None:
            raise LaidError("objective: every lambda is 0, there is nothing to train")
        return total
