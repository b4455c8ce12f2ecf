"""The sweep's table against numbers worked by hand and against the tests it borrows from."""

import csv
import io
import re

import numpy as np
import pytest

import synthetic
from laid.errors import LaidError
from laid.results.render import csv_text, markdown
from laid.results.statistics import holm
from laid.results.sweep import read, sweep_table

SIZES = [5, 20, 50, 100]
CURVES = {
    "base": {5: 0.9, 20: 0.7, 50: 0.5, 100: 0.5},
    "kd": {5: 0.9, 20: 0.9, 50: 0.6, 100: 0.5},
    "gaps": {5: 0.9, 20: 0.9, 50: 0.9, 100: 0.7},
    "gain": {5: 0.9, 20: 0.9, 50: 0.62, 100: 0.5},
}


def settings(**sweep):
    wanted = {"students": ["3B"], "against": ["kd"], "methods": ["gaps", "gain"]} | sweep
    more = {"haystacks": {"validation": {"sizes": SIZES}}, "sweep": wanted}
    more["methods"] = {name: {} for name in wanted["methods"]}
    return synthetic.config(more=more)


def grid(config, n=100, curves=CURVES):
    cells = synthetic.grid_of({("3B", method): curve for method, curve in curves.items()}, n)
    return read(cells, config, "results/test/sweep/cells")


def rows(table):
    return {row["variant"]: row for row in csv.DictReader(io.StringIO(csv_text(table)))}


def test_means_windows_and_differences_by_hand():
    found = rows(sweep_table(grid(settings())))
    assert list(found) == ["base", "kd", "gaps", "gain"]
    assert (found["gaps"]["short"], found["gaps"]["long"]) == ("90.00", "80.00")
    assert (found["kd"]["short"], found["kd"]["long"]) == ("90.00", "55.00")
    # gaps: 0.9 at 50 falls through 0.8 halfway to 0.7 at 100, in log size: sqrt(50 * 100)
    assert float(found["gaps"]["window_low"]) == pytest.approx(50 * 2**0.5, rel=1e-4)
    assert (found["gaps"]["short_vs_kd"], found["gaps"]["long_vs_kd"]) == ("0.00", "25.00")
    assert found["base"]["long_vs_kd"] == "" and found["kd"]["long_vs_kd"] == ""


def test_p_values_are_mcnemars_with_holms_correction():
    found = rows(sweep_table(grid(settings())))
    # the synthetic answers are nested, so what one has more is all that differs: 30 + 20 questions, 2 questions
    raw = {
        ("gaps", "short"): 1.0,
        ("gaps", "long"): 2 / 2**50,
        ("gain", "short"): 1.0,
        ("gain", "long"): 2 / 2**2,
    }
    for (variant, name), p in raw.items():
        assert float(found[variant][f"{name}_vs_kd_p"]) == pytest.approx(p, rel=1e-2)
    adjusted = dict(zip(raw, holm(list(raw.values()))))
    for (variant, name), p in adjusted.items():
        assert float(found[variant][f"{name}_vs_kd_p_holm"]) == pytest.approx(p, rel=1e-2)
    text = markdown(sweep_table(grid(settings())))
    assert text.count("\\*") == 1  # the long window of gaps


def test_seeds_widen_the_intervals_and_decide_the_tests():
    """A variant that is much better with one seed and no better with two others is no difference."""
    rng = np.random.default_rng(0)
    cells = {}
    for method, shares in (
        ("base", [0.6]),
        ("kd", [0.6] * 3),
        ("gaps", [0.6] * 3),
        ("gain", [0.6, 0.6, 0.95]),
    ):
        for size in SIZES:
            right = np.stack([rng.permutation(200) < 200 * share for share in shares]).astype(int)
            cells["3B", method, size] = synthetic.cell("3B", method, size, right)
    found = rows(sweep_table(read(cells, settings(), "cells", resamples=500)))
    assert found["gain"]["seeds"] == "3" and float(found["gain"]["long_vs_kd_p_holm"]) > 0.05
    width = {m: float(found[m]["long_high"]) - float(found[m]["long_low"]) for m in ("gaps", "gain")}
    assert width["gain"] > 2 * width["gaps"]


def test_a_subset():
    assert list(rows(sweep_table(grid(settings(methods=["gaps"]))))) == ["base", "kd", "gaps"]
    few = {method: curve for method, curve in CURVES.items() if method != "gaps"}
    assert "gain" in rows(sweep_table(grid(settings(methods=["gain"]), curves=few)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            settings(methods=["gaps", "other"]),
            "cells/3B/other/5.json: no such cell (and 3 more cells); make it with",
        ),
        (settings(methods=[]), "no method; give --config config.yaml configs/sweep.yaml"),
    ],
)
def test_what_is_missing_is_said(config, said):
    with pytest.raises(LaidError, match=re.escape(said)):
        grid(config)
