"""Dilution: short samples in which the needle has as many competitors as in long ones.

Softmax shares a query's attention among all keys, so that every further image takes some from the needle. Here each
distractor stands for m images like it: log m is added to the scores that the tokens of the question give its keys,
which is what m copies of it would do. A haystack of n images then dilutes the needle as 1 + m (n - 1) images do, at
the cost of n. It is to the number of keys what position gaps (`laid.distill.gaps`) are to distance.

Which image is the needle, the training questions say; at evaluation nothing of this is left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch


def copies(images: int, needles: int, reach: float, rng: np.random.Generator) -> float:
    """How many images each of the `images - needles` distractors is to stand for, at least 1.

    A haystack is to weigh as much as one of n images, n drawn from `images` to `reach`, every doubling equally likely.
    rng: a numpy Generator; equal states give equal numbers.
    """
    if reach <= images or needles >= images:
        return 1.0
    n = math.exp(rng.uniform(math.log(images), math.log(reach)))
    return (n - needles) / (images - needles)


def score_bias(
    tokens: int, starts: Sequence[int], text_start: int, needles: Collection[int], stands_for: float
) -> torch.Tensor:
    """(tokens,) float32: what the question adds to its scores of each key.

    log(stands_for) on the blocks of the images that are no needles, 0 elsewhere. starts: token index where each image
    block begins, ascending; text_start: that of the text after the last one. needles: places among the images.
    """
    bias, edges = torch.zeros(tokens), [*starts, text_start] if starts else [0]
    bias[edges[0] : edges[-1]] = math.log(stands_for)
    for needle in needles:
        bias[edges[needle] : edges[needle + 1]] = 0
    return bias
