"""laid verify and laid explain on a small tree of results whose every file a test may change."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from laid import provenance
from laid.audit.lineage import Lineage, changed_settings
from laid.audit.rebuild import differences
from laid.cli import main
from laid.data.questions import Question, haystack_file, ordered_images, write_questions
from laid.evaluation.cells import make_cell, write_cell
from laid.io import read_json, sha256_json, write_json
from laid.settings import load, merge

TOP = Path(__file__).resolve().parents[2]
LINK = {"cell": "cells/test/small/sft/2.json", "run": "runs/small/sft/seed0", "model": "models/small"}


@pytest.fixture
def tree(tmp_path, built, monkeypatch):
    """A copy of `built`, with the current folder at its top."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results/mini"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Results of one student, methods base and sft, one size; records made by the functions that steps call."""
    tmp_path = tmp_path_factory.mktemp("lineage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        make_results(tmp_path)
    return tmp_path


def make_results(tmp_path):
    overlay = {
        "scale": "mini",
        "models": {"students": ["small"]},
        "haystacks": {"test": {"sizes": [2]}, "validation": {"sizes": [2]}},
        "training": {"validation": {"questions": 1}},
        "beyond": {"table": False},
        "methods": {"sft": {}},
        "tables": {"methods": ["base", "sft"], "ablations": ["base"]},
    }
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(overlay))
    settings = load([TOP / "config.yaml", tmp_path / "over.yaml"])
    root = tmp_path / "results/mini"
    lineage = Lineage(settings)
    for split in ("train2017", "val2017"):
        images = [{"id": i, "file_name": f"{i}.png", "width": 4, "height": 4} for i in range(3)]
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        objects = [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0}
            for i in range(3)
        ]
        write_json(
            root / f"coco/annotations/instances_{split}.json",
            {"images": images, "categories": categories, "annotations": objects},
        )
        (root / f"coco/{split}").mkdir()
        for i in range(3):
            (root / f"coco/{split}/{i}.png").write_bytes(b"picture %d" % i)
    asked = [
        Question(
            str(k),
            "For the image with a cat, is there a dog?",
            answer,
            "cat",
            "dog",
            (f"val2017/{k}.png",),
            ("val2017/2.png",),
        )
        for k, answer in enumerate(("yes", "no"))
    ]
    write_questions(haystack_file(root / "haystacks/test", 2), asked)
    trained = [
        replace(q, needles=(f"train2017/{k}.png",), distractors=("train2017/2.png",))
        for k, q in enumerate(asked)
    ]
    write_questions(root / "haystacks/train.json", trained)
    write_questions(haystack_file(root / "haystacks/validation", 2), trained)

    def record(step, names, **wildcards):
        where = {"train": lineage.run, "evaluate": partial(lineage.cell, "test")}
        made = where[step](*wildcards.values()) if step in where else lineage.member(wildcards["member"])
        inputs = {name: lineage.inputs_of(made, name)[0] for name in names}
        return provenance.collect(step, settings, inputs, **wildcards)

    for member in ("teacher", "small"):
        (root / f"models/{member}").mkdir(parents=True)
        (root / f"models/{member}/model.safetensors").write_bytes(member.encode())
        write_json(
            root / f"models/{member}/laid.json",
            {"window": 4, "provenance": record("pretrain", ["annotations", "images"], member=member)},
        )
    run = root / LINK["run"]
    (run / "model").mkdir(parents=True)
    (run / "model/adapter.safetensors").write_bytes(b"adapter")
    names = ["questions", "images", "student", "validation_0", "validation_images"]
    trained = record("train", names, student="small", method="sft", seed=0)
    assert lineage.inputs_of(lineage.run("small", "sft", 0), "validation_images")[0][1] == [
        "train2017/0.png",
        "train2017/2.png",
    ]
    write_json(run / "run.json", {"steps": 7, "final": {"loss": 0.25}, "provenance": trained})
    for student, method in (("teacher", "base"), ("small", "base"), ("small", "sft")):
        names = ["questions", "images", "model", "annotations_val2017"] + ["run_seed0"] * (method == "sft")
        answers = [
            {
                "id": str(k),
                "seed": 0,
                "label": q.answer,
                "answer": "yes",
                "p_yes": 0.75,
                "needles": ordered_images(q)[1],
            }
            for k, q in enumerate(asked)
        ]
        cell = make_cell(
            scale="mini", student=student, label="1K", role="teacher" if student == "teacher" else "student",
            method=method, size=2, answers=answers, tokens_mean=9.0, positions_mean=8.0,
            provenance=record("evaluate", names, student=student, method=method, size=2),
        )  # fmt: skip
        write_cell(root / f"cells/test/{student}/{method}/2.json", cell)


def verify(capsys, *words):
    status = main(["verify", "--config", str(TOP / "config.yaml"), "over.yaml", *words])
    return status, capsys.readouterr().out


def overlay(**changes):
    values = yaml.safe_load(Path("over.yaml").read_text())
    Path("over.yaml").write_text(yaml.safe_dump(merge(values, changes)))


def test_untouched_results_are_sound(tree, capsys):
    status, said = verify(capsys)
    assert (status, said) == (0, "3 cells below results/mini/cells: 3 sound\n")


@pytest.mark.parametrize(
    ("file", "sound", "said"),
    [
        ("haystacks/test/visual_haystack_2.json", 0, "input questions (results/mini/haystacks/test/visual"),
        ("coco/val2017/0.png", 0, "input images (results/mini/coco) is"),
        ("coco/annotations/instances_val2017.json", 0, "input annotations_val2017"),
        ("models/small/model.safetensors", 1, "input model (results/mini/models/small) is"),
        ("runs/small/sft/seed0/model/adapter.safetensors", 2, "input run_seed0 (results/mini/runs/small/sft/seed0/model)"),
        ("haystacks/train.json", 2, "stale: results/mini/cells/test/small/sft/2.json: results/mini/runs/small/sft/seed0: input questions"),
        ("coco/train2017/1.png", 0, "results/mini/models/small: input images (results/mini/coco) is"),  # pretraining's
        ("coco/train2017/0.png", 2, "results/mini/runs/small/sft/seed0: input images (results/mini/coco) is"),  # not its
        ("coco/annotations/instances_train2017.json", 0, "results/mini/models/small: input annotations"),
    ],
)  # fmt: skip
def test_a_changed_input_makes_the_cells_behind_it_stale(tree, capsys, file, sound, said):
    with open(tree / file, "ab") as handle:
        handle.write(b" ")
    status, output = verify(capsys)
    assert status == 1 and said in output
    assert f"3 cells below results/mini/cells: {sound} sound, {3 - sound} stale" in output


@pytest.mark.parametrize("what", ["files", "folders"])
def test_links_in_place_of_results_are_sound(tree, tmp_path, capsys, what):
    """Files as DVC's cache.type symlink leaves them, named by their content; folders that lie on another disk."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if what == "files":
        moved = [path for path in tree.rglob("*") if path.is_file()]
    else:
        moved = [tree / name for name in ("cells", "models", "haystacks", "coco/train2017", "coco/val2017")]
    for k, path in enumerate(moved):
        path.rename(elsewhere / str(k))
        path.symlink_to(elsewhere / str(k))
    status, said = verify(capsys)
    assert (status, said) == (0, "3 cells below results/mini/cells: 3 sound\n")


