import csv
import io
import math

import numpy as np
import pytest
import scipy.stats

import synthetic
from laid.evaluation import intervals
from laid.results import comparisons, render, tables, windows
from laid.results.answers import Results
from laid.results.statistics import LEVEL
from laid.results.windows import Bounds

SIZES = [1, 5, 20, 50, 150]


def grid_of(method_rights, seeds=1, n=200, alike=False):
    """A grid of one teacher and two students; method_rights(method, size) gives the share that is right.

    alike: all seeds of a model answer alike.
    """
    settings = synthetic.config(
        methods=["base", "sft", "kd", "laid"], ablations=["base", "laid_wo_kl", "laid"], sizes=SIZES
    )
    rng = np.random.default_rng(0)
    cells = {}
    for student in ("32B", "7B", "3B"):
        for method in ["base"] if student == "32B" else ["base", "sft", "kd", "laid", "laid_wo_kl"]:
            for k, size in enumerate(SIZES):
                count = 1 if method == "base" else seeds
                # Models share what is hard about a question, as real ones do.
                luck = 0.8 * np.random.default_rng([k]).random(n) + 0.2 * rng.random(
                    (1 if alike else count, n)
                ).repeat(count if alike else 1, axis=0)
                right = (luck < method_rights(method, size)).astype(int)
                cells[student, method, size] = synthetic.cell(student, method, size, right)
    results = Results(cells, settings, "cells")
    results.given = cells
    return results


@pytest.fixture(scope="module")
def fading():
    """LAid holds longer than the others, which fall alike."""
    return grid_of(lambda method, size: 1 / (1 + size / (900 if method == "laid" else 60)))


def rows_of(table):
    return list(csv.DictReader(io.StringIO(render.csv_text(table))))


def test_the_tests_are_mcnemars_with_holms_correction_of_each_kind(fading):
    rows = rows_of(comparisons.tests_table(fading))
    assert len(rows) == (3 + 2) * (len(SIZES) + 2)  # 7B has one ablation; every size, short and long
    raw = []
    for row in rows:
        b = c = 0
        for size in map(int, row["images"].split("+")):
            right = [
                [a["answer"] == a["label"] for a in fading.given[row["student"], m, size]["answers"]]
                for m in (row["against"], "laid")
            ]
            b += sum(x and not y for x, y in zip(*right, strict=True))
            c += sum(y and not x for x, y in zip(*right, strict=True))
        raw.append(scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0)
        assert float(row["p"]) == pytest.approx(raw[-1], rel=0.01)
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
    for means in (True, False):  # window means and single sizes: a family each
        family = [i for i, row in enumerate(rows) if ("+" in row["images"]) == means]
        assert len(family) == (3 + 2) * (2 if means else len(SIZES))
        running = 0.0
        for rank, i in enumerate(sorted(family, key=raw.__getitem__)):
            running = max(running, min(1.0, (len(family) - rank) * raw[i]))
            assert float(rows[i]["p_holm"]) == pytest.approx(running, rel=0.02)


def test_what_a_method_is_held_against(fading):
    settings = synthetic.config(
        methods=["base", "tuned", "sft", "kd", "laid", "mine"],
        ablations=["base", "laid", "laid_wo_kl", "other", "other_wo_kl"],
        sizes=SIZES,
        more={
            "methods": {
                "other": {},
                "other_wo_kl": {"extends": "other"},
                "mine": {"extends": "sft"},
                "tuned": {"extends": "yarn"},
            }
        },
    )
    results = Results(fading.given, settings, "cells", keys=list(fading.given))
    # Of the user's own, what is trained: a second YaRN is no rival, as YaRN is none.
    assert comparisons.rivals("laid", results) == ["sft", "kd", "laid_wo_kl", "mine"]
    assert comparisons.rivals("other", results) == ["other_wo_kl"]


def test_stars_stand_where_the_corrected_tests_hold_and_only_there(fading):
    table = comparisons.tests_table(fading)
    starred = {
        (r[0].text, r[1].text, name) for r in table.rows for e, name in zip(r, table.header) if e.stars
    }
    rows = rows_of(table)
    assert len(starred) == sum(float(row["p_holm"]) < 0.05 for row in rows) > 4
    assert ("3B", "LAid - KD (ours)", "50") in starred
    assert not any(name == "1" for _, _, name in starred)


def test_no_stars_where_nothing_differs():
    same = grid_of(lambda method, size: 0.7, n=60)
    stars = [e.stars for t in (*tables.build(same), comparisons.tests_table(same)) for r in t.rows for e in r]
    assert not any(stars)


def test_table1_stars_are_against_the_own_base(fading):
    table = tables.table1(fading)
    column = table.header.index("150")
    stars = {(row[0].text, row[1].text): row[column].stars for row in table.rows}
    assert stars["7B", "LAid"] == stars["3B", "LAid"] == "*"
    assert stars["7B", "base"] == stars["7B", "SFT"] == stars["32B", "base"] == ""
    assert any(
        "Holm's correction over 12 window means and over 30 sizes, each apart" in note for note in table.notes
    )  # 2 x 3 methods x (2 + 5)


