"""Effective windows against hand-made curves, and what is printed of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.results import windows
from laid.results.windows import Bounds

quick = settings(max_examples=25, deadline=None)


def effective_window(sizes, accuracies, threshold):
    return Bounds(*windows.effective_windows(sizes, np.array([accuracies]), threshold)[0])


WINDOWS = [
    ([1, 10, 100], [0.9, 0.9, 0.9], (100, math.inf), ">= 100"),
    ([1, 10, 100], [0.7, 0.9, 0.9], (0, 1), "< 1"),
    ([1, 10, 100], [0.9, 0.8, 0.6], (10, 10), "10"),  # at the threshold is still inside
    ([1, 10, 100], [0.9, 0.85, 0.75], (10**1.5, 10**1.5), "31.6"),
    ([1, 10, 100], [0.9, 0.7, 0.9], (10**0.5, 10**0.5), "3.16"),  # the first fall counts
    ([5], [0.8], (5, math.inf), ">= 5"),
]


@pytest.mark.parametrize(("sizes", "accuracies", "bounds", "text"), WINDOWS)
def test_effective_window_by_hand(sizes, accuracies, bounds, text):
    window = effective_window(sizes, accuracies, 0.8)
    assert (window.low, window.high) == pytest.approx(bounds)
    assert window.text() == text


@quick
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=8),
    st.floats(0.05, 0.95),
    st.floats(0.05, 0.95),
)
def test_a_higher_threshold_never_gives_a_larger_window(accuracies, one, two):
    sizes = [2**i for i in range(len(accuracies))]
    low = effective_window(sizes, accuracies, min(one, two))
    high = effective_window(sizes, accuracies, max(one, two))
    assert high.low <= low.low + 1e-9 and high.high <= low.high + 1e-9


def test_effective_window_is_np_interp_on_a_falling_curve():
    sizes, accuracies = [1, 2, 5, 10, 20, 50], [0.99, 0.97, 0.9, 0.84, 0.7, 0.5]
    theirs = np.exp(np.interp(-0.75, -np.array(accuracies), np.log(sizes)))
    assert effective_window(sizes, accuracies, 0.75).low == pytest.approx(theirs)


def test_many_windows_at_once_are_those_of_a_plain_loop():
    rng = np.random.default_rng(6)
    sizes = [1, 2, 5, 20, 150]
    curves = np.round(0.3 + 0.7 * rng.random((200, 5)), 1) * np.linspace(1, 0.9, 5)
    slow = []
    for curve in curves.tolist():
        bounds = (sizes[-1], math.inf)
        for i, value in enumerate(curve):
            if value < 0.5:
                before = (
                    0
                    if i == 0
                    else sizes[i - 1]
                    * (sizes[i] / sizes[i - 1]) ** ((curve[i - 1] - 0.5) / (curve[i - 1] - value))
                )
                bounds = (before, before or sizes[0])
                break
        slow.append(bounds)
    assert np.allclose(windows.effective_windows(sizes, curves, 0.5), slow)
    assert len({(low > 0, math.isinf(high)) for low, high in slow}) == 3  # every kind of bound occurs


def test_ratios_of_windows_carry_what_is_known():
    known, beyond, below = Bounds(15, 15), Bounds(150, math.inf), Bounds(0, 1)
    assert (known / Bounds(5, 5)).text("x") == "3x"
    assert (beyond / known).text("x") == ">= 10x"
    assert (known / beyond).text("x") == "< 0.100x"
    assert (known / below).text("x") == ">= 15x"
    assert (beyond / beyond).text("x") == "unknown"
    assert (below / below).text("x") == "unknown"


def test_interval_of_windows_by_percentile():
    draws = np.array([(v, v) for v in range(1, 100)] + [(150, math.inf)] * 3)
    interval = windows.bounds_interval(draws)
    assert interval.low == pytest.approx(3, abs=1) and math.isinf(interval.high)


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (1.0345, "1.03"), (15.25, "15.2"), (123.4, "123"), (0.1, "0.100")]
)
def test_number(value, text):
    assert windows.number(value) == text