@pytest.mark.parametrize(
    "file", ["models/small/model.safetensors", "haystacks/train.json", "coco/val2017/1.png"]
)
def test_a_missing_input_is_named(tree, capsys, file):
    (tree / file).unlink()
    status, output = verify(capsys, "--", f"results/mini/{LINK['cell']}")
    assert status == 1 and "1 stale" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("changes", "sound", "said"),
    [
        ({"methods": {"sft": {"lambda_sft": 2.0}}}, 2, "methods.sft.lambda_sft is 2.0 now, was 1.0"),
        (
            {"family": {"members": {"small": {"steps": 9}}}},
            1,
            "models/small: family.members.small.steps is 9 now",
        ),
        ({"training": {"lr": 0.25}}, 2, "runs/small/sft/seed0: training.lr is 0.25 now"),
        ({"seeds": 1, "tables": {"threshold": 0.7}}, 3, "3 sound"),
        ({"resources": {"train": {"mem_mb": 999}}, "data": {"rendered": {"val": 9}}}, 3, "3 sound"),
    ],
)
def test_a_changed_value_matters_where_it_matters(tree, capsys, changes, sound, said):
    overlay(**changes)
    status, output = verify(capsys)
    assert status == (0 if sound == 3 else 1)
    assert said in output and f"cells: {sound} sound" in output


