import copy
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from laid.data.questions import read_questions, write_questions
from laid.distill.teacher_cache import build_cache
from laid.distill.trainer import Trainer
from laid.errors import LaidError
from laid.io import read_json, sha256_folder
from laid.methods.registry import load_with_method
from laid.models.forward import last_logits
from laid.models.loading import load_model

METHODS = ("sft", "kd", "laid", "laid_wo_kl", "laid_wo_laid")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def cache(micro, family, coco_root, haystacks, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "teacher_cache"
    build_cache(micro, family["teacher"], coco_root, haystacks / "train.json", out)
    return out


@pytest.fixture(scope="module")
def start(family, coco_root, haystacks, cache):
    """start(config, method, out, ...): a Trainer, ready to train."""

    def start(config, method, out, seed=0, **options):
        paths = {"student": family["small"], "cache": None if method == "sft" else cache}
        paths |= {"questions": haystacks / "train.json"} | options
        return Trainer(
            config,
            method,
            seed,
            "small",
            paths["student"],
            paths["cache"],
            coco_root,
            paths["questions"],
            out,
        )

    return start


def changed(config, training=None, method=None, **settings):
    config = copy.deepcopy(config)
    config["training"] |= training or {}
    if method:
        config["methods"][method] |= settings
    return config


class Run:
    """One finished run: its trainer, its folder, and its logits before anything was folded or merged for export."""

    def __init__(self, trainer, out):
        self.trainer, self.out = trainer, out
        self.inputs, *_ = trainer._batch([0, 7, 11], 0)
        self.inputs.positions = trainer._batch([0, 7, 11], 0)[2]
        export = trainer._export

        def seen(folder):
            with torch.no_grad():
                self.logits = last_logits(trainer.model, self.inputs)
            self.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            export(folder)

        trainer._export = seen
        with torch.no_grad():
            self.before = last_logits(trainer.model, self.inputs)
        self.record = trainer.train()
        self.log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(micro, start, tmp_path_factory):
    """One run per method, made when it is first asked for."""
    made = {}

    def run(method):
        if method not in made:
            out = tmp_path_factory.mktemp("runs") / method / "seed0"
            made[method] = Run(start(micro, method, out), out)
        return made[method]

    return run


# ------------------------------------------------------------------ one run of each method


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_and_leaves_its_folder(runs, micro, method):
    run = runs(method)
    assert run.record == read_json(run.out / "run.json") and run.record["steps"] == len(run.log) == 6
    assert (run.logits - run.before).abs().max() > 1e-2
    assert {p.name for p in run.out.iterdir()} == {"model", "log.jsonl", "run.json", "learned.json"}
    assert {p.name for p in run.out.parent.iterdir()} == {"seed0", "seed0.cost.json"}
    lambdas = {part: micro["methods"][method][f"lambda_{part}"] for part in ("sft", "kl", "laid", "rows")}
    for line in run.log:
        parts = {part for part in lambdas if f"loss_{part}" in line}
        assert parts == {part for part, weight in lambdas.items() if weight > 0}
        assert line["loss"] == pytest.approx(sum(lambdas[p] * line[f"loss_{p}"] for p in parts), abs=1e-5)
        assert all(line[f"lambda_{p}"] == lambdas[p] for p in parts) and line["grad_norm"] > 0
    assert [line["step"] for line in run.log] == [1, 2, 3, 4, 5, 6]
    assert (
        run.log[0]["lr"] == micro["methods"][method]["lr"] > run.log[-1]["lr"]
    )  # one step of warm-up, then down


@pytest.mark.parametrize("method", [m for m in METHODS if m != "laid_wo_kl"])
def test_the_export_says_what_the_trained_model_said(runs, micro, family, method):
    """Adapter merged, gain folded, length factor through its registered attention: the same logits."""
    run = runs(method)
    loaded = load_with_method(micro, method, family["small"], run.out)
    with torch.no_grad():
        torch.testing.assert_close(last_logits(loaded.model, run.inputs), run.logits, **CLOSE)


def test_a_length_factor_folds_at_the_longest_trained_prompt(runs, micro, family):
    """q_proj's rows by hand: trained row x exp(g of its frequency) x (tokens / reference) ** b of its head."""
    run = runs("laid_wo_kl")
    gain, longest = run.trainer.losses.gain, max(len(s.prompt.ids) for s in run.trainer.samples)
    exported = dict(load_with_method(micro, "laid_wo_kl", family["small"], run.out).model.named_parameters())
    assert gain.exponent.abs().min() > 0.01
    for layer in range(2):
        for kind in ("weight", "bias"):
            name = f"model.language_model.layers.{layer}.self_attn.q_proj.{kind}"
            for row in range(32):
                head, frequency = row // 16, row % 8
                factor = (
                    gain.log_gain[layer, head, frequency].exp() * (longest / 20) ** gain.exponent[layer, head]
                )
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


@pytest.mark.parametrize("method", ["kd", "laid", "laid_wo_laid"])
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
        same = torch.allclose(last_logits(plain.eval(), run.inputs), run.logits, **CLOSE)
    # only the length factor needs the registered attention
    assert same == (method != "laid")
    assert hasattr(plain.config.text_config, "laid_length") == (method == "laid")


def test_what_was_learned_is_written(runs):
    learned = read_json(runs("laid").out / "learned.json")
    shapes = {name: list(torch.tensor(value).shape) for name, value in learned.items()}
    assert shapes == {"alignment.1-2.w": [2, 4], "gain.log_gain": [2, 2, 8], "gain.exponent": [2, 2]}
    assert torch.tensor(learned["gain.log_gain"]).abs().max() > 1e-3
    assert runs("laid").log[-1]["gain_max"] != 1.0


def test_gain_and_adapter_together_export_what_was_trained(micro, start, family, tmp_path):
    config = changed(micro, None, "laid", lora=micro["methods"]["sft"]["lora"])
    run = Run(start(config, "laid", tmp_path / "seed0"), tmp_path / "seed0")
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
    for trainer in (again, other):
        trainer.train()
    assert bytes_of(tmp_path / "again/seed0") == bytes_of(first.out)
    weights = "model/adapter_model.safetensors" if method == "sft" else "model/model.safetensors"
    assert bytes_of(tmp_path / "other/seed1")[weights] != bytes_of(first.out)[weights]
    for name, content in bytes_of(first.out).items():
        for path in (family["small"], first.out.parent, tmp_path):
            assert str(path).encode() not in content, name


def bytes_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------ interrupted and resumed


class Boom(Exception):
    pass


def interrupt(trainer, step, action):
    """Let `action` happen after `step` steps."""
    real, count = trainer._step, [0]

    def stepping(indices, at):
        if count[0] == step:
            action()
        count[0] += 1
        return real(indices, at)

    trainer._step = stepping


def boom():
    raise Boom


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "method, steps, action, error",
    [
        ("laid", 2, sigterm, SystemExit),
        ("laid_wo_kl", 3, boom, Boom),
        ("sft", 4, boom, Boom),  # dropout goes on where it was
        ("sft", 5, sigterm, SystemExit),  # in the very last step
        ("kd", 1, sigterm, SystemExit),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(micro, start, runs, tmp_path, method, steps, action, error):
    # The same run twice, the second time killed once and started again, saving after every step.
    whole = start(changed(micro, {"checkpoint_minutes": 1e-9}), method, tmp_path / "a/seed0")
    whole.train()
    config, out = (
        changed(micro, {"checkpoint_minutes": 1e-9 if action is boom else 1e9}),
        tmp_path / "b/seed0",
    )
    handler = signal.getsignal(signal.SIGTERM)
    killed = start(config, method, out)
    interrupt(killed, steps, action)
    with pytest.raises(error):
        killed.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not out.exists() and (tmp_path / "b/.seed0.checkpoint/state.json").is_file()
    resumed = start(config, method, out)
    done = []
    real = resumed._step
    resumed._step = lambda indices, at: done.append(at) or real(indices, at)
    resumed.train()
    first = steps + (action is sigterm)  # a step that a signal falls into is finished and saved
    assert done == list(range(first, 6))
    ours, theirs = bytes_of(out), bytes_of(tmp_path / "a/seed0")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert {p.name for p in out.parent.iterdir()} == {"seed0", "seed0.cost.json"}


def test_a_checkpoint_of_another_run_is_not_taken_up(micro, start, tmp_path):
    config, out = changed(micro, {"checkpoint_minutes": 1e-9}), tmp_path / "seed0"
    killed = start(config, "kd", out)
    interrupt(killed, 3, boom)
    with pytest.raises(Boom):
        killed.train()
    other = start(changed(config, {"lr_weights": 0.5}), "kd", out)
    steps = []
    real = other._step
    other._step = lambda indices, at: steps.append(at) or real(indices, at)
    other.train()
    assert steps == list(range(6))


# ------------------------------------------------------------------ batches, memory, arithmetic


@pytest.mark.parametrize(
    "method, settings",
    [
        ("kd", {}),
        # eq. 7 as printed, a mean over samples of sums over tokens; the relative error is one ratio for a whole batch
        (
            "laid",
            {"alignment": {"pairs": [[-1, -1]], "norm": "frobenius", "normalize": False, "init": "uniform"}},
        ),
    ],
)
def test_accumulation_is_one_large_batch(micro, start, tmp_path, method, settings):
    full = micro["methods"][method]["alignment"]
    settings = {k: {**full, **v} for k, v in settings.items()}
    found = []
    for size in (8, 4, 1):
        trainer = start(
            changed(micro, {"per_device_batch": size}, method, **settings), method, tmp_path / str(size)
        )
        line = trainer._step(list(range(8)), 0)
        weights = torch.cat([p.detach().flatten() for p in trainer.trained])
        found.append((line, weights))
    for line, weights in found[1:]:
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(found[0][0][key], rel=1e-3)
        torch.testing.assert_close(weights, found[0][1], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["laid", "sft"])
def test_gradient_checkpointing_changes_nothing(micro, start, tmp_path, method):
    lines = []
    for on in (False, True):
        trainer = start(changed(micro, {"gradient_checkpointing": on}), method, tmp_path / str(on))
        lines.append([trainer._step(list(range(8)), step) for step in (0, 1)])
    for a, b in zip(*lines):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5) for key in a)


