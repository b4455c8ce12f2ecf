"""POPE's scores and table, from answers counted by hand to cells of a real (untrained) model."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest

import synthetic
from laid.cli import main
from laid.data.pope import STRATEGIES, pope_file, read_pope
from laid.errors import LaidError
from laid.evaluation.cells import make_cell, read_cell, write_cell
from laid.evaluation.scoring import pope_answer
from laid.results import claim_tests
from laid.results.answers import Curves
from laid.results.claim_tests import NOT, NOT_MEASURED, SUPPORTED, UNDECIDED
from laid.results.names import Names
from laid.results.pope import SCORES, read_pope_answers, scores, table
from laid.results.published import Published


def answered(**counts):
    """Answers by confusion: tp, fp, tn, fn."""
    kinds = {"tp": ("yes", "yes"), "fp": ("yes", "no"), "tn": ("no", "no"), "fn": ("no", "yes")}
    rows = [{"answer": kinds[k][0], "label": kinds[k][1]} for k, n in counts.items() for _ in range(n)]
    return pd.DataFrame(rows)


def test_scores_by_hand():
    """The worked example: 8 of 10 yes found, 4 of 10 no taken for yes."""
    found = scores(answered(tp=8, fn=2, fp=4, tn=6))
    assert tuple(found) == SCORES
    assert (found["accuracy"], found["recall"], found["yes_ratio"]) == (0.7, 0.8, 0.6)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 * (2 / 3) * 0.8 / (2 / 3 + 0.8))
    assert tuple(scores(answered(tn=5, fn=5)).values()) == (0.5, None, 0.0, None, 0.0)
    assert tuple(scores(answered(tp=5, fp=5)).values()) == (0.5, 0.5, 1.0, pytest.approx(2 / 3), 1.0)


# After RUCAIBox/POPE, evaluate.py, worked by hand: the first sentence, without commas, parted at blanks.
SAID = {
    "No": "no", "no": "no", "No, there is no dog.": "no", "There is not a dog": "no", "Yes. There is no cat.": "yes",
    "Yes": "yes", "yes": "yes", "": "yes", "I see a dog": "yes", "NO": "yes", "No!": "yes", "Nothing": "yes",
    "There isn't": "yes", "Yes and no": "no", "no.": "no",
}  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_what_a_response_says(text):
    assert pope_answer(text) == SAID[text]


def place(folder, student, method, right):
    """Cells from right[seed][image][question], the same under each strategy."""
    for strategy in STRATEGIES:
        answers = [
            {
                "id": f"{image:012d}:{question}", "seed": seed, "label": ("yes", "no")[question % 2],
                "answer": ("yes", "no")[question % 2 if good else 1 - question % 2], "p_yes": None, "needles": [0],
            }
            for seed, images in enumerate(right)
            for image, questions in enumerate(images)
            for question, good in enumerate(questions)
        ]  # fmt: skip
        cell = make_cell(
            scale="test", student=student, label=student, role="student", method=method, size=1, answers=answers,
            tokens_mean=40.0, positions_mean=40.0, provenance=synthetic.PROVENANCE,
        )  # fmt: skip
        write_cell(folder / f"pope_{strategy}" / student / method / "1.json", cell)


def of_images(share, images=200):
    """One seed whose first images are answered right altogether, the others altogether wrong."""
    return [[[i < share * images] * 6 for i in range(images)]]


def test_change_is_drawn_over_images(tmp_path):
    place(tmp_path, "S", "base", of_images(0.5))
    place(tmp_path, "S", "laid", [of_images(0.5)[0], of_images(0.6)[0]])
    found = read_pope_answers(tmp_path)
    counts, asked = found.right(("S", "laid"))
    assert counts.shape == (2, 200) and asked == 18 and set(counts.ravel()) == {0, 18}
    difference, low, high = found.change("S", "laid")
    assert difference == pytest.approx(0.05) and low < 0.05 < high
    # 200 images, not 3,600 answers: a share of one half has the standard error of 200 throws of a coin.
    drawn = found.draws([("S", "base")])["S", "base"]
    assert drawn.std() == pytest.approx(np.sqrt(0.25 / 200), rel=0.1)


class Here(Curves):
    """A scale with one student."""

    def __init__(self):
        self.students = ["S"]


@pytest.mark.parametrize(
    ("after", "verdict"), [(of_images(0.5), SUPPORTED), (of_images(0.3), NOT), (of_images(0.49), UNDECIDED)]
)
def test_the_claim(tmp_path, after, verdict):
    place(tmp_path / "cells", "S", "base", of_images(0.5))
    place(tmp_path / "cells", "S", "laid", after)

    outcome = claim_tests.benchmark_kept(Here(), "laid", 1, tmp_path)
    assert outcome.verdict == verdict and outcome.statements[0].bound == -1


def test_the_claim_without_a_table(tmp_path):
    outcome = claim_tests.benchmark_kept(Here(), "laid", 1, tmp_path)
    assert outcome.verdict == NOT_MEASURED and "snakemake --cores all pope" in outcome.remarks[0]
    assert claim_tests.benchmark_kept(Published(10), "laid", 1, tmp_path).verdict == NOT_MEASURED


def test_a_missing_cell_and_other_images_are_one_line(tmp_path):
    place(tmp_path, "S", "base", of_images(0.5, 4))
    with pytest.raises(LaidError, match="cells are of S, the configuration's models are T, R: name a config"):
        table(read_pope_answers(tmp_path), "T", ["R"], Names())
    (tmp_path / "pope_popular/S/base/1.json").unlink()
    with pytest.raises(LaidError, match="popular/S/base/1.json: no such cell; make it with"):
        read_pope_answers(tmp_path)
    place(tmp_path, "S", "base", of_images(0.5, 4))
    place(tmp_path, "S", "sft", of_images(0.5, 6))
    with pytest.raises(LaidError, match="not the same questions as"):
        read_pope_answers(tmp_path)


# ------------------------------------------------------------------ with a model


@pytest.fixture(scope="module")
def asked(micro_file, coco_root, family, tmp_path_factory):
    """A folder with questions and the cells of an untrained student and teacher, made by the verbs."""
    root = tmp_path_factory.mktemp("pope")
    (root / "few.yaml").write_text("pope: {images: 12}\n")
    config = ["--config", str(micro_file), str(root / "few.yaml")]
    assert (
        main(["pope", "questions", *config, "--coco", str(coco_root), "--out", str(root / "questions")]) == 0
    )
    for name in ("teacher", "small"):
        words = [
            "--student-name",
            name,
            "--method",
            "base",
            "--model",
            str(family[name]),
            "--coco",
            str(coco_root),
        ]
        for strategy in STRATEGIES:
            file, out = pope_file(root / "questions", strategy), root / f"cells/pope_{strategy}/{name}/base"
            asked = ["--questions", str(file), "--out", str(out), "--device", "cpu"]
            assert main(["evaluate", *config, *words, *asked]) == 0
    return root, config


def test_questions_to_table(asked, coco_root, capsys):
    root, config = asked
    assert main(["pope", "table", *config, "--cells", str(root / "cells"), "--out", str(root / "out")]) == 0
    assert "POPE: object questions about single images" in capsys.readouterr().out
    with open(root / "out/pope.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["student"], r["strategy"]) for r in rows] == [
        (name, strategy) for name in ("teacher", "small") for strategy in (*STRATEGIES, "all")
    ]
    for row in rows[4:7]:
        questions = read_pope(pope_file(root / "questions", row["strategy"]), coco_root)
        cell = read_cell(root / f"cells/pope_{row['strategy']}/small/base/1.json")
        said = {a["id"]: a["answer"] for a in cell["answers"]}
        right = [said[q.id] == q.answer for q in questions]
        assert row["n"] == "72" and float(row["accuracy"]) == pytest.approx(100 * np.mean(right), abs=1e-3)
        yes = [said[q.id] == "yes" for q in questions]
        assert float(row["yes_ratio"]) == pytest.approx(100 * np.mean(yes), abs=1e-3)
    assert "| small | base | adversarial |" in (root / "out/pope.md").read_text()


def test_a_positive_question_is_answered_alike_whatever_the_absent_ones(asked):
    root, _ = asked
    by_strategy = [
        {a["id"]: a["p_yes"] for a in read_cell(root / f"cells/pope_{s}/small/base/1.json")["answers"] if a["label"] == "yes"}
        for s in STRATEGIES
    ]  # fmt: skip
    for other in by_strategy[1:]:
        assert by_strategy[0] == pytest.approx(other, abs=1e-5)


def test_the_prompt_is_popes_own_in_its_words(asked, coco_root, micro, family):
    """No words before the question; those of Visual Haystacks keep the official runner's."""
    from laid.data.coco import load_coco
    from laid.data.pope import poll, questions_of
    from laid.evaluation.evaluate import Evaluator
    from laid.methods.registry import load_with_method

    coco = load_coco(coco_root, "val2017")
    polled = poll(coco.labels, coco.categories, images=10, objects=2, seed=0)
    evaluator = Evaluator(load_with_method(micro, "base", family["small"], None), coco_root, micro.evaluation)
    decode = evaluator.processor.tokenizer.decode
    for wording, before in (
        ("pope", "<|vision_end|>Is there "),
        ("haystack", "in Yes or No: For the image with "),
    ):
        (first, *_) = evaluator.ask(questions_of(polled, "random", wording))
        assert before in decode(first.prompt.ids)
