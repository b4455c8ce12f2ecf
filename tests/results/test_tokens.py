"""Table 2 from image sizes: on real photographs with the published files, against counts made another way."""

from __future__ import annotations

import csv

import pytest

from laid.cli import main
from laid.data.coco import load_coco
from laid.data.haystacks import haystack_file, questions_of_size, read_questions
from laid.data.images import image_size
from laid.models.processing import Processor
from laid.models.prompts import OFFICIAL_PROMPT
from laid.results import tokens
from laid.settings import validate


@pytest.fixture(scope="module")
def published(shared):
    return Processor.load(shared / "qwen2_5_vl/Qwen2.5-VL-7B-Instruct")


@pytest.fixture(scope="module")
def photographs(shared):
    return load_coco(shared / "coco_slice", "val2017")


ASKED = {
    "scale": "x",
    "haystacks": {
        "vocabulary": "official",
        "hard_negatives": 0.0,
        "test": {"questions": 40, "sizes": [1, 5]},
    },
}


def test_counts_of_one_question_by_hand(published, photographs):
    """COCO's photographs lie between the processor's least and most pixels, so a side is rounded to whole tokens of
    28 pixels; the sizes are read from the files here. Text: counted by the tokenizer on the template's own rendering."""
    haystacks = validate(ASKED).haystacks
    found = tokens.lengths(published, photographs, haystacks, [5])[5]
    for question, (count, positions) in zip(
        questions_of_size(haystacks, photographs, 5)[:5], found, strict=False
    ):
        grids = [[round(side / 28) for side in image_size(photographs.root / p)] for p in question.needles + question.distractors]  # fmt: skip
        message = {"role": "user", "content": [{"type": "text", "text": OFFICIAL_PROMPT + question.text}]}
        text = published.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        around = len(published.tokenizer(text)["input_ids"])
        assert count == around + sum(w * h + 2 for w, h in grids)
        assert positions == around + sum(max(w, h) + 2 for w, h in grids)


def test_means_of_photographs_beside_the_paper(published, photographs):
    """Where 206 photographs and 40 questions allow it, within 3 % of the printed figures (all sizes: docs/reference/tokens.md)."""
    haystacks = validate(ASKED).haystacks
    built = tokens.table(tokens.lengths(published, photographs, haystacks, [1, 100, 150]), photographs)
    rows = {int(row[0]): row for row in built.data.itertuples(index=False)}
    assert {size: row[4] for size, row in rows.items()} == {1: "393.46", 100: "35418.29", 150: "53653.22"}
    for row in rows.values():
        _, count, error, positions, paper, difference = map(float, row)
        assert difference == pytest.approx(100 * (count / paper - 1), abs=0.01) and abs(difference) < 3
        assert positions < count / 5 and error < 0.05 * count
    assert float(rows[150][3]) < 4000  # of 32,768 positions that the model is trained to


def test_the_questions_are_those_of_the_workflow(
    micro, coco_root, haystacks, tmp_path, micro_file, family, capsys
):
    coco = load_coco(coco_root, "val2017")
    for size in (1, 2, 5):
        assert questions_of_size(micro.haystacks, coco, size) == read_questions(
            haystack_file(haystacks / "test", size)
        )
    words = ["--config", str(micro_file), "--model", str(family["small"]), "--coco", str(coco_root)]
    assert main(["tokens", *words, "--out", str(tmp_path)]) == 0
    assert "Prompt length over images" in capsys.readouterr().out
    with open(tmp_path / "tokens.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["images"] for row in rows] == ["1", "2", "5"]
    # One token, its two delimiters and three positions an image.
    first, last = float(rows[0]["tokens"]), float(rows[2]["tokens"])
    assert last - first == pytest.approx(12) and float(rows[2]["positions"]) == pytest.approx(last)
    assert main(["tokens", *words, "--sizes", "1000"]) == 2
    assert "999 distractors" in capsys.readouterr().err