def test_a_small_step_is_not_lost_in_bfloat16(micro, start, tmp_path):
    """A step of 1e-6 rounds to none in most bfloat16 weights; trained weights are therefore kept in float32."""
    trainer = start(changed(micro, {"dtype": "bfloat16"}, "kd", lr=1e-6), "kd", tmp_path / "seed0")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer._step(list(range(8)), 0)
    for name, p in trainer.model.named_parameters():
        if "visual" in name:
            assert p.dtype == torch.bfloat16 and torch.equal(p, before[name])
        else:
            assert p.dtype == torch.float32
            moved = (p != before[name]).float().mean()
            assert moved > 0.9 or "embed" in name, name
            if p.dim() == 2:
                assert (p.bfloat16() != before[name].bfloat16()).float().mean() < 0.1, name


def test_a_vision_tower_trains_through_the_step(micro, start, family, tmp_path):
    """The gradients of its weights: those of transformers' own forward, pixels to logits, on whole prompts."""
    trainer = start(changed(micro, {"train_vision": True}), "kd", tmp_path / "seed0")
    indices = [4, 9, 16]
    trainer._loss_step(indices, 0)["sft"].backward()
    found = {n: p.grad for n, p in trainer.model.named_parameters() if "visual" in n}
    plain, losses = load_model(family["small"]), []
    for k in indices:
        sample = trainer.samples[k]
        pixels, grid = trainer.processor.pixels([trainer.features.file(p) for p in sample.paths])
        ids = torch.from_numpy(sample.prompt.ids)[None]
        logits = plain(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grid,
            mm_token_type_ids=torch.from_numpy(sample.prompt.image_mask)[None].int(),
        ).logits[0, -2:]  # fmt: skip
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.labels)))
    torch.stack(losses).mean().backward()
    assert len(found) > 10
    for name, p in plain.named_parameters():
        if "visual" in name:
            assert found[name].abs().max() > 0, name
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)


