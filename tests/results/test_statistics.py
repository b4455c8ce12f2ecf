import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.evaluation import intervals
from laid.results import statistics

quick = settings(max_examples=25, deadline=None)


@quick
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_lie_where_the_score_test_turns(counts):
    """At an end p of the interval, the share lies 1.96 standard errors of p away."""
    right, n = counts
    low, high = intervals.wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(right / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-5)


@quick
@given(st.integers(0, 700), st.integers(0, 700))
def test_mcnemar_counts_the_throws_of_a_coin(b, c):
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1)) if n else 1
    assert statistics.mcnemar(b, c) == pytest.approx(min(1.0, float(2 * tail / 2**n)), rel=1e-6)


def test_holm_by_hand():
    # 0.01 x 4; 0.02 x 3; 0.03 x 2; 0.04 x 1 raised to the one before.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p):
    adjusted = statistics.holm(p)
    for raw, new in zip(p, adjusted, strict=True):
        assert raw <= new <= min(1.0, raw * len(p)) + 1e-12
    order = np.argsort(p, kind="stable")
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(order))


def test_cluster_bootstrap_of_one_seed_is_near_the_normal_interval():
    right = (np.arange(400) < 300).astype(int)[None]
    low, high = intervals.cluster_bootstrap(right)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_cluster_bootstrap_matches_a_plain_loop():
    rng = np.random.default_rng(1)
    right = (rng.random((3, 40)) < [[0.5], [0.55], [0.6]]).astype(int)
    means = []
    for _ in range(6000):
        seeds = right[:, rng.integers(40, size=40)].mean(axis=1)
        error = seeds.std(ddof=1) / math.sqrt(3) * rng.standard_t(2)
        means.append(seeds.mean() + error)
    assert intervals.cluster_bootstrap(right) == pytest.approx(
        np.clip(np.quantile(means, [0.025, 0.975]), 0, 1), abs=0.03
    )


def test_the_interval_of_seeds_alone_is_students():
    # All questions alike, so that nothing but the seeds varies: the textbook interval of a mean of three.
    values = np.array([0.5, 0.56, 0.6])
    draws = intervals.joint_draws({"m": [np.repeat(values[:, None], 50, axis=1)]}, resamples=40000)["m"][:, 0]
    low, high = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
    assert np.quantile(draws, [0.025, 0.975]) == pytest.approx([low, high], abs=0.01)
    p = scipy.stats.ttest_1samp(values, 0.5).pvalue
    assert statistics.bootstrap_p(draws - 0.5) == pytest.approx(p, rel=0.1)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_false_alarms_between_models_whose_seeds_differ_stay_below_the_level(spread):
    """Three seeds around the accuracy of a fixed base: no difference in the long run, however far seeds lie apart."""
    rng = np.random.default_rng(6)
    alarms = {0.05: 0, 0.01: 0}
    for _ in range(200):
        base = (rng.random((1, 100)) < 0.7).astype(int)
        trained = (rng.random((3, 100)) < 0.7 + spread * rng.standard_normal((3, 1))).astype(int)
        p = compared(base, trained, resamples=400).p
        for level in alarms:
            alarms[level] += p < level
    # 10 and 2 expected at most; more than 19 and 7 have probability 0.003 and 0.001.
    assert alarms[0.05] <= 19 and alarms[0.01] <= 7


def compared(first, second, resamples=intervals.RESAMPLES):
    draws = intervals.joint_draws({"a": [first], "b": [second]}, resamples)
    return statistics.compare([first], [second], draws["a"], draws["b"])


def test_compare_is_paired():
    rng = np.random.default_rng(2)
    first = (rng.random(300) < 0.6).astype(int)[None]
    second = first.copy()
    second[0, np.flatnonzero(first[0] == 0)[:12]] = 1  # better on 12, worse on none
    result = compared(first, second)
    assert result.difference == pytest.approx(12 / 300)
    assert result.test == "McNemar" and result.p == pytest.approx(2 * 0.5**12)
    assert 0 < result.low < result.difference < result.high
    assert compared(first, first).p == 1.0
    with pytest.raises(ValueError, match="10 and 300 questions"):
        compared(first, second[:, :10])


def test_compare_over_sizes_pools_the_questions_and_means_the_sizes():
    first = [np.array([[1, 0, 0, 0]]), np.array([[0, 0]])]
    second = [np.array([[0, 1, 1, 0]]), np.array([[1, 1]])]
    draws = intervals.joint_draws({"a": first, "b": second}, 200)
    result = statistics.compare(first, second, draws["a"], draws["b"])
    assert result.difference == pytest.approx((0.25 + 1.0) / 2)
    assert result.p == pytest.approx(scipy.stats.binomtest(1, 5).pvalue)


def test_compare_with_seeds_knows_that_seeds_differ():
    rng = np.random.default_rng(3)
    base = (rng.random((1, 300)) < 0.6).astype(int)
    steady = (rng.random((3, 300)) < 0.8).astype(int)
    shaky = (rng.random((3, 300)) < [[0.55], [0.65], [0.99]]).astype(int)
    assert compared(base, steady).test == "bootstrap"
    assert compared(base, steady).p < 0.02
    assert compared(base, shaky).p > 0.05
    assert compared(steady, base).difference == pytest.approx(-compared(base, steady).difference)


def test_false_alarms_of_the_paired_bootstrap_stay_near_the_level():
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(200):
        truth = rng.random(100)
        first, second = ((rng.random((1, 100)) < truth).astype(int) for _ in range(2))
        pair = np.concatenate([second, second])  # two seeds that agree: questions vary only
        alarms += compared(first, pair, resamples=400).p < 0.05
    assert alarms <= 22  # 10 expected; more than 22 has probability 0.0002


def test_joint_draws_share_questions_between_models_and_seeds_between_sizes():
    rng = np.random.default_rng(5)
    one = [(rng.random((1, 60)) < 0.7).astype(int) for _ in range(2)]
    draws = intervals.joint_draws({"a": one, "b": one}, resamples=50)
    assert draws["a"].shape == (50, 2)
    # The same model twice: pairing makes them equal in every resample.
    assert np.array_equal(draws["a"], draws["b"])
    # A seed that is always wrong and one that is always right: a resample weighs them alike at every size.
    seeds = [np.array([[0] * 60, [1] * 60]) for _ in range(2)]
    draws = intervals.joint_draws({"c": seeds}, resamples=50)["c"]
    assert np.allclose(draws[:, 0], draws[:, 1]) and 0 <= draws.min() < 0.3 and 0.7 < draws.max() <= 1
