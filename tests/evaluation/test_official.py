"""The official Visual Haystacks files put to a model as a user would: real questions, photographs, the command line."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest

from laid.cli import main
from laid.data.questions import ordered_images, read_questions
from laid.evaluation.cells import read_cell
from laid.evaluation.evaluate import Evaluator
from laid.evaluation.scoring import official_bootstrap
from laid.methods.registry import load_with_method

SINGLE, MULTI = "VHs_qa/single_needle/VHs_large", "VHs_qa/multi_needle"


@pytest.fixture(scope="module")
def official(shared, tmp_path_factory):
    """A COCO root without annotations: the needles that are here, and other photographs under the names that the first
    questions of larger haystacks give; beside it those questions, entries as they stand in the official files."""
    source, root = shared / "vhs_official", tmp_path_factory.mktemp("official")
    shutil.copytree(source / "needles", root / "coco")
    photographs = sorted((shared / "coco_slice/val2017").iterdir())
    for file, name, few in ((SINGLE, "oracle", None), (SINGLE, "10", 4), (MULTI, "5", 6)):
        entries = json.loads((source / file / f"visual_haystack_{name}.json").read_text())
        here = (
            [e for e in entries if (root / "coco" / e["pos_image"][0]).is_file()]
            if few is None
            else entries[:few]
        )
        for at, path in enumerate(p for e in here for p in (*e["pos_image"], *e["neg_image"])):
            place = root / "coco" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                shutil.copy(photographs[at % len(photographs)], place)
                place.chmod(0o644)
        (root / file).mkdir(parents=True, exist_ok=True)
        (root / file / f"visual_haystack_{name}.json").write_text(json.dumps(here))
    return root


def evaluate(micro_file, family, coco, questions, out, *more):
    words = [
        "--config",
        str(micro_file),
        "--student-name",
        "small",
        "--method",
        "base",
        "--model",
        str(family["small"]),
    ]
    words += ["--coco", str(coco), "--questions", str(questions), "--out", str(out), "--device", "cpu", *more]
    return main(["evaluate", *words])


def test_a_folder_of_official_files(official, micro_file, family, tmp_path, capsys):
    """Sizes from the oracle on; a cell each, of the answers that the file wants."""
    out = tmp_path / "small/base"
    assert evaluate(micro_file, family, official / "coco", official / SINGLE, out, "--sizes", "1", "10") == 0
    printed = capsys.readouterr().out.splitlines()
    for line, size, name in zip(printed, (1, 10), ("oracle", "10"), strict=True):
        entries = json.loads((official / SINGLE / f"visual_haystack_{name}.json").read_text())
        cell = read_cell(out / f"{size}.json")
        assert cell["n"] == len(entries) and cell["size"] == size and cell["compliance"] == 1.0
        assert Counter(a["label"] for a in cell["answers"]) == Counter(
            e["conversations"][1]["value"] for e in entries
        )
        assert not [name for name in cell["provenance"]["data"] if name.startswith("annotations")]
        mean, spread = official_bootstrap(cell["answers"])["accuracy"]
        assert f"small base: {size} images" in line
        assert (
            f"as the official runner: accuracy {100 * mean:.2f}% ± {100 * spread:.2f}%, compliance 100.00% ± 0.00%"
            in line
        )


def test_one_file_says_its_own_size(official, micro_file, family, tmp_path):
    out = tmp_path / "small/base"
    assert (
        evaluate(micro_file, family, official / "coco", official / MULTI / "visual_haystack_5.json", out) == 0
    )
    assert read_cell(out / "5.json")["n"] == 6
    needles = {len(a["needles"]) for a in read_cell(out / "5.json")["answers"]}
    assert needles <= {2, 3}


def test_prompt_and_order_of_the_official_runner(official, micro, family):
    """Its words, all images before them; its shuffle, but from a seed."""
    evaluator = Evaluator(
        load_with_method(micro, "base", family["small"], None), official / "coco", micro.evaluation
    )
    for file in (official / SINGLE / "visual_haystack_10.json", official / MULTI / "visual_haystack_5.json"):
        entry = json.loads(file.read_text())[0]
        question = read_questions(file)[0]
        (asked,) = evaluator.ask([question])
        text = evaluator.processor.tokenizer.decode(asked.prompt.ids)
        wanted = "You are given a set of images. Please answer the following question in Yes or No: "
        wanted += entry["conversations"][0]["value"]
        assert text.partition("<|im_start|>user\n")[2].endswith(
            f"<|vision_end|>{wanted}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert sorted(asked.paths) == sorted(entry["pos_image"] + entry["neg_image"])
        orders = {tuple(ordered_images(question, seed)[0]) for seed in range(5)}
        assert tuple(asked.paths) in orders and len(orders) > 1


def test_missing_images_are_counted_before_anything_is_loaded(shared, micro_file, family, tmp_path, capsys):
    file = shared / "vhs_official" / SINGLE / "visual_haystack_oracle.json"
    named = {path for q in read_questions(file) for path in q.needles}
    there = sum((shared / "coco_slice" / path).is_file() for path in named)
    assert evaluate(micro_file, family, shared / "coco_slice", file, tmp_path / "small/base") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not any(tmp_path.iterdir())
    assert f"{len(named) - there} of the {len(named)} images that " in error
    assert (
        f"laid data --config config.yaml configs/paper.yaml --out {shared / 'coco_slice'} --questions {file}"
        in error
    )


def test_a_folder_needs_sizes(official, micro_file, family, tmp_path, capsys):
    assert evaluate(micro_file, family, official / "coco", official / SINGLE, tmp_path / "small/base") == 2
    assert "give the sizes with --sizes, or name one file" in capsys.readouterr().err
