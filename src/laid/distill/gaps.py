"""Position gaps between images: short samples that span the positions of long ones.

PoSE (Zhu et al. 2024) skips positions between chunks of text, so that short inputs show a model long distances. Here the
chunks are images: random gaps are opened before images and before the text after the last one. An image is never
torn: its <|vision_start|>, its tokens and its <|vision_end|> move together, inner layout untouched. Grown with
training progress (`laid.distill.schedule.reach`) this is the third form of distance emphasis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from laid.errors import LaidError

DRAWS = ("uniform", "log")


def image_starts(input_ids: torch.Tensor, vision_start_id: int) -> list[int]:
    """Token indices of <|vision_start|> in input_ids (tokens,)."""
    return torch.nonzero(input_ids == vision_start_id).flatten().tolist()


def open_gaps(
    position_ids: torch.Tensor,
    starts: Sequence[int],
    text_start: int | None,
    reach: float,
    rng: np.random.Generator,
    exact: bool = False,
    draw: str = "uniform",
) -> torch.Tensor:
    """New M-RoPE positions (3, tokens) with random gaps in front of images and of the final text.

    position_ids: (3, tokens) of one sample without padding. starts: token index where each image block begins
    (its <|vision_start|>), ascending. text_start: token index of the text after the last image block (None: that text
    stays attached to the last image). reach: the largest span (largest position + 1) asked for.
    rng: a numpy Generator; equal states give equal positions. exact: take floor(reach) itself as the span.

    draw: how the span is drawn from the present one to floor(reach): "uniform", or "log", every doubling equally likely,
    which keeps short distances in practice while long ones are learned.

    What is to be added is shared among the slots, every composition equally likely. A sample that already reaches so
    far is returned unchanged.
    Raises LaidError on another draw, when starts are not ascending token indices or text_start lies before the last of them.
    """
    if draw not in DRAWS:
        raise LaidError(f"gaps: draw is {draw!r}, allowed: {', '.join(DRAWS)}")
    tokens = position_ids.shape[1]
    slots = [int(s) for s in starts] + ([] if text_start is None else [int(text_start)])
    if any(b <= a for a, b in itertools.pairwise(slots)) or (
        slots and not 0 <= slots[0] <= slots[-1] < tokens
    ):
        raise LaidError(
            f"gaps: {slots} must be ascending token indices below {tokens}, images first, then the final text"
        )
    span = int(position_ids.max()) + 1
    room = int(reach) - span
    if room <= 0 or not slots:
        return position_ids.clone()
    if exact:
        added = room
    elif draw == "log":
        added = int(span * ((span + room) / span) ** rng.random()) - span
    else:
        added = int(rng.integers(0, room + 1))
    # Stars and bars: every way of sharing `added` among the slots is equally likely.
    places = added + len(slots) - 1
    bars = np.sort(rng.choice(places, size=len(slots) - 1, replace=False))
    gaps = np.diff(np.concatenate(([-1], bars, [places]))) - 1
    steps = np.zeros(tokens, dtype=np.int64)
    steps[slots] = gaps
    shift = torch.from_numpy(np.cumsum(steps)).to(position_ids.device, position_ids.dtype)
    return position_ids + shift
