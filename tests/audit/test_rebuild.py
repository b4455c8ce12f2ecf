"""laid verify, verify --rebuild and explain on results that the verbs themselves made: data, models, run, cells."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from chain import build
from laid.audit.lineage import Lineage
from laid.cli import main
from laid.io import read_json, sha256_json, write_json
from laid.settings import load, merge

CELL = "results/micro/cells/test/small/laid/2.json"


@pytest.fixture(scope="module")
def made(micro_file, tmp_path_factory):
    top = tmp_path_factory.mktemp("chain")
    values = yaml.safe_load(micro_file.read_text())
    build(top, values | {"data": {"rendered": {"train": 160, "val": 100}}}, {"small/laid": [1, 2]})
    return top


@pytest.fixture
def tree(made, tmp_path, monkeypatch, capsys):
    """A copy of `made` that a test may change, with the current folder at its top."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    capsys.readouterr()
    return tmp_path / "copy/results/micro"


def test_a_cell_is_rebuilt_from_its_inputs_alone(tree, capsys):
    """Other cells, logs, the teacher and its cache are away: a cell's inputs are images, questions, model, run."""
    for name in ("teacher_cache", "models/teacher", "haystacks/train.json", "cells/test/small/laid/1.json"):
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
        (CELL.replace("2.json", "5.json"), "no such file; `snakemake --cores all` with this path makes it"),
        (CELL.replace("2.json", "3.json"), "the configuration has no size 3; it has 1, 2, 5"),
        (
            CELL.replace("/laid/", "/lade/"),
            "the configuration has no method lade; it has base, yarn, self_extend, ",
        ),
        (CELL.replace("/small/", "/tiny/"), "the configuration has no model tiny; it has teacher, small"),
        (
            "results/micro/cells/test/small/laid/cost.json",
            "not a cell; expected results/micro/cells/<suite>/<student>",
        ),
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


def test_a_flipped_bit_in_the_teacher_s_cache_is_found(tree, capsys):
    shard = tree / "teacher_cache/train/shard-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["verify", CELL]) == 1
    assert f"stale: {CELL}: results/micro/runs/small/laid/seed0: " in (told := capsys.readouterr().out)
    assert "shard-00000.safetensors: changed since it was written" in told


def test_another_name_for_a_model_s_size_is_found(tree, capsys):
    cell = read_json(CELL)
    label, cell["label"] = cell["label"], "9K"
    cell["digest"] = sha256_json({key: value for key, value in cell.items() if key != "digest"})
    write_json(CELL, cell)
    assert main(["verify", CELL]) == 1
    assert f"stale: {CELL}: label is {label!r} now, was '9K'" in capsys.readouterr().out


def test_a_comment_and_an_unrelated_key_change_nothing(tree, capsys):
    values = yaml.safe_load(Path("config.yaml").read_text())
    values |= {"seeds": 3, "resources": {"evaluate": {"mem_mb": 9999}}}
    values["methods"]["sft"]["lr"] = 0.5
    Path("config.yaml").write_text("# another comment\n" + yaml.safe_dump(values))
    assert main(["verify", CELL]) == 0
    values["methods"]["laid"]["lambda_laid"] = 0.25
    Path("config.yaml").write_text(yaml.safe_dump(values))
    assert main(["verify", CELL]) == 1
    assert f"stale: {CELL}: methods.laid.lambda_laid is 0.25 now, was 0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"hard_negatives": 0.1},
        {"seed": 5},
        {"train": {"questions": 12}},
        {"test": {"questions": 8}},
        {"validation": {"share": 0.4}},
        {"validation": {"questions": 6}},
        {"test": {"sizes": [1, 2, 3]}},
    ],
)
def test_a_setting_of_the_questions_makes_stale_just_what_it_changes(tree, capsys, changes):
    """What verify says of a setting, against the bytes of the questions that are made with it."""
    values = yaml.safe_load(Path("config.yaml").read_text())
    Path("config.yaml").write_text(yaml.safe_dump(merge(values, {"haystacks": changes})))
    assert main(["haystacks", "--coco", str(tree / "coco"), "--out", "anew"]) == 0
    lineage = Lineage(load(["config.yaml"]))
    for part, name in (
        ("train", "train.json"),
        ("test", "test/visual_haystack_2.json"),
        ("validation", "validation/visual_haystack_2.json"),
    ):
        same = Path("anew", name).read_bytes() == (tree / "haystacks" / name).read_bytes()
        assert same == (lineage.problems(lineage.haystacks(part)) == []), (part, changes)
    capsys.readouterr()
    found = main(["verify", CELL])
    said = capsys.readouterr().out
    assert ("results/micro/haystacks: haystacks." in said) == bool(found)


def test_a_setting_of_the_images_makes_the_cells_stale(tree, capsys):
    values = yaml.safe_load(Path("config.yaml").read_text())
    Path("config.yaml").write_text(yaml.safe_dump(merge(values, {"data": {"rendered": {"seed": 9}}})))
    assert main(["verify", CELL]) == 1
    assert "results/micro/coco: data.rendered.seed is 9 now, was 0" in capsys.readouterr().out


def test_results_from_before_data_left_a_record_are_known_by_their_hashes(tree, capsys):
    for folder in ("coco", "haystacks"):
        (tree / folder / "laid.json").unlink()
    assert main(["verify", CELL]) == 0
    (tree / "haystacks/train.json").write_text("[]")
    assert main(["verify", CELL]) == 1 and "input questions" in capsys.readouterr().out


RECORDS = (
    "runs/small/laid/seed0/run.json",
    "models/small/laid.json",
    "teacher_cache/train/index.json",
    "haystacks/laid.json",
)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("code",), True),
        (("libraries",), "2.0"),
        (("config",), {"a": 1}),
        (("data",), 3),
        (("settings",), [1]),
        (("code", "commit"), 5),
        (("data", "annotations_train2017"), 10**30),
        ((), [[1]]),
    ],
)
def test_a_record_changed_by_hand_is_one_line(tree, capsys, name, keys, value):
    content = read_json(tree / name)
    inner = content
    for key in ("provenance", *keys)[:-1]:
        inner = inner[key]
    inner[("provenance", *keys)[-1]] = value
    (tree / name).write_text(json.dumps(content))
    status = main(["verify", CELL])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert status in (0, 1) and not said.err and len(lines) <= 4 and all(": " in line for line in lines)
    assert status == 0 or name.removesuffix("/run.json").removesuffix("/laid.json") in said.out
    assert main(["explain", CELL]) == 0


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "{}", '{"provenance": {}}'])
@pytest.mark.parametrize("name", RECORDS)
def test_what_is_no_record_is_one_line(tree, capsys, name, text):
    (tree / name).write_text(text)
    assert main(["verify", CELL]) == 1
    said = capsys.readouterr()
    assert name in said.out and not said.err
    assert main(["explain", CELL]) == 0


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