def test_the_first_losses_by_hand(micro, start, tmp_path):
    """L_SFT as the mean cross-entropy of answer and end of turn, from the student's own logits at those two tokens."""
    trainer = start(micro, "kd", tmp_path / "seed0")
    indices = [4, 9, 16]
    inputs, labels, plain = trainer._batch(indices, 0)
    assert torch.equal(inputs.positions, plain)  # no gaps in KD
    expected, kl = [], []
    tau = micro["methods"]["kd"]["temperature"]
    with torch.no_grad():
        for row, k in enumerate(indices):
            sample = trainer.samples[k]
            pixels, grid = trainer.processor.pixels([trainer.features.file(p) for p in sample.paths])
            ids = torch.from_numpy(sample.prompt.ids)[None]
            logits = trainer.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grid,
                mm_token_type_ids=torch.from_numpy(sample.prompt.image_mask)[None].int(),
            ).logits[0, -2:]  # fmt: skip
            expected.append(torch.nn.functional.cross_entropy(logits, labels[row]))
            p, q = ((x / tau).softmax(-1) for x in (trainer.cache.logits([k])[0], logits))
            kl.append(tau**2 * (p * (p / q).log()).sum(-1).mean())
        parts = trainer._loss_step(indices, 0)
    torch.testing.assert_close(parts["sft"], torch.stack(expected).mean(), **CLOSE)
    torch.testing.assert_close(parts["kl"], torch.stack(kl).mean(), **CLOSE)


