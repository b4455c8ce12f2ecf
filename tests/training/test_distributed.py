"""Two real processes (gloo, CPU), started as a run on GPUs is, against one."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from distributed_worker import lines_of, train

from laid.data.questions import haystack_file
from laid.errors import LaidError
from laid.models.loading import load_model
from laid.settings import plain
from laid.training.engine import Engine

TOP = Path(__file__).parents[2]
WORKER = str(Path(__file__).parent / "distributed_worker.py")
STEPS = 3


def launch(layout, *words, **options):
    """`accelerate launch` in two processes with a file of configs/accelerate/."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(TOP / f"configs/accelerate/{layout}.yaml"), "--num_processes", "2", *words]
    return subprocess.Popen(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def case(micro, out, method, stop=None, settings=None, student="student", online=False, **training):
    training = {"per_device_batch": 2, "epochs": 1, "checkpoint_minutes": 1e9, **training}
    config = plain(micro.changed({"training": training, "methods": {method: settings or {}}}))
    named = {"stop": stop, "student": student, "online": online}
    return {"config": config, "method": method, "out": str(out), **named}


@pytest.fixture(scope="module")
def paths(family, coco_root, haystacks, cache, tmp_path_factory):
    tied = shutil.copytree(family["small"], tmp_path_factory.mktemp("tied") / "small")
    model = load_model(tied)  # with one matrix for words in and out, as the 3B student has
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    found = {"student": family["small"], "tied": tied, "teacher": family["teacher"]}
    found |= {"cache": cache, "coco": coco_root, "questions": haystacks / "train.json"}
    held_out = [str(haystack_file(haystacks / "test", size)) for size in (2, 5)]
    return {k: str(v) for k, v in found.items()} | {"held_out": held_out}


VALIDATION = {"every": 2, "questions": 7, "export": "best"}
TEACHER_ALONE = {"lambda_sft": 0.0, "lambda_kl": 0.0, "gain": False}
CASES = {
    "ddp": {
        "pieces": ("laid", {"tokens_per_pass": 10_000, "per_device_batch": 1}),
        "lora": ("sft", {"per_device_batch": 1}),
        "diluted": ("laid_plus", {"validation": VALIDATION}),
        "vision": ("kd", {"train_vision": True}),
        "bf16": ("laid", {"dtype": "bfloat16", "validation": VALIDATION}),
        "teacher_alone": (
            "laid",
            {"settings": TEACHER_ALONE, "gradient_checkpointing": True, "per_device_batch": 4},
        ),
        "refused": ("sft", {"per_device_batch": 8}),
    },
    "fsdp2": {
        "diluted": (
            "laid_plus",
            {"gradient_checkpointing": True, "tokens_per_pass": 10_000, "validation": VALIDATION},
        ),
        "tied": ("kd", {"student": "tied"}),
        "lora": ("sft", {"per_device_batch": 1}),
        "vision": ("kd", {"train_vision": True, "gradient_checkpointing": True, "validation": VALIDATION}),
        "bf16": ("laid", {"dtype": "bfloat16", "validation": VALIDATION}),
        "teacher_alone": ("laid", {"settings": TEACHER_ALONE, "gradient_checkpointing": True}),
        "online": ("laid", {"online": True}),
        "one_to_two": ("laid", {}),
        "two_to_one": ("laid", {"stop": 2}),
    },
}


@pytest.fixture(scope="module")
def both(micro, paths, tmp_path_factory):
    """both(layout): all its runs, launched when first asked for. A parameter of this fixture would launch them for every test."""

    @functools.cache
    def of(layout):
        return in_one_and_two(micro, paths, tmp_path_factory.mktemp("runs"), layout, CASES[layout])

    return of


def in_one_and_two(micro, paths, root, layout, kinds):
    """name -> {1: run in one process, 2: run in two}, each (log, folder).

    kinds: name -> (method, options of `case`); "one_to_two" starts in one process and two go on, "two_to_one" the other way.
    """
    cases = {
        world: {
            name: case(micro, root / str(world) / name, method, **o) for name, (method, o) in kinds.items()
        }
        for world in (1, 2)
    }
    if "one_to_two" in kinds:
        train(cases[1]["one_to_two"] | {"stop": 2}, paths)
        shutil.copytree(root / "1/.one_to_two.checkpoint", root / "2/.one_to_two.checkpoint")
    plan = {"cases": cases[2], "paths": paths, "logs": str(root / "logs.json")}
    (root / "plan.json").write_text(json.dumps(plan))
    assert launch(layout, WORKER, str(root / "plan.json")).wait() == 0
    logs = json.loads((root / "logs.json").read_text())
    if "two_to_one" in kinds:
        shutil.copytree(root / "2/.two_to_one.checkpoint", root / "1/.two_to_one.checkpoint")
        cases[1]["two_to_one"]["stop"] = None
    found = {}
    for name in kinds:
        one = lines_of(cases[1][name], train(cases[1][name], paths)[0])
        found[name] = {1: (one, root / "1" / name), 2: (logs[name], root / "2" / name)}
    return found


def same(one, two, rel):
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=rel, abs=rel), key


