"""Wrong inputs and broken runs are told in one line."""

import json

import pytest
import torch

from laid.data.questions import read_questions, write_questions
from laid.errors import LaidError
from laid.io import sha256_folder
from laid.methods.registry import load_with_method
from laid.training.recipe import load_student, train
from trainer_runs import changed


def refused(match, start, *args, **options):
    with pytest.raises(LaidError, match=match) as caught:
        train(start(*args, **options))
    assert "\n" not in str(caught.value)


def test_wrong_inputs_are_one_line(micro, start, cache, haystacks, tmp_path, family):
    out = tmp_path / "seed0"
    refused("'yarn' is not a trained method; trained methods: sft, kd, ", start, micro, "yarn", out)
    refused("'best' is not a trained method", start, micro, "best", out)
    refused(
        "method kd learns from the teacher \\(kl\\): give --teacher-cache",
        start,
        micro,
        "kd",
        out,
        teacher_cache=None,
    )
    nothing = changed(micro, None, "sft", lambda_sft=0.0)
    refused("every lambda is 0, there is nothing to train", start, nothing, "sft", out)
    refused("24 questions do not fill one batch of 32", start, changed(micro, {"batch_size": 32}), "sft", out)
    deep = changed(micro, None, "laid", alignment={"pairs": [[5, -1]]})
    refused("layer 5 does not exist: the model has 2 layers", start, deep, "laid", out)
    absent = changed(micro, None, "laid", alignment={"pairs": [[0, 0]]})
    refused("holds teacher layers \\[2\\], layer 0 is asked for", start, absent, "laid", out)
    write_questions(tmp_path / "less.json", read_questions(haystacks / "train.json")[:16])
    refused("was made from other questions", start, micro, "kd", out, questions=tmp_path / "less.json")
    refused("no such checkpoint folder", start, micro, "sft", out, student=tmp_path / "none")
    refused("an adapter holds no vision tower", start, changed(micro, {"train_vision": True}), "sft", out)
    assert not out.exists()


def test_a_teacher_that_sees_other_tokens_is_refused(micro, start, cache, tmp_path):
    import shutil

    other = shutil.copytree(cache, tmp_path / "cache")
    index = json.loads((other / "index.json").read_text())
    index["lengths"][2] += 1
    index["lengths"][3] -= 1
    (other / "index.json").write_text(json.dumps(index))
    refused(
        "do not see the same tokens: question 2 has",
        start,
        micro,
        "kd",
        tmp_path / "seed0",
        teacher_cache=other,
    )


def test_a_loss_that_is_no_number_ends_the_run_and_writes_nothing(micro, start, tmp_path, monkeypatch):
    def broken(run, device):
        model = load_student(run, device)
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr("laid.training.recipe.load_student", broken)
    with pytest.raises(
        LaidError, match="small kd seed 0: the loss is nan at step 1 of 6; lower the learning rate"
    ):
        train(start(micro, "kd", tmp_path / "seed0"))
    assert not list(tmp_path.iterdir())


def test_an_unfinished_or_pickled_run_is_not_loaded(micro, family, runs, tmp_path):
    import shutil

    run = shutil.copytree(runs("sft").out, tmp_path / "seed0")
    fingerprint = sha256_folder(run)
    (run / "model/adapter_model.safetensors").rename(run / "model/adapter_model.bin")
    with pytest.raises(LaidError, match="no adapter_model.safetensors"):
        load_with_method(micro, "sft", family["small"], run)
    assert fingerprint != sha256_folder(run)
    (run / "model/adapter_model.bin").rename(run / "model/adapter_model.safetensors")
    file = run / "model/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(LaidError, match="cannot be loaded") as caught:
        load_with_method(micro, "sft", family["small"], run)
    assert "\n" not in str(caught.value)