def test_gaps_grow_with_progress_and_keep_images_whole(micro, start, tmp_path):
    trainer = start(micro, "laid", tmp_path / "seed0")
    reach = micro["methods"]["laid"]["gaps"]["reach"]
    spans = []
    for step in (0, 2, 5):
        inputs, _, plain = trainer._batch(list(range(8)), step)
        again, _, _ = trainer._batch(list(range(8)), step)
        assert torch.equal(inputs.positions, again.positions)
        moved = inputs.positions - plain
        assert (moved >= 0).all() and (
            moved.diff(dim=2)[inputs.token_mask[None, :, 1:].expand(3, -1, -1)] >= 0
        ).all()
        for row in range(8):
            for at in trainer.samples[row].prompt.block_starts:
                assert len(moved[:, row, at : at + 3].unique()) == 1  # start, visual token, end move together
        spans.append(int(inputs.positions.max()) + 1)
    assert spans[0] == int(plain.max()) + 1 < spans[2] <= reach


# ------------------------------------------------------------------ wrong inputs


def refused(match, start, *args, **options):
    with pytest.raises(LaidError, match=match) as caught:
        start(*args, **options)
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
        cache=None,
    )
    nothing = changed(micro, None, "sft", lambda_sft=0.0)
    refused("every lambda is 0, there is nothing to train", start, nothing, "sft", out)
    refused("24 questions do not fill one batch of 32", start, changed(micro, {"batch_size": 32}), "sft", out)
    deep = copy.deepcopy(micro)
    deep["methods"]["laid"]["alignment"]["pairs"] = [[5, -1]]
    refused("layer 5 does not exist: the model has 2 layers", start, deep, "laid", out)
    absent = copy.deepcopy(micro)
    absent["methods"]["laid"]["alignment"]["pairs"] = [[0, 0]]
    trainer = start(absent, "laid", out)
    with pytest.raises(LaidError, match="holds teacher layers \\[2\\], layer 0 is asked for"):
        trainer.train()
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
    refused("do not see the same tokens: question 2 has", start, micro, "kd", tmp_path / "seed0", cache=other)


def test_a_loss_that_is_no_number_ends_the_run_and_writes_nothing(micro, start, tmp_path):
    trainer = start(micro, "kd", tmp_path / "seed0")
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(LaidError, match="the loss is nan at step 1 of 6; lower the learning rate"):
        trainer.train()
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
