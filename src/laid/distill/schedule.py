"""How training changes with progress: distance emphasis, the reach of gaps and dilution, and the learning rate.

One clock: progress = optimiser step / all steps, in [0, 1]. The paper's abstract says that longer position differences
are "emphasised more and more"; it gives no formula. Our reading, one rule for every part that knows distance:

    weight(d, p) = (1 + strength * p * d / d_max) / (its mean over the counted tokens)

At p = 0 all tokens count alike (eq. 7 as printed). At the end a token at the far end counts 1 + strength times one at the
answer. The mean stays 1, so lambda keeps its meaning while the emphasis grows. d is the M-RoPE distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from laid.errors import LaidError

SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DistanceSchedule:
    """Weights of tokens by distance, growing with progress. strength 0 switches it off."""

    strength: float = 4.0

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise LaidError(f"distance schedule: strength is {self.strength}, must be at least 0")

    def weights(
        self,
        distance: torch.Tensor,
        progress: float,
        mask: torch.Tensor | None = None,
        d_max: float | None = None,
    ) -> torch.Tensor:
        """(batch, tokens) distances -> weights of the same shape, mean 1 over each row's counted tokens, 0 elsewhere.

        mask: (batch, tokens), true where a token counts. d_max: the distance at which the full strength is reached;
        None takes each row's own largest counted one, a number (e.g. the reach of training) makes weights
        comparable between samples of different length; farther tokens than that weigh no more.
        """
        distance = distance.float()
        counted = torch.ones_like(distance) if mask is None else mask.to(distance.dtype)
        if d_max is None:
            span = (distance * counted).amax(-1, keepdim=True).clamp_min(1.0)
        else:
            span = max(float(d_max), 1.0)
        share = (distance / span).clamp(0.0, 1.0)
        raw = (1.0 + self.strength * _progress(progress) * share) * counted
        return (
            raw
            * counted.sum(-1, keepdim=True)
            / raw.sum(-1, keepdim=True).clamp_min(torch.finfo(raw.dtype).tiny)
        )


def distance_to_answer(position_ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """M-RoPE distance of every token to the answer position: (batch, tokens), float32, not negative.

    position_ids: (3, batch, tokens). answer: (batch,) token index that predicts the answer. The largest of the three
    axes' differences counts; for a still image that is the time axis, where the image sits as a whole. Tokens
    after the answer get 0.
    """
    at = position_ids.gather(2, answer.view(1, -1, 1).expand(3, -1, 1))
    return (at - position_ids).amax(0).clamp_min(0).float()


def reach(progress: float, short: float, long: float, end: float = 1.0) -> float:
    """The largest span in positions, or number of images, that a sample may have now: `short` at the start, `long` from `end` on."""
    share = 1.0 if _progress(progress) >= end else progress / end
    return short + (long - short) * share


def learning_rate_factor(step: int, steps: int, warmup: float = 0.05, shape: str = "linear") -> float:
    """Factor of the base learning rate for 0-based `step` of `steps`.

    It rises linearly over the first ceil(warmup * steps) steps, (step + 1) / that, so that no step is lost at 0, and
    then stays ("constant") or falls to 0 at the end ("linear", "cosine"), as transformers' schedules do. The paper: 0.05.
    """
    if shape not in SHAPES:
        raise LaidError(f"learning rate: shape is {shape!r}, allowed: {', '.join(SHAPES)}")
    if not 0 <= warmup < 1:
        raise LaidError(f"learning rate: warm-up share is {warmup}, must be at least 0 and below 1")
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return _fall(shape, min(1.0, (step - rising) / max(1, steps - rising)))


def _fall(shape: str, share: float) -> float:
    """1 at share 0; at share 1 still 1 ("constant") or 0."""
    if shape == "linear":
        return 1.0 - share
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0


def _progress(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise LaidError(f"progress is {progress}, must lie in 0 to 1 (steps done / all steps)")
    return float(progress)