def test_a_tampered_cell_and_a_missing_one(tree, capsys):
    text = (tree / LINK["cell"]).read_text()
    (tree / LINK["cell"]).write_text(text.replace('"accuracy": 0.5', '"accuracy": 0.9'))
    (tree / "cells/test/teacher/base/2.json").unlink()
    status, output = verify(capsys)
    assert status == 1 and "1 sound, 1 tampered, 1 missing" in output
    assert (
        "tampered: results/mini/cells/test/small/sft/2.json: accuracy says 0.9, its answers give 0.5"
        in output
    )
    assert "missing: results/mini/cells/test/teacher/base/2.json" in output


def test_a_half_written_record(tree, capsys):
    record = tree / LINK["run"] / "run.json"
    record.write_text(record.read_text()[:100])
    status, output = verify(capsys)
    assert status == 1 and "not valid JSON" in output and "2 sound, 1 stale" in output


def test_other_records_and_hidden_files_do_not_matter(tree, capsys):
    (tree / "models/small/.snakemake_timestamp").touch()
    (tree / "models/small/pretrain.json").write_text("[]")
    assert verify(capsys)[0] == 0


def test_an_overlay_without_its_base_is_pointed_out(tree, capsys):
    """`snakemake --configfile over.yaml` reads config.yaml below it; `laid --config` reads what it is given."""
    shutil.copy(TOP / "config.yaml", tree.parents[1])
    assert main(["verify", "--config", "over.yaml"]) == 1
    hint = "over.yaml was read alone; over config.yaml, as Snakemake reads it: --config config.yaml over.yaml"
    assert capsys.readouterr().out.splitlines()[-1] == hint
    assert main(["verify", "--config", "config.yaml", "over.yaml"]) == 0
    assert "alone" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", ["nowhere.json", "results/mini/cells/test/small/sft/two.json", "elsewhere/test/small/sft/2.json"]
)
def test_what_is_no_cell(tree, capsys, path):
    assert main(["verify", "--config", str(TOP / "config.yaml"), "over.yaml", "--", path]) == 2
    assert "not a cell" in capsys.readouterr().err


def test_an_input_of_an_unknown_name(tree, capsys):
    record = tree / LINK["run"] / "run.json"
    content = read_json(record)
    content["provenance"]["data"]["moon"] = "0" * 64
    write_json(record, content)
    assert "names an input 'moon' that a train step does not have" in verify(capsys)[1]


def test_a_method_that_the_configuration_has_no_longer(tree):
    """Its runs and cells can still be judged and explained."""
    settings = load([TOP / "config.yaml", Path("over.yaml")])
    lineage, run = Lineage(settings), Lineage(settings).run("small", "gone", 0)
    assert lineage.inputs_of(run, "questions")[0].resolve() == (tree / "haystacks/train.json").resolve()


def test_published_checkpoints_stand_for_themselves(tree):
    settings = load([TOP / "config.yaml", Path("over.yaml")])
    lineage = Lineage(settings.changed({"models": {"checkpoints": {"small": "Qwen/Some-VL"}}}))
    assert lineage.inputs_of(lineage.cell("test", "small", "base", 2), "model") == ("hub:Qwen/Some-VL", None)