OTHERS = ("bf16", "two_to_one", "refused")
ALIKE = [(layout, name) for layout in CASES for name in CASES[layout] if name not in OTHERS]


@pytest.mark.parametrize(("layout", "name"), ALIKE)
def test_two_processes_train_as_one_does(both, layout, name):
    """Losses, norms and gains of every step, and the exported weights, in the same files."""
    agree(both(layout)[name], name)


def agree(runs, name):
    (one, here), (two, there) = runs[1], runs[2]
    same(one, two, 2e-4)
    files = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file()) for d in (here, there)]
    assert files[0] == files[1]
    weights = "adapter_model" if name == "lora" else "model"
    ours, theirs = (load_file(d / f"model/{weights}.safetensors") for d in (here, there))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-3)


def test_one_process_goes_on_where_two_stopped(both):
    """And the two stopped together, though one alone had the signal."""
    runs = both("fsdp2")
    (one, here), (two, there) = runs["two_to_one"][1], runs["two_to_one"][2]
    assert len(two) == 2 and not there.exists()
    same(one, runs["one_to_two"][2][0], 2e-4)
    assert (here / "model/model.safetensors").is_file()


@pytest.mark.parametrize("layout", CASES)
def test_bfloat16_agrees_to_its_own_precision(both, layout):
    (one, _), (two, there) = both(layout)["bf16"][1], both(layout)["bf16"][2]
    same(one, two, 0.05)
    assert {t.dtype for t in load_file(there / "model/model.safetensors").values()} == {torch.bfloat16}


def test_batches_that_do_not_divide_are_refused(both):
    said, out = both("ddp")["refused"][2]
    assert "batch_size 8 is not a multiple of 2 processes x training.per_device_batch 8" in said
    assert not out.exists()
    place = SimpleNamespace(rank=1, world=4)
    lengths = [1] * 8
    assert Engine.pieces(place, list(range(8)), 1, lengths, 0) == [[1], [5]]
    with pytest.raises(
        LaidError, match="batch_size 8 is not a multiple of 4 processes x .*batch 4: set .* to 2"
    ):
        Engine.pieces(place, list(range(8)), 4, lengths, 0)


def test_laid_train_under_accelerate_launch_stops_on_a_signal_and_goes_on(paths, micro_file, tmp_path):
    """As typed; the launcher passes the signal on, and ends as its processes do."""
    words = ["-m", "laid", "train", "--config", str(micro_file), "--method", "kd", "--student-name", "small"]
    words += ["--student", paths["student"], "--teacher-cache", paths["cache"], "--coco", paths["coco"]]
    words += ["--questions", paths["questions"], "--out", str(tmp_path / "seed0"), "--device", "cpu"]
    halves = tmp_path / "halves.yaml"
    halves.write_text("training: {per_device_batch: 4, epochs: 12, checkpoint_minutes: 1.0e-9}\n")
    words.insert(words.index(str(micro_file)) + 1, str(halves))
    running = launch("ddp", *words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not (tmp_path / ".seed0.checkpoint/state.json").exists() and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    said = running.communicate()[0]
    assert running.returncode and "the same command goes on from there" in said
    assert not (tmp_path / "seed0").exists()
    said = launch("ddp", *words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).communicate()[0]
    assert "goes on after step" in said and "small kd seed 0: 36 steps" in said
