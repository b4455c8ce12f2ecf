"""Intervals of an accuracy: Wilson's for one seed, the bootstrap over questions and seeds for several.

Arrays of right and wrong answers have shape (seeds, questions), 1 for right. A model without training has one seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 5000


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the share `right`/`n` (Wilson 1927), as fractions inside [0, 1].

    Raises ValueError unless 0 <= right <= n and n > 0.
    """
    from scipy.stats import binomtest  # half a second: only who asks for an interval waits for it

    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def cluster_bootstrap(right: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `right` (seeds, questions), over questions and seeds as `joint_draws` has it."""
    draws = joint_draws({"": [right]}, resamples, seed)[""][:, 0]
    low, high = np.quantile(draws, [0.025, 0.975])
    return max(0.0, float(low)), min(1.0, float(high))


def joint_draws(
    models: Mapping[Any, Sequence[np.ndarray]], resamples: int = RESAMPLES, seed: int = 0, most: int = 1
) -> dict[Any, np.ndarray]:
    """Bootstrap accuracies (resamples, sizes) of several models on the same questions.

    most: what a question can score; more than 1 where several answers stand or fall together.

    models[key][size] has shape (seeds, questions). Questions are resampled once per size for all models (they are
    paired); seeds vary once per model for all sizes (a seed is one trained model, seen at every size). Resampling
    three seeds would draw from ten mixtures of them and say too much: where seeds differ by ten points, its 95 %
    interval misses the truth one time in five. Their mean's error is therefore drawn from Student's t with seeds - 1
    degrees of freedom, spread as the seeds are. Where seeds agree this errs on the wide side.
    """
    keys = list(models)
    sizes = len(models[keys[0]])
    by_seed = {}
    for i, key in enumerate(keys):
        count = models[key][0].shape[0]
        by_seed[key] = _seed_weights(np.random.default_rng([seed, 1, i, count]), count, resamples)
    out = {key: np.empty((resamples, sizes)) for key in keys}
    for k in range(sizes):
        n = models[keys[0]][k].shape[1]
        rng = np.random.default_rng([seed, 2, k, n])
        by_question = _draw_counts(rng, n, resamples)
        for key in keys:
            right = models[key][k]
            if right.shape[1] != n:
                raise ValueError(f"joint_draws: {right.shape[1]} and {n} questions at size {k}")
            # Whole numbers, so the product is exact and the same on every machine: (resamples, seeds).
            per_seed = by_question @ right.T.astype(float) / n
            error = (by_seed[key] * per_seed).sum(axis=1)
            out[key][:, k] = np.clip(per_seed.mean(axis=1) + error, 0.0, most)
    return out


def _seed_weights(rng: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """(resamples, count) weights, each row summing to zero, that make of the seeds' accuracies an error of their mean.

    weights @ a is distributed as s(a) / sqrt(count) times Student's t with count - 1 degrees of freedom.
    """
    if count == 1:
        return np.zeros((resamples, 1))
    normal = rng.standard_normal((resamples, count))
    chi = np.sqrt(rng.chisquare(count - 1, (resamples, 1)) / (count - 1))
    return (normal - normal.mean(axis=1, keepdims=True)) / chi / math.sqrt(count * (count - 1))


def _draw_counts(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """How often (resamples, n) each of n things is drawn in n draws with replacement; as floats, rows sum to n."""
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * resamples).reshape(resamples, n).astype(float)
