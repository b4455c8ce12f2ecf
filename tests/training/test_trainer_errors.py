"""Wrong inputs and broken runs are told in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_a_cache_with_a_flipped_bit_is_found_before_the_first_step(micro, start, cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "cache")
    shard = min(other.glob("shard-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    refused(
        "changed since it was written; make the", start, micro, "kd", tmp_path / "seed0", teacher_cache=other
    )


@pytest.mark.parametrize("files", [["notes.txt"], ["model/mine.txt"], ["run.json", "notes.txt"]])
def test_a_folder_of_other_things_is_not_replaced(micro, start, tmp_path, files):
    out = tmp_path / "seed0"
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).touch()
    refused("is not an earlier result of this verb", start, micro, "sft", out)
    assert all((out / file).is_file() for file in files)


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


def renamed(weights):
    weights[min(weights).replace("layers.0", "layers.7")] = weights.pop(min(weights))


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda w: w.pop(min(w)), "lacks 1 of the tensors that adapter_config.json describes"),
        (lambda w: w.update(more=torch.zeros(2)), "has unknown 1 of the tensors .*, first more"),
        (renamed, "lacks 1 of the tensors"),
        (lambda w: w.update({n: t.int() for n, t in w.items()}), "is I32, weights are"),
        (lambda w: w.update({min(w): w[min(w)][:1].clone()}), "cannot be loaded: .*size mismatch"),
        (lambda w: w.clear(), "lacks "),
    ],
    ids=["missing", "extra", "renamed", "integer", "shape", "empty"],
)
def test_an_adapter_of_other_tensors_is_not_taken_for_the_trained_one(
    micro, family, runs, tmp_path, edit, says
):
    run = shutil.copytree(runs("sft").out, tmp_path / "seed0")
    file = run / "model/adapter_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LaidError, match=says) as caught:
        load_with_method(micro, "sft", family["small"], run)
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [[], {}, {"peft_type": "PROMPT_TUNING"}, {"peft_type": "LORA", "r": "two"}])
def test_an_adapter_s_configuration_of_another_kind_is_one_line(micro, family, runs, tmp_path, said):
    run = shutil.copytree(runs("sft").out, tmp_path / "seed0")
    (run / "model/adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(LaidError, match="seed0/model") as caught:
        load_with_method(micro, "sft", family["small"], run)
    assert "\n" not in str(caught.value)
