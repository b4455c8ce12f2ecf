import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synthetic
from laid.errors import LaidError
from laid.evaluation import cells
from laid.io import sha256_json


@pytest.fixture
def cell():
    return synthetic.cell("7B", "sft", 5, [[1, 1, 0, 1, 1, 0, 1, 1]])


def path_of(root, cell):
    return root / cell["student"] / cell["method"] / f"{cell['size']}.json"


def test_a_cell_says_what_its_answers_say(cell):
    assert cell["accuracy"] == 6 / 8 and cell["n"] == 8 and cell["questions"] == 8 and cell["seeds"] == [0]
    assert cell["compliance"] == 1.0
    assert cell["interval_method"] == "wilson 95%"
    # Wilson's interval of 6 of 8, worked by hand: (0.75 + z^2/16 -+ z sqrt(0.1875/8 + z^2/256)) / (1 + z^2/8).
    assert cell["interval"] == pytest.approx([0.4092754, 0.9285208], abs=1e-6)


def test_written_and_read_back_is_the_same_and_the_same_bytes(cell, tmp_path):
    path = path_of(tmp_path, cell)
    cells.write_cell(path, cell)
    first = path.read_bytes()
    assert cells.read_cell(path) == cell
    shuffled = synthetic.answers([[1, 1, 0, 1, 1, 0, 1, 1]], 5)[::-1]
    again = cells.make_cell(
        **{k: cell[k] for k in ("scale", "student", "label", "role", "method", "size", "tokens_mean")},
        positions_mean=cell["positions_mean"],
        provenance=cell["provenance"],
        answers=shuffled,
    )
    cells.write_cell(path, again)
    assert path.read_bytes() == first


def test_an_answer_saying_both_is_right_and_neither_is_wrong_and_not_compliant():
    answers = synthetic.answers([[0, 0, 1, 1]], 3)
    answers[0]["answer"], answers[1]["answer"] = "both", "none"
    built = cells.make_cell(
        scale="test", student="s", label="s", role="student", method="base", size=3, answers=answers,
        tokens_mean=1.0, positions_mean=1.0, provenance=synthetic.PROVENANCE,
    )  # fmt: skip
    assert (built["accuracy"], built["compliance"]) == (0.75, 0.75)


def test_several_seeds_get_a_bootstrap_wider_than_questions_alone():
    rng = np.random.default_rng(0)
    right = np.stack([rng.random(300) < p for p in (0.5, 0.7, 0.9)]).astype(int)
    cell = synthetic.cell("7B", "sft", 5, right)
    assert cell["interval_method"] == "bootstrap over questions, Student's t over seeds, 95%" and cell[
        "seeds"
    ] == [0, 1, 2]
    low, high = cell["interval"]
    # The seeds are .2 apart; the questions alone would give a width of about 0.06.
    assert low < cell["accuracy"] < high and high - low > 0.2
    assert cell == synthetic.cell("7B", "sft", 5, right)
    assert np.array_equal(cells.right_answers(cell), right)


def test_all_right_by_every_seed_is_not_certainty():
    cell = synthetic.cell("7B", "sft", 5, np.ones((3, 100), int))
    assert cell["interval_method"] == "wilson 95%" and 0.95 < cell["interval"][0] < 0.97


