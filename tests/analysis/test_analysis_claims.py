"""Claims that stand on the analysis and on the inference cost, with records whose verdict is known."""

import numpy as np
import pytest

from laid.io import write_json
from laid.results import claim_tests
from laid.results.answers import Curves
from laid.results.claim_tests import NOT, NOT_MEASURED, SUPPORTED, UNDECIDED


class Models(Curves):
    """As much of a source as these tests read."""

    teacher, students = "T", ["S"]


def record(student, shares, spread):
    draws = np.random.default_rng(0).normal(0, spread, 200)
    return {
        "format": "laid-analysis/1",
        "student": student,
        "methods": {m: {"spectrum": {"share": s, "draws": (s + draws).tolist()}} for m, s in shares.items()},
    }


@pytest.mark.parametrize(
    ("laid", "spread", "verdict"), [(0.45, 0.001, SUPPORTED), (0.25, 0.001, NOT), (0.42, 0.1, UNDECIDED)]
)
def test_low_frequencies(tmp_path, laid, spread, verdict):
    write_json(tmp_path / "analysis/T.json", record("T", {"base": 0.5}, 0.0))
    write_json(tmp_path / "analysis/S.json", record("S", {"base": 0.3, "kd": 0.4, "laid": laid}, spread))
    outcome = claim_tests.low_frequencies(Models(), "laid", ["base", "sft", "kd"], tmp_path)
    values = {s.what.split()[-1]: s.value for s in outcome.statements}
    assert values == pytest.approx({"base": 100 * (0.5 - laid) - 20, "kd": 100 * (0.5 - laid) - 10})
    assert outcome.verdict == verdict


def test_low_frequencies_without_an_analysis(tmp_path):
    assert claim_tests.low_frequencies(Models(), "laid", ["base"], tmp_path).verdict == NOT_MEASURED
    assert claim_tests.low_frequencies(Models(), "laid", ["base"], None).verdict == NOT_MEASURED


@pytest.mark.parametrize(
    ("flops", "ratio", "verdict"),
    [
        ([10, 10], (1.01, 0.98, 1.03), SUPPORTED),
        ([10, 11], (1.0, 0.99, 1.01), NOT),
        ([10, 10], (1.1, 1.06, 1.2), NOT),
    ],
)
def test_inference_cost(tmp_path, flops, ratio, verdict):
    part = {"tokens": 40, "flops": flops, "seconds": [0.01, 0.01], "ratio": ratio[0], "interval": ratio[1:]}
    write_json(
        tmp_path / "inference_cost/S/laid.json",
        {"sizes": {"5": part}, "clock": "process time", "same_vision": True},
    )
    outcome = claim_tests.inference_cost(Models(), "laid", 5, tmp_path)
    assert outcome.verdict == verdict and len(outcome.statements) == 2


def test_inference_cost_without_a_measurement(tmp_path):
    outcome = claim_tests.inference_cost(Models(), "laid", 5, tmp_path)
    assert outcome.verdict == NOT_MEASURED and any(
        "run bench/inference_cost.py" in r for r in outcome.remarks
    )