def test_with_seeds_the_tests_are_bootstraps_and_the_note_says_so():
    grid = grid_of(lambda method, size: 0.9 if method == "laid" else 0.6, seeds=3, n=60, alike=True)
    table = comparisons.tests_table(grid)
    assert {row["test"] for row in rows_of(table)} == {"bootstrap"}
    assert any(
        "bootstrap over questions and seeds" in note and "One training seed" not in note
        for note in table.notes
    )
    assert all(e.stars == "*" for row in table.rows for e in row[2:])
    # No family is so large that the number of resamples rules a star out.
    assert len(table.rows) * len(table.rows[0]) * 2 / (grid.resamples + 1) < LEVEL


def test_window_tables_hold_windows_ratios_and_tokens(fading):
    in_images, ratios, tokens = windows.window_tables(fading)
    for row in rows_of(in_images):
        student, method, threshold = row["student"], row["method"], float(row["threshold"])
        own = windows.window(fading, (student, method), threshold)
        base = windows.window(fading, (student, "base"), threshold)
        assert float(row["images_low"]) == pytest.approx(own.low, abs=1e-4)
        assert float(row["ci_low"]) <= own.low + 1e-4 and own.high <= float(row["ci_high"]) + 1e-4
        assert float(row["ratio_low"]) == pytest.approx((own / base).low, abs=1e-4)
        if math.isfinite(own.high) and own.low:
            # synthetic cells: tokens = 40 + 350 a image, so linear in images
            assert float(row["tokens_low"]) == pytest.approx(40 + 350 * own.low, rel=1e-4)
        for end in ("low", "high"):
            images, there = float(row[f"ci_{end}"]), float(row[f"tokens_ci_{end}"])
            assert there == pytest.approx(40 + 350 * images if 0 < images < math.inf else images, rel=1e-4)
    assert [r[1].text for r in in_images.rows if r[0].text == "7B"] == [
        "base", "SFT", "KD (ours)", "LAid", "LAid w/o KL",
    ]  # fmt: skip
    assert ratios.rows[0][2].text == "1x" and len(tokens.rows) == len(in_images.rows) == 10


def test_window_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    sizes, truth = [1, 10, 100], [0.95, 0.85, 0.55]
    true_window = windows.effective_windows(sizes, np.array([truth]), 0.7)[0, 0]
    hits = 0
    for _ in range(100):
        right = [(rng.random((1, 300)) < p).astype(int) for p in truth]
        draws = intervals.joint_draws({"m": right}, 200)["m"]
        interval = windows.bounds_interval(windows.effective_windows(sizes, draws, 0.7))
        hits += interval.low <= true_window <= interval.high
    assert 88 <= hits <= 100


def test_published_windows_and_what_they_say_of_3_2_times():
    ratios = windows.published_ratios()
    # By hand: 3B base 62.09 at 10, 52.16 at 20; LAid 63.27 at 20, 58.20 at 50.
    base, laid = 10 * 2 ** (2.09 / 9.93), 20 * 2.5 ** (3.27 / 5.07)
    assert ratios["3B", 0.6].low == pytest.approx(laid / base, rel=1e-9)
    assert laid / base == pytest.approx(3.12, abs=0.01)
    # 7B at 0.5: base falls between 100 (51.08) and 150 (47.43), LAid never.
    assert ratios["7B", 0.5] == Bounds(pytest.approx(150 / (100 * 1.5 ** (1.08 / 3.65))), math.inf)
    text = windows.reading_of_32()
    assert "threshold 0.6 (3B, 3.12)." in text and "meant at 0.5 (at least 2.82)," in text
    table = windows.published_windows(resamples=50)
    assert [row[0].text for row in table.rows] == ["32B"] + ["7B"] * 5 + ["3B"] * 5
    assert table.rows[-1][3].text == "36.1 (3.12x)"
    row = next(
        r for r in rows_of(table) if (r["model"], r["method"], r["threshold"]) == ("3B", "base", "0.6")
    )
    # Table 2: 3,630.64 tokens at 10 images, 7,401.08 at 20.
    assert float(row["tokens_low"]) == pytest.approx(3630.64 + (base - 10) / 10 * 3770.44, rel=1e-5)
    assert float(row["ci_low"]) < base < float(row["ci_high"])


@pytest.mark.parametrize(
    ("bounds", "sizes", "text"),
    [
        (Bounds(12, 19.04), SIZES, "[12, 19.0]"),
        (Bounds(0, math.inf), SIZES, "[< 1, >= 150]"),
        (Bounds(150, math.inf), SIZES, "[>= 150]"),
        (Bounds(0, math.inf), None, "[?, ?]"),
    ],
)
def test_interval_text(bounds, sizes, text):
    assert windows.interval_text(bounds, sizes) == text
