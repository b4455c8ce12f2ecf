"""laid verify, verify --rebuild and explain on results that the verbs themselves made: data, models, run, cells."""

import shutil
from pathlib import Path

import pytest
import yaml

from laid.cli import main
from laid.io import read_json

CELL = "results/micro/cells/small/laid/2.json"


@pytest.fixture(scope="module")
def made(micro_file, coco_root, tmp_path_factory):
    """The chain from images to the cells small/laid/{1,2}, each step by its verb, as the rules call it."""
    import torch

    top = tmp_path_factory.mktemp("chain")
    root = "results/micro"
    shutil.copytree(coco_root, top / root / "coco")
    shutil.copy(micro_file, top / "config.yaml")
    student = f"--student-name small --coco {root}/coco --device cpu"
    commands = (
        f"haystacks --coco {root}/coco --out {root}/haystacks",
        f"pretrain --member teacher --coco {root}/coco --out {root}/models/teacher",
        f"pretrain --member small --coco {root}/coco --out {root}/models/small",
        (
            f"teacher-cache --teacher {root}/models/teacher --questions {root}/haystacks/train.json --out {root}/teacher_cache"
            f" --coco {root}/coco --device cpu"
        ),
        (
            f"train --method laid --student {root}/models/small --teacher-cache {root}/teacher_cache"
            f" --questions {root}/haystacks/train.json --out {root}/runs/small/laid/seed0 {student}"
        ),
        (
            f"evaluate --method laid --model {root}/models/small --runs {root}/runs/small/laid/seed0 --sizes 1 2"
            f" --questions {root}/haystacks/test --out {root}/cells/small/laid {student}"
        ),
    )
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        for command in commands:
            assert main(command.split()) == 0, command
    yield top
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def tree(made, tmp_path, monkeypatch, capsys):
    """A copy of `made` that a test may change, with the current folder at its top."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    capsys.readouterr()
    return tmp_path / "copy/results/micro"


def test_a_cell_is_rebuilt_from_its_inputs_alone(tree, capsys):
    """Other cells, logs, the teacher and its cache are away: a cell's inputs are images, questions, model, run."""
    for name in ("teacher_cache", "models/teacher", "haystacks/train.json", "cells/small/laid/1.json"):
        path = tree / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    assert main(["verify", "--rebuild", CELL, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{CELL}: rebuilt, identical byte for byte\n"
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_a_rebuild_tells_what_another_student_answers(tree, capsys):
    """The weights of the run are changed behind the record's back: stale, and the answers differ."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = next((tree / "runs/small/laid/seed0/model").glob("*.safetensors"))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    assert main(["verify", CELL]) == 1
    assert (
        f"stale: {CELL}: input run_seed0 (results/micro/runs/small/laid/seed0/model) is "
        in capsys.readouterr().out
    )
    assert main(["verify", "--rebuild", CELL, "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "of 10 answers differ" in said and said.endswith(f"{CELL}: NOT the same result\n")


def test_a_tampered_number_comes_out(tree, capsys):
    text = Path(CELL).read_text()
    accuracy = read_json(CELL)["accuracy"]
    Path(CELL).write_text(text.replace(f'"accuracy": {accuracy}', '"accuracy": 0.99'))
    assert main(["verify", CELL]) == 1
    assert f"tampered: {CELL}: accuracy says 0.99, its answers give {accuracy}" in capsys.readouterr().out
    assert main(["verify", "--rebuild", CELL, "--device", "cpu"]) == 1
    assert f"accuracy was 0.99, is {accuracy} rebuilt" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["verify --rebuild", "explain"])
@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (CELL.replace("2.json", "3.json"), "no such file"),
        ("results/micro/cells/small/laid/cost.json", "not a cell; expected results/micro/cells/<student>"),
        (CELL, "not valid JSON, line "),
    ],
)
def test_no_cell_or_half_of_one_is_one_line(tree, capsys, verb, cell, said):
    text = Path(CELL).read_text()
    Path(CELL).write_text(text[: len(text) // 2])
    assert main([*verb.split(), cell]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"laid {verb.split()[0]}: error: {cell}: {said}")


def test_a_comment_and_an_unrelated_key_change_nothing(tree, capsys):
    values = yaml.safe_load(Path("config.yaml").read_text())
    values |= {"seeds": 3, "resources": {"evaluate": {"mem_mb": 9999}}}
    values["methods"]["sft"]["lr"] = 0.5
    values["haystacks"]["long"]["questions"] = 9
    Path("config.yaml").write_text("# another comment\n" + yaml.safe_dump(values))
    assert main(["verify", CELL]) == 0
    values["methods"]["laid"]["lambda_laid"] = 0.25
    Path("config.yaml").write_text(yaml.safe_dump(values))
    assert main(["verify", CELL]) == 1
    assert f"stale: {CELL}: methods.laid.lambda_laid is 0.25 now, was 0.3" in capsys.readouterr().out


def test_explain_names_every_step_down_to_the_images(tree, capsys):
    assert main(["explain", CELL]) == 0
    said = capsys.readouterr().out
    for part in (
        CELL, "10 questions of 2 images", "made by `laid evaluate`", "results/micro/haystacks/test/visual_haystack_2.json",
        "image files below results/micro/coco", "made by `laid train`", "made by `laid teacher-cache`",
        "results/micro/models/teacher", "made by `laid pretrain`", "annotations/instances_train2017.json: 160 images",
    ):  # fmt: skip
        assert part in said
    assert said.endswith("\nsound\n")