def test_explain_walks_from_the_images_to_the_number(tree, capsys):
    words = [
        "explain",
        "--config",
        str(TOP / "config.yaml"),
        "over.yaml",
        "--",
        f"results/mini/{LINK['cell']}",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    hashes = read_json(tree / LINK["cell"])["provenance"]["data"]
    for part in (
        "50.00 %", "1 of 2 answers right", "3 image files below results/mini/coco", "steps 7", "final loss 0.25",
        "results/mini/models/small", "3 images", "training.lr=", *(value[:12] for value in hashes.values()),
    ):  # fmt: skip
        assert part in said
    assert said.rstrip().endswith("sound")
    (tree / "models/small/laid.json").unlink()
    assert main(words) == 0 and "no such file" in capsys.readouterr().out


def flipped(cell):
    for answer in cell["answers"]:
        answer["label"] = {"yes": "no", "no": "yes"}[answer["label"]]


def each(cell, **values):
    for answer in cell["answers"]:
        answer.update(values)


def other_seed(cell):
    each(cell, seed=3)
    cell["seeds"] = [3]


@pytest.mark.parametrize(
    "edit, state, said",
    [
        (lambda c: c.update(interval=[0.25, 0.75]), "tampered", "interval says [0.25, 0.75], its answers give [0.09"),
        (lambda c: c["answers"][0].update(needles=[1]), "tampered", "1 answers have another needles than results/mini/hay"),
        (flipped, "tampered", "2 answers have another label than results/mini/haystacks/test/visual_haystack_2.json, first of question 0"),
        (lambda c: each(c, p_yes=0.25), "tampered", "2 answers contradict their p_yes, first of question 0"),
        (lambda c: c["answers"][0].update(id="7"), "tampered", "its answers are not to the questions of results/mini/hay"),
        (other_seed, "tampered", "seeds says [3], its record names the runs [0]"),
        (lambda c: c.update(role="teacher"), "stale", "role is 'student' now, was 'teacher'"),
        (lambda c: c.update(scale="paper"), "stale", "scale is 'mini' now, was 'paper'"),
    ],
)  # fmt: skip
def test_what_does_not_follow_from_answers_and_questions_is_found_under_a_fitting_digest(
    tree, capsys, edit, state, said
):
    cell = read_json(tree / LINK["cell"])
    edit(cell)
    cell["digest"] = sha256_json({key: value for key, value in cell.items() if key != "digest"})
    write_json(tree / LINK["cell"], cell)
    status, told = verify(capsys)
    assert status == 1 and f"{state}: results/mini/{LINK['cell']}: {said}" in told


def test_changed_settings_name_the_key():
    old, new = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": True}
    assert list(changed_settings(old, new)) == ["a.b is 2 now, was 1", "e is True now, was None"]
    assert list(changed_settings(old, json.loads(json.dumps(old)))) == []


def test_differences_of_a_rebuilt_cell():
    old = {"answers": [1, 2, 3], "provenance": {"code": {"commit": "a"}}, "accuracy": 0.5}
    new = {"answers": [1, 5, 3], "provenance": {"code": {"commit": "b"}}, "accuracy": 0.25}
    assert list(differences(old, new)) == [
        "accuracy was 0.5, is 0.25 rebuilt", "1 of 3 answers differ", "provenance.code.commit was 'a', is 'b' rebuilt",
    ]  # fmt: skip


def test_what_a_run_learned_from_is_followed_to_questions_and_teacher():
    lineage = Lineage(load([TOP / "config.yaml"]), "r")
    run = lineage.run("small", "laid", 0)
    record, made = lineage.inputs_of(run, "teacher_cache")
    assert record == Path("r/teacher_cache/train/index.json")
    for step in (run, made):
        assert lineage.inputs_of(step, "questions")[0] == Path("r/haystacks/train.json")
