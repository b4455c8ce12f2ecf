"""Intervals, paired tests and effective windows; numpy only, deterministic.

Arrays of right and wrong answers have shape (seeds, questions), 1 for right. A model without training has one seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 2000


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share `right`/`n` (Wilson 1927), as fractions inside [0, 1].

    Raises ValueError unless 0 <= right <= n and n > 0.
    """
    if n <= 0 or not 0 <= right <= n:
        raise ValueError(f"wilson: {right} of {n}")
    share = right / n
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == n else min(1.0, middle + half)
    return low, high


def cluster_bootstrap(right: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `right` (seeds, questions), resampling seeds and questions both."""
    draws = bootstrap_means(right, *_weights(right.shape, resamples, seed))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_means(right: np.ndarray, by_seed: np.ndarray, by_question: np.ndarray) -> np.ndarray:
    """Means (resamples,) of `right` (seeds, questions) under resampling weights that sum to one per row."""
    return np.einsum("bs,sq,bq->b", by_seed, right.astype(float), by_question, optimize=True)


def _weights(shape: tuple[int, int], resamples: int, seed: int, *more: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, *more, *shape])
    return seed_weights(rng, shape[0], resamples), question_weights(rng, shape[1], resamples)


def seed_weights(rng: np.random.Generator, seeds: int, resamples: int) -> np.ndarray:
    """Weights (resamples, seeds) of seeds drawn with replacement."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds


def question_weights(rng: np.random.Generator, questions: int, resamples: int) -> np.ndarray:
    """Weights (resamples, questions) of questions drawn with replacement."""
    return rng.multinomial(questions, np.full(questions, 1 / questions), size=resamples) / questions


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test from the two discordant counts (binomial with p = 1/2)."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))  # integers: no rounding however large n is
    return min(1.0, 2 * math.exp(math.log(tail) - n * math.log(2)))


@dataclass(frozen=True)
class Comparison:
    """Accuracy of the second minus the first, as a fraction, with its 95 % interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float
    test: str  # "mcnemar exact" | "paired bootstrap"


def compare(first: np.ndarray, second: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Paired comparison of two models on the same questions, shapes (seeds, questions) with equal questions.

    One seed each: McNemar's exact test. Otherwise a paired bootstrap: questions are resampled once for both,
    seeds for each by itself (a seed of one method has nothing in common with that of another). Its p-value is
    twice the share of resamples on the far side of zero, at least 1 / resamples, so a tie is never significant.
    The interval is the bootstrap's in both cases. Raises ValueError where the numbers of questions differ.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"compare: {first.shape[1]} and {second.shape[1]} questions")
    rng = np.random.default_rng([seed, first.shape[1], first.shape[0], second.shape[0]])
    questions = question_weights(rng, first.shape[1], resamples)
    of_first = seed_weights(rng, first.shape[0], resamples)
    of_second = seed_weights(rng, second.shape[0], resamples)
    draws = bootstrap_means(second, of_second, questions) - bootstrap_means(first, of_first, questions)
    low, high = (float(v) for v in np.quantile(draws, [0.025, 0.975]))
    difference = float(second.mean() - first.mean())
    if first.shape[0] == second.shape[0] == 1:
        p = mcnemar(int((first > second).sum()), int((second > first).sum()))
        return Comparison(difference, low, high, p, "mcnemar exact")
    p = bootstrap_p(draws)
    return Comparison(difference, low, high, p, "paired bootstrap")


def bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided p-value of "the draws' true value is zero", ties counted on both sides."""
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Bounds:
    """A number known exactly (low == high), only from below (high infinite), or only from above (low 0)."""

    low: float
    high: float

    def __truediv__(self, other: Bounds) -> Bounds:
        low = self.low / other.high if math.isfinite(other.high) else 0.0
        high = self.high / other.low if other.low > 0 else math.inf
        return Bounds(low, high)

    @property
    def known(self) -> bool:
        return self.low > 0 or math.isfinite(self.high)

    def text(self, suffix: str = "") -> str:
        """As 15.2, ">= 150", "< 1", "5.1 to 9.0" or "unknown", each number with the suffix."""
        if self.low == self.high:
            return number(self.low) + suffix
        if not self.known:
            return "unknown"
        if math.isinf(self.high):
            return f">= {number(self.low)}{suffix}"
        if self.low == 0:
            return f"< {number(self.high)}{suffix}"
        return f"{number(self.low)} to {number(self.high)}{suffix}"


def number(value: float) -> str:
    """Three significant digits without exponent: 1.52, 15.2, 152, 1520; trailing ".0" of whole numbers dropped."""
    value = round(value, 9)
    if value == int(value):
        return str(int(value))
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def effective_window(sizes: Sequence[float], accuracies: Sequence[float], threshold: float) -> Bounds:
    """The largest size up to which accuracy stays at or above `threshold`, interpolated over log size.

    The curve is followed from the smallest size to its first fall below the threshold; a later rise does not
    count. Above the threshold everywhere gives Bounds(last size, inf), below it at the first size
    Bounds(0, first size). `sizes` ascend; accuracies and threshold share a unit.
    """
    if not sizes or len(sizes) != len(accuracies):
        raise ValueError(f"effective_window: {len(sizes)} sizes, {len(accuracies)} accuracies")
    if accuracies[0] < threshold:
        return Bounds(0.0, float(sizes[0]))
    for i in range(1, len(sizes)):
        before, after = accuracies[i - 1], accuracies[i]
        if after < threshold:
            share = (before - threshold) / (before - after)
            log_size = math.log(sizes[i - 1]) + share * math.log(sizes[i] / sizes[i - 1])
            return Bounds(math.exp(log_size), math.exp(log_size))
    return Bounds(float(sizes[-1]), math.inf)


def curve_draws(curves: Sequence[Sequence[np.ndarray]], resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Bootstrap curves (models, resamples, sizes) of several models on the same questions.

    `curves[model][size]` has shape (seeds, questions). Questions are resampled once per size for all models;
    seeds once per model for all sizes, because a seed is one trained model seen at every size.
    """
    sizes = len(curves[0])
    rng = np.random.default_rng([seed, len(curves), sizes, curves[0][0].shape[1]])
    by_seed = [seed_weights(rng, model[0].shape[0], resamples) for model in curves]
    out = np.empty((len(curves), resamples, sizes))
    for k in range(sizes):
        questions = question_weights(rng, curves[0][k].shape[1], resamples)
        for m, model in enumerate(curves):
            out[m, :, k] = bootstrap_means(model[k], by_seed[m], questions)
    return out


def bounds_interval(draws: Sequence[Bounds]) -> Bounds:
    """95 % percentile interval of bounded numbers: the lower end from the lows, the upper from the highs."""
    low = np.quantile([d.low for d in draws], 0.025, method="lower")
    high = np.quantile([d.high for d in draws], 0.975, method="higher")
    return Bounds(float(low), float(high))


def mean_relative_gain(accuracies: Sequence[float], base: Sequence[float]) -> float | None:
    """The paper's gain in percent: 100 * mean over sizes of (accuracy / base - 1). None where base has a zero."""
    if not accuracies or any(b <= 0 for b in base):
        return None
    return 100 * sum(a / b - 1 for a, b in zip(accuracies, base, strict=True)) / len(accuracies)
