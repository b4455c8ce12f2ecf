"""Held-out questions asked while training: what the log says, which student is kept, when it ends, and going on after a kill."""

import json

import pytest
import torch
from test_resume import Boom, boom, watched

from laid.cli import main
from laid.data.questions import haystack_file, read_questions
from laid.errors import LaidError
from laid.evaluation.evaluate import Evaluator
from laid.evaluation.scoring import is_right
from laid.io import read_json
from laid.methods.registry import load_with_method
from laid.models.loading import load_model
from laid.training import recipe
from laid.training.recipe import train
from laid.training.validation import Validation, best
from trainer_runs import bytes_of, changed


@pytest.fixture(scope="module")
def files(haystacks):
    return tuple(haystack_file(haystacks / "test", size) for size in (2, 5))


def with_validation(micro, training=None, **values):
    return changed(micro, {"validation": {"every": 2, "questions": 8, **values}, **(training or {})})


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["sft", "laid"])
def test_the_log_says_what_evaluation_says(micro, start, runs, files, family, coco_root, tmp_path, method):
    """The last validation against the exported student under `laid evaluate`'s own evaluator; training is as without it."""
    run = start(with_validation(micro), method, tmp_path / "seed0", validation=files)
    record, plain = train(run), runs(method)
    log = lines(run.out)
    asked = [line["step"] for line in log if "validation_accuracy" in line]
    assert asked == [2, 4, 6] and record["exported"] == record["steps"] == 6
    evaluator = Evaluator(
        load_with_method(micro, method, family["small"], run.out), coco_root, micro.evaluation
    )
    right = {}
    for file in files:
        questions = read_questions(file)[:8]
        right[questions[0].size] = sum(map(is_right, evaluator.answer(evaluator.ask(questions))))
    for size, count in right.items():
        assert log[-1][f"validation_accuracy_{size}"] == count / 8
    assert log[-1]["validation_accuracy"] == sum(right.values()) / 16
    assert {k: v for k, v in log[-1].items() if "validation" not in k} == plain.log[-1]
    ours, theirs = bytes_of(run.out / "model"), bytes_of(plain.out / "model")
    assert ours == theirs


def scripted(monkeypatch, accuracies):
    """Validations that find these accuracies, whatever the student says; returns the student's weights at each."""
    seen, found = [], iter(accuracies)

    def line(self, scores):
        return {"validation_accuracy": next(found)}

    real = Validation.measure

    def measure(self, student, model):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return real(self, student, model)

    monkeypatch.setattr(Validation, "_line", line)
    monkeypatch.setattr(Validation, "measure", measure)
    return seen


def test_the_best_student_is_exported_and_patience_ends_the_run(micro, start, files, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [0.5, 0.75, 0.5, 0.75])
    config = with_validation(micro, {"epochs": 4}, export="best", patience=2)
    run = start(config, "kd", tmp_path / "seed0", validation=files[:1])
    record = train(run)
    assert (record["steps"], record["exported"], record["best"]["validation_accuracy"]) == (8, 4, 0.75)
    assert [line["step"] for line in lines(run.out)] == list(range(1, 9)) and len(seen) == 4
    weights = dict(load_model(run.out / "model").named_parameters())
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[name], seen[1][name]) and not torch.equal(seen[1][name], seen[3][name])


@pytest.mark.parametrize(("method", "at"), [("laid", 3), ("sft", 6)])
def test_a_run_that_was_killed_knows_its_best(micro, start, files, tmp_path, monkeypatch, method, at):
    """Same bytes, whether that was between two validations or after the last one, in the export."""
    config = with_validation(
        micro, {"checkpoint_minutes": 1e-9, "epochs": 3}, export="best", patience=1, questions=1
    )
    for folder in ("a", "b"):
        scripted(monkeypatch, [0.25, 0.75, 0.5])
        run = start(config, method, tmp_path / folder / "seed0", validation=files[:1])
        if folder == "b":
            with monkeypatch.context() as patch:
                if at < 6:
                    watched(patch, at, boom)
                else:
                    patch.setattr(recipe, "_export", lambda *_: boom())
                with pytest.raises(Boom):
                    train(run)
            scripted(monkeypatch, [0.75, 0.5] if at == 3 else [0.5])
        assert train(run)["exported"] == 4
    assert bytes_of(tmp_path / "a/seed0") == bytes_of(tmp_path / "b/seed0")


def test_best_is_the_highest_then_the_likeliest_then_the_first():
    log = [
        {"step": k, "validation_accuracy": a, "validation_likelihood": b}
        for k, (a, b) in enumerate([(0.5, -1), (0.5, -0.5), (0.5, -0.5), (0.4, 0)])
    ]
    assert best([{"step": 9}, *log])["step"] == 1


def test_what_does_not_go_together_is_one_line(micro, start, files, tmp_path):
    for config, given, says in (
        (with_validation(micro), (), "training.validation is set: give files of held-out questions"),
        (micro, files, "the configuration asks nothing: set training.validation"),
    ):
        with pytest.raises(LaidError, match=says):
            train(start(config, "sft", tmp_path / "seed0", validation=given))
    with pytest.raises(LaidError, match="7 is not among haystacks.validation.sizes, 2"):
        with_validation(micro, sizes=[7])
    with pytest.raises(LaidError, match="set training.parallel to fsdp2"):
        with_validation(micro, {"parallel": "zero3"})


def test_laid_distill_exports_the_best_by_its_held_out_questions(
    micro_file, family, haystacks, coco_root, files, tmp_path, capsys
):
    out = tmp_path / "mine"
    words = [
        "distill", "--config", str(micro_file), "--teacher", str(family["teacher"]), "--student", str(family["small"]),
        "--data", str(haystacks / "train.json"), "--coco", str(coco_root), "--device", "cpu", "--method", "kd",
        "--out", str(out),
    ]  # fmt: skip
    assert main([*words, "--patience", "1"]) == 2 and "give those too" in capsys.readouterr().err
    assert main([*words, "--eval", str(files[1]), "--validate-every", "2", "--patience", "1"]) == 0
    record, run = read_json(out / "distill.json"), read_json(out / "run.json")
    right, n = record["accuracy"]["after"]["5"]
    assert (
        run["best"]["validation_accuracy_5"] == right / n and record["validation"]["step"] == run["exported"]
    )
    assert f"this model is that of step {run['exported']}" in (out / "model/README.md").read_text()
