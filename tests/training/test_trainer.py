"""One run of each method: what it trains, writes and exports."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from laid.io import read_json
from laid.methods.registry import load_with_method
from laid.models.forward import last_logits
from laid.models.loading import load_model
from laid.training.recipe import train
from trainer_runs import CLOSE, METHODS, Finished, bytes_of, changed


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_and_leaves_its_folder(runs, micro, method):
    run = runs(method)
    assert run.record == read_json(run.out / "run.json") and run.record["steps"] == len(run.log) == 6
    assert (run.logits - run.before).abs().max() > 1e-2
    assert {p.name for p in run.out.iterdir()} == {"model", "log.jsonl", "run.json", "learned.json"}
    assert {p.name for p in run.out.parent.iterdir()} == {"seed0", "seed0.cost.json"}
    lambdas = {part: getattr(micro.methods[method], f"lambda_{part}") for part in ("sft", "kl", "laid")}
    for line in run.log:
        parts = {part for part in lambdas if f"loss_{part}" in line}
        assert parts == {part for part, weight in lambdas.items() if weight > 0}
        assert line["loss"] == pytest.approx(sum(lambdas[p] * line[f"loss_{p}"] for p in parts), abs=1e-5)
        assert all(line[f"lambda_{p}"] == lambdas[p] for p in parts) and line["grad_norm"] > 0
    assert [line["step"] for line in run.log] == [1, 2, 3, 4, 5, 6]
    assert run.log[0]["lr"] == micro.methods[method].lr > run.log[-1]["lr"]  # one step of warm-up, then down


@pytest.mark.parametrize("method", ["sft", "kd", "laid"])
def test_the_export_says_what_the_trained_model_said(runs, micro, family, method):
    """Adapter merged, gain folded: the same logits."""
    run = runs(method)
    loaded = load_with_method(micro, method, family["small"], run.out)
    with torch.no_grad():
        torch.testing.assert_close(last_logits(loaded.model, run.inputs), run.logits, **CLOSE)


def test_the_gain_folds_into_rows_of_q_proj(runs, micro, family):
    """q_proj's rows by hand: trained row x exp(g of its head and frequency)."""
    run = runs("laid_wo_kl")
    gain = run.t.lesson.gain
    exported = dict(load_with_method(micro, "laid_wo_kl", family["small"], run.out).model.named_parameters())
    assert gain.log_gain.abs().max() > 1e-3
    for layer in range(2):
        for kind in ("weight", "bias"):
            name = f"model.language_model.layers.{layer}.self_attn.q_proj.{kind}"
            for row in range(32):
                head, frequency = row // 16, row % 8
                factor = gain.log_gain[layer, head, frequency].exp()
                torch.testing.assert_close(
                    exported[name][row], run.weights[name][row] * factor, rtol=1e-5, atol=1e-7
                )
        name = f"model.language_model.layers.{layer}.self_attn.k_proj.weight"
        assert torch.equal(exported[name], run.weights[name])


def test_sft_is_an_adapter_of_the_language_model_alone(runs):
    folder = runs("sft").out / "model"
    assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and all(".language_model.layers." in n and "lora_" in n for n in names)
    assert len(names) == 2 * 2 * 7  # A and B, two layers, seven projections
    assert all(p.suffix not in (".bin", ".pt", ".pth", ".pkl") for p in folder.rglob("*"))


@pytest.mark.parametrize("method", ["kd", "laid", "laid_plus"])
def test_other_students_are_plain_checkpoints(runs, family, method):
    """transformers alone loads them: the same tensors as the student's, no more weights, no hook."""
    run = runs(method)
    plain, report = AutoModelForImageTextToText.from_pretrained(run.out / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = load_model(family["small"])
    assert [(n, p.shape) for n, p in plain.named_parameters()] == [
        (n, p.shape) for n, p in before.named_parameters()
    ]
    for (name, a), (_, b) in zip(plain.named_parameters(), before.named_parameters()):
        assert torch.equal(a, b) == ("visual" in name), (
            name
        )  # the vision tower is as it was, all else has moved
    with torch.no_grad():
        torch.testing.assert_close(last_logits(plain.eval(), run.inputs), run.logits, **CLOSE)


def test_what_was_learned_is_written(runs):
    learned = read_json(runs("laid").out / "learned.json")
    shapes = {name: list(torch.tensor(value).shape) for name, value in learned.items()}
    assert shapes == {"alignment.1-2.w": [2, 4], "gain.log_gain": [2, 2, 8]}
    assert torch.tensor(learned["gain.log_gain"]).abs().max() > 1e-3
    assert runs("laid").log[-1]["gain_max"] != 1.0


def test_gain_and_adapter_together_export_what_was_trained(micro, start, family, tmp_path):
    lora = micro.methods["sft"].lora
    config = changed(micro, None, "laid", lora=lora)
    run = Finished(start(config, "laid", tmp_path / "seed0"))
    assert any("lora_" in name for name in run.weights) and run.log[-1]["gain_max"] != 1.0
    with torch.no_grad():
        loaded = load_with_method(config, "laid", family["small"], run.out)
        torch.testing.assert_close(last_logits(loaded.model, run.inputs), run.logits, **CLOSE)


@pytest.mark.parametrize("method", ["laid", "sft"])
def test_the_same_run_elsewhere_gives_the_same_bytes_and_another_seed_others(
    micro, start, runs, family, tmp_path, method
):
    """No path, clock, or state of random numbers gets into a run's folder."""
    import shutil

    first = runs(method)
    student = shutil.copytree(family["small"], tmp_path / "elsewhere")
    torch.rand(5)
    again = start(micro, method, tmp_path / "again/seed0", student=student)
    other = start(micro, method, tmp_path / "other/seed1", seed=1)
    for run in (again, other):
        train(run)
    assert bytes_of(tmp_path / "again/seed0") == bytes_of(first.out)
    weights = "model/adapter_model.safetensors" if method == "sft" else "model/model.safetensors"
    assert bytes_of(tmp_path / "other/seed1")[weights] != bytes_of(first.out)[weights]
    for name, content in bytes_of(first.out).items():
        for path in (family["small"], first.out.parent, tmp_path):
            assert str(path).encode() not in content, name