EDITS = {
    "accuracy": lambda c: c.update(accuracy=0.99),
    "answer flipped": lambda c: c["answers"][0].update(answer="no"),
    "n": lambda c: c.update(n=9),
    "questions": lambda c: c.update(questions=7),
    "seeds": lambda c: c.update(seeds=[0, 1]),
    "answer left out": lambda c: c["answers"].pop(),
    "answer twice": lambda c: c["answers"].append(c["answers"][0]),
    "unknown answer": lambda c: c["answers"][0].update(answer="maybe"),
    "needle outside": lambda c: c["answers"][0].update(needles=[5]),
    "probability": lambda c: c["answers"][0].update(p_yes=1.5),
    "key missing": lambda c: c.pop("tokens_mean"),
    "key added": lambda c: c.update(note="hello"),
    "not a number": lambda c: c.update(tokens_mean="12"),
    "infinite": lambda c: c.update(tokens_mean=float("inf")),
    "interval": lambda c: c.update(interval=[0.9, 0.95]),
    "role": lambda c: c.update(role="judge"),
    "provenance": lambda c: c["provenance"].pop("data"),
    "format": lambda c: c.update(format="laid-cell/0"),
    "size": lambda c: c.update(size=0),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("resealed", [False, True])
def test_a_changed_cell_is_found(cell, tmp_path, edit, resealed):
    changed = copy.deepcopy(cell)
    EDITS[edit](changed)
    # Someone who mends the digest as well is still caught by what does not add up.
    if resealed and edit != "infinite":
        changed["digest"] = sha256_json({k: v for k, v in changed.items() if k != "digest"})
    path = path_of(tmp_path, cell)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(changed))
    with pytest.raises(LaidError) as error:
        cells.read_cell(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("edit", ["tokens_mean", "provenance", "p_yes"])
def test_a_change_that_adds_up_is_found_by_the_digest(cell, tmp_path, edit):
    if edit == "tokens_mean":
        cell["tokens_mean"] += 1
    elif edit == "provenance":
        cell["provenance"]["code"]["dirty"] = True
    else:
        cell["answers"][0]["p_yes"] = 0.8
    with pytest.raises(LaidError, match="digest"):
        cells.check_cell(cell, "here")


def test_half_a_file_is_found(cell, tmp_path):
    path = path_of(tmp_path, cell)
    cells.write_cell(path, cell)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(LaidError, match="not valid JSON"):
        cells.read_cell(path)


def test_a_cell_in_anothers_place_is_found(cell, tmp_path):
    path = path_of(tmp_path, cell)
    cells.write_cell(path, cell)
    other = tmp_path / "7B" / "laid" / "5.json"
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(LaidError, match="holds the cell 7B/sft/5.json"):
        cells.load_cells(tmp_path)


def test_load_reads_all_cells_and_nothing_else(cell, tmp_path):
    base = synthetic.cell("7B", "base", 5, [[1, 0, 0, 1, 1, 0, 1, 1]])
    for one in (cell, base):
        cells.write_cell(path_of(tmp_path, one), one)
    (tmp_path / "7B" / "sft" / "cost.json").write_text("{}")
    (tmp_path / ".scratch" / "x").mkdir(parents=True)
    (tmp_path / ".scratch" / "x" / "5.json").write_text("half")
    assert cells.load_cells(tmp_path) == {("7B", "sft", 5): cell, ("7B", "base", 5): base}


def test_cells_that_do_not_belong_together_are_refused(cell, tmp_path):
    cells.write_cell(path_of(tmp_path, cell), cell)
    other = synthetic.cell("7B", "base", 5, [[1, 0, 0]])
    cells.write_cell(path_of(tmp_path, other), other)
    with pytest.raises(LaidError, match="not the same questions"):
        cells.load_cells(tmp_path)
    other = synthetic.cell("7B", "base", 5, [[1] * 8], scale="paper")
    cells.write_cell(path_of(tmp_path, other), other)
    with pytest.raises(LaidError, match="not the same scale"):
        cells.load_cells(tmp_path)


def test_a_folder_that_is_not_there_says_how_to_make_it(tmp_path):
    with pytest.raises(LaidError, match="snakemake"):
        cells.load_cells(tmp_path / "cells")


def test_a_seed_that_skipped_questions_is_refused():
    answers = synthetic.answers([[1, 1], [1, 0]], 3)[:3]
    with pytest.raises(LaidError, match="2 questions x 2 seeds make 4 answers, found 3"):
        cells.make_cell(
            scale="t", student="s", label="s", role="student", method="base", size=3, answers=answers,
            tokens_mean=1.0, positions_mean=1.0, provenance=synthetic.PROVENANCE,
        )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_any_answers_make_a_consistent_cell(right):
    cell = synthetic.cell("s", "m", 2, np.array(right, dtype=int))
    cells.check_cell(cell, "here")
    assert cell["accuracy"] == pytest.approx(np.mean(right))
    assert 0 <= cell["interval"][0] <= cell["accuracy"] + 1e-9
    assert cell["accuracy"] <= cell["interval"][1] + 1e-9 <= 1 + 1e-9


def test_an_interval_of_an_earlier_kind_is_made_again_from_the_answers(tmp_path):
    right = np.array([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 0, 1]])
    cell = synthetic.cell("7B", "laid", 5, right)
    old = {**cell, "interval": [0.6, 0.75], "interval_method": "cluster bootstrap 95%"}
    old["digest"] = cells._digest(old)
    cells.write_cell(tmp_path / "7B/laid/5.json", old)
    assert cells.load_cells(tmp_path)["7B", "laid", 5]["interval"] == cell["interval"] != [0.6, 0.75]
