"""Positions stretched and packed, by hand and as properties; losses and words from answers whose truth is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.analysis import why
from laid.cli import main
from laid.io import read_json
from laid.models.prompts import EncodedPrompt, mrope_positions
from laid.results import beyond
from laid.results.names import SHIPPED, Names


def prompt(grids, before=3, after=4):
    """A prompt of that many text tokens around images of those merged grids."""
    sizes = np.array([h * w + 2 for h, w in grids])
    starts = before + np.concatenate(([0], np.cumsum(sizes)[:-1]))
    mask = np.zeros(before + sizes.sum() + after, dtype=bool)
    for start, size in zip(starts, sizes):
        mask[start + 1 : start + size - 1] = True
    return EncodedPrompt(np.arange(len(mask)), mrope_positions(before, grids, after), starts, mask)


def test_packed_by_hand():
    """Six images of one token at the positions of two: 0, 0, 0, 1, 1, 1; three positions a slot."""
    given_ = prompt([(1, 1)] * 6)
    found = why.packed(given_, 2)
    expected = [0, 1, 2, *[3, 4, 5] * 3, *[6, 7, 8] * 3, 9, 10, 11, 12]
    assert found.positions.tolist() == [expected] * 3
    assert found.span == prompt([(1, 1)] * 2).span
    assert why.packed(given_, 6) is given_ and why.packed(given_, 9) is given_


grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=9)


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 4), st.integers(0, 60))
def test_images_stay_whole_and_in_order(sizes, slots, more):
    """Inside a block nothing moves; starts never fall; no block reaches into the next slot; the text goes on after."""
    one = prompt(sizes)
    wide = why.stretched(one, one.span + more, np.random.default_rng([0, more]))
    tight = why.packed(one, slots)
    assert wide.span == one.span + more and tight.span <= one.span
    edges = [*one.block_starts.tolist(), why.text_start(one)]
    for changed in (wide, tight):
        for a, b in [(0, edges[0]), *itertools.pairwise(edges), (edges[-1], len(one.ids))]:
            inside = changed.positions[:, a:b] - changed.positions[:, a : a + 1]
            np.testing.assert_array_equal(inside, one.positions[:, a:b] - one.positions[:, a : a + 1])
        starts = changed.positions[0, edges]
        assert (np.diff(starts) >= 0).all() and changed.positions[:, : edges[0]].max() == edges[0] - 1
    at, n = tight.positions[0, edges[:-1]], len(sizes)
    slot = slots * np.arange(n) // n if n > slots else np.arange(n)
    assert len(set(at)) == len(set(slot))
    for a, b in itertools.pairwise(edges):
        later = at[at > tight.positions[0, a]]
        assert tight.positions[:, a:b].max() < (later.min() if len(later) else tight.positions[0, edges[-1]])


def record(few, rates, n=200):
    """A record whose accuracies are `rates`[method][condition][size]."""
    methods = {}
    for method, conditions in rates.items():
        methods[method] = {
            condition: {
                str(size): {
                    "right": [int(k < rate * n) for k in range(n)],
                    "images": size,
                    "span": 3.0 * size,
                }
                for size, rate in by_size.items()
            }
            for condition, by_size in conditions.items()
        }
    return {"student": "s", "few": few, "sizes": sorted(rates["base"]["ordinary"]), "methods": methods}


NAMES = Names(SHIPPED)
RATES = {
    "base": {"ordinary": {5: 1, 50: 0.6, 100: 0.5}, "stretched": {5: 1, 50: 0.6, 100: 0.5}, "packed": {5: 1, 50: 0.9, 100: 0.9}},
    "laid": {"ordinary": {5: 1, 50: 0.9, 100: 0.8}, "stretched": {5: 1, 50: 1, 100: 1}, "packed": {5: 1, 50: 0.9, 100: 0.9}},
}  # fmt: skip


def test_losses_by_hand():
    one = record(5, RATES)
    value, draws = beyond.losses(one, "base", "stretched", [50, 100])
    assert value == pytest.approx(45) and np.quantile(draws, 0.01) < 45 < np.quantile(draws, 0.99)
    assert beyond.losses(one, "base", "packed", [50, 100])[0] == pytest.approx(10)
    assert beyond.long_sizes(one, 20) == [50, 100] and beyond.long_sizes(one, 500) == [100]


def test_words_follow_from_the_numbers():
    text = beyond.report({"s": record(5, RATES)}, {}, "t", ["s"], 20, NAMES)
    assert "s: in base distance costs more, 35.0 [" in text
    assert (
        "LAid: wins back 45.0 [" in text
        and "of the 45.0 points lost to distance; no clear change under dilution (0.0 [0.0, 0.0])." in text
    )
    other = {"base": {**RATES["base"], "stretched": RATES["base"]["packed"]}, "laid": RATES["base"]}
    text = beyond.report({"s": record(5, other)}, {}, "t", ["s"], 20, NAMES)
    assert "neither cause costs clearly more" in text
    assert "LAid: loses 35.0 [" in text and "points more to distance; no clear change under dilution" in text


def test_a_model_that_is_worse_everywhere_wins_nothing_back():
    """Little is lost from few to many images where little was known at few: no cure, and the price is told."""
    flat = {condition: {5: 0.6, 50: 0.6, 100: 0.5} for condition in beyond.CONDITIONS}
    text = beyond.report({"s": record(5, {"base": RATES["base"], "laid": flat})}, {}, "t", ["s"], 20, NAMES)
    assert "LAid: no clear change under distance (0.0 [" in text and "wins back" not in text
    assert (
        "loses 35.0 [" in text
        and "points more to dilution; it costs 40.0 [" in text
        and "points at 5 images." in text
    )
    assert "| s | LAid | 60.0 [" in text and "| s | base | 100.0 [100.0, 100.0] | 55.0 [" in text


def test_verbs_from_models_to_words(family, haystacks, coco_root, micro_file, tmp_path, capsys):
    config = tmp_path / "more.yaml"
    config.write_text("results: results\nbeyond: {few: 2, questions: 6, sizes: [8, 12]}\n")
    files = ["--config", str(micro_file), str(config)]
    data = ["--coco", str(coco_root), "--device", "cpu"]
    far = tmp_path / "beyond/haystacks"
    assert main(["haystacks", *files, "--coco", str(coco_root), "--beyond", str(far)]) == 0
    model = ["--student-name", "small", "--model", str(family["small"])]
    out = tmp_path / "beyond"
    why_words = ["why", *files, *model, *data, "--questions", str(haystacks / "test"), "--methods", "base"]
    assert main([*why_words, "--out", str(out / "why/small.json")]) == 0
    found = read_json(out / "why/small.json")
    assert found["sizes"] == [2, 5]
    base = found["methods"]["base"]
    assert base["stretched"]["5"]["images"] == 2 and base["packed"]["5"]["images"] == 5
    assert base["stretched"]["5"]["span"] == pytest.approx(base["ordinary"]["5"]["span"], abs=1)
    assert base["packed"]["5"]["span"] == pytest.approx(base["ordinary"]["2"]["span"], abs=1)
    assert base["ordinary"]["2"] == base["packed"]["2"]
    cells = [
        "evaluate",
        *files,
        *model,
        *data,
        "--method",
        "base",
        "--questions",
        str(far),
        "--sizes",
        "8",
        "12",
    ]
    assert main([*cells, "--student-name", "small", "--out", str(tmp_path / "cells/beyond/small/base")]) == 0
    capsys.readouterr()
    assert main(["beyond", *files, "--out", str(out), "--cells", str(tmp_path / "cells")]) == 0
    text = capsys.readouterr().out
    assert "## Where it stops" in text and (out / "why.md").read_text() + "\n" == text
    assert {p.name for p in (out / "figures").glob("*.svg")} == {"why.svg", "beyond.svg"}


def test_few_must_be_a_test_size(micro, family, haystacks, coco_root):
    from laid.errors import LaidError

    wrong = micro.changed({"beyond": {"few": 3}})
    with pytest.raises(LaidError, match="beyond.few is 3: it must be a test size"):
        why.measure(wrong, "small", family["small"], {"base": None}, coco_root, haystacks / "test")
