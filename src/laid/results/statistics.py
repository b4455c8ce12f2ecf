"""Paired tests between models, corrected for their number, and the paper's gain.

Arrays of right and wrong answers have shape (seeds, questions), 1 for right. A model without training has one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

LEVEL = 0.05  # of all tests, after Holm's correction


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
    if one_seed(first, second):
        return Comparison(difference, low, high, mcnemar_of(first, second), "McNemar")
    return Comparison(difference, low, high, bootstrap_p(differences), "bootstrap")


def one_seed(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    """Whether each of the arrays (seeds, questions) of two models has a single seed."""
    return all(len(right) == 1 for right in (*first, *second))


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


def holm_by_kind(
    p_values: Sequence[float], columns: Sequence[Sequence[int]]
) -> tuple[list[float], tuple[int, int]]:
    """Holm's correction among tests of window means (several sizes) and among those of single sizes, each apart.

    Means over a window are what the claims are about; single sizes tell where. Each kind is one family, so that the one
    question is not paid for by the other. Returns the corrected values in the order given, and the families' sizes.
    """
    adjusted = list(p_values)
    counts = []
    for means in (True, False):
        family = [k for k, sizes in enumerate(columns) if (len(sizes) > 1) == means]
        counts.append(len(family))
        for k, p in zip(family, holm([p_values[k] for k in family]), strict=True):
            adjusted[k] = p
    return adjusted, (counts[0], counts[1])


def mean_relative_gain(accuracies: Sequence[float], base: Sequence[float]) -> float | None:
    """The paper's gain in percent: 100 * mean over sizes of (accuracy / base - 1). None where base has a zero."""
    if not accuracies or any(b <= 0 for b in base):
        return None
    return 100 * sum(a / b - 1 for a, b in zip(accuracies, base, strict=True)) / len(accuracies)
