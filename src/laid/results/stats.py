"""Paired tests and effective windows.

Arrays of right and wrong answers have shape (seeds, questions), 1 for right. A model without training has one seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from laid.evaluation.intervals import RESAMPLES, joint_draws, wilson  # noqa: F401


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test from the two discordant counts (binomial with p = 1/2)."""
    n = only_first + only_second
    return float(binomtest(only_first, n).pvalue) if n else 1.0


@dataclass(frozen=True)
class Comparison:
    """Accuracy of the second minus the first, as a fraction, with its 95 % interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float
    test: str  # "McNemar" | "bootstrap"


def compare(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    draws_first: np.ndarray,
    draws_second: np.ndarray,
) -> Comparison:
    """Paired comparison of the mean accuracy over sizes of two models on the same questions.

    first[size], second[size]: (seeds, questions). draws_*: (resamples, sizes) of the same `joint_draws`. One seed each:
    McNemar's exact test on the questions of all sizes together. Otherwise the bootstrap over questions and seeds; its
    p-value is twice the share of resamples on the far side of zero. The interval is the bootstrap's in both cases.
    """
    differences = (draws_second - draws_first).mean(axis=1)
    low, high = (float(v) for v in np.quantile(differences, [0.025, 0.975]))
    difference = float(np.mean([b.mean() - a.mean() for a, b in zip(first, second, strict=True)]))
    if one_seed(*first, *second):
        return Comparison(difference, low, high, mcnemar_of(first, second), "McNemar")
    return Comparison(difference, low, high, bootstrap_p(differences), "bootstrap")


def one_seed(*right: np.ndarray) -> bool:
    """Whether each of the arrays (seeds, questions) has a single seed."""
    return all(len(r) == 1 for r in right)


def mcnemar_of(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """McNemar's exact p-value of two models with one seed each, over the questions of all sizes together."""
    pairs = list(zip(first, second, strict=True))
    return mcnemar(int(sum((a > b).sum() for a, b in pairs)), int(sum((b > a).sum() for a, b in pairs)))


def bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided p-value of "the draws' true value is zero", ties counted on both sides."""
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


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


def effective_windows(sizes: Sequence[float], curves: np.ndarray, threshold: float) -> np.ndarray:
    """`effective_window` of many curves (n, sizes) at once, as lows and highs (n, 2)."""
    below = curves < threshold
    first = np.where(below.any(axis=1), below.argmax(axis=1), len(sizes))
    out = np.empty((len(curves), 2))
    out[first == 0] = 0.0, sizes[0]
    out[first == len(sizes)] = sizes[-1], math.inf
    inner = np.flatnonzero((first > 0) & (first < len(sizes)))
    after = first[inner]
    high, low = curves[inner, after - 1], curves[inner, after]
    logs = np.log(np.asarray(sizes, float))
    share = (high - threshold) / (high - low)
    out[inner] = np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1]))[:, None]
    return out


def ratios(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Bounds (n, 2) of the quotients of bounded numbers, row by row, as Bounds divides."""
    with np.errstate(divide="ignore"):
        low = np.where(np.isinf(under[:, 1]), 0.0, over[:, 0] / under[:, 1])
        high = np.where(under[:, 0] > 0, over[:, 1] / under[:, 0], math.inf)
    return np.stack([low, high], axis=1)


def bounds_interval(draws: np.ndarray) -> Bounds:
    """95 % percentile interval of bounded numbers (n, 2): the lower end from the lows, the upper from the highs."""
    low = np.quantile(draws[:, 0], 0.025, method="lower")
    high = np.quantile(draws[:, 1], 0.975, method="higher")
    return Bounds(float(low), float(high))


def mean_relative_gain(accuracies: Sequence[float], base: Sequence[float]) -> float | None:
    """The paper's gain in percent: 100 * mean over sizes of (accuracy / base - 1). None where base has a zero."""
    if not accuracies or any(b <= 0 for b in base):
        return None
    return 100 * sum(a / b - 1 for a, b in zip(accuracies, base, strict=True)) / len(accuracies)
