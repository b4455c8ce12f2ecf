"""Two real processes (gloo, CPU) against one: one start of the two that does every training listed in `cases`."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from distributed_worker import train

from laid.errors import LaidError
from laid.models.loading import load_model
from laid.training.launch import launch
from laid.training.parallel import Replicated

WORKER = str(Path(__file__).parent / "distributed_worker.py")
STEPS = 3


def case(micro, out, method, stop=None, settings=None, student="student", online=False, **training):
    training = {"per_device_batch": 2, "epochs": 1, "checkpoint_minutes": 1e9, **training}
    config = micro.changed({"training": training, "methods": {method: settings or {}}})
    named = {"stop": stop, "student": student, "online": online}
    return {"config": config.model_dump(), "method": method, "out": str(out), **named}


@pytest.fixture(scope="module")
def paths(family, coco_root, haystacks, cache, tmp_path_factory):
    tied = shutil.copytree(family["small"], tmp_path_factory.mktemp("tied") / "small")
    model = load_model(tied)  # with one matrix for words in and out, as the 3B student has
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    found = {"student": family["small"], "tied": tied, "teacher": family["teacher"]}
    found |= {"cache": cache, "coco": coco_root}
    return {k: str(v) for k, v in (found | {"questions": haystacks / "train.json"}).items()}


@pytest.fixture(scope="module")
def both(micro, paths, tmp_path_factory):
    vision = {"train_vision": True, "gradient_checkpointing": True}
    teacher_alone = {"lambda_sft": 0.0, "lambda_kl": 0.0, "gain": None}
    kinds = {
        "ddp": ("laid", {"parallel": "ddp"}),
        "fsdp2": ("laid_wo_kl", {"parallel": "fsdp2", "gradient_checkpointing": True}),
        "tied": ("kd", {"parallel": "fsdp2", "student": "tied"}),
        "lora": ("sft", {"parallel": "fsdp2", "per_device_batch": 1}),
        "vision": ("kd", {"parallel": "fsdp2", **vision}),
        "bf16": ("laid", {"parallel": "fsdp2", "dtype": "bfloat16"}),
        "teacher_alone": ("laid", {"parallel": "fsdp2", "settings": teacher_alone, "gradient_checkpointing": True}),
        "online": ("laid", {"parallel": "fsdp2", "online": True}),
        "one_to_two": ("laid", {"parallel": "fsdp2"}),
        "two_to_one": ("laid", {"parallel": "fsdp2", "stop": 2}),
    }  # fmt: skip
    return in_one_and_two(micro, paths, tmp_path_factory.mktemp("runs"), kinds)


def in_one_and_two(micro, paths, root, kinds):
    """name -> {1: run in one process, 2: run in two}, each (log, folder).

    kinds: name -> (method, options of `case`); "one_to_two" starts in one process and two go on, "two_to_one" the other way.
    """
    cases = {
        world: {
            name: case(micro, root / str(world) / name, method, **o) for name, (method, o) in kinds.items()
        }
        for world in (1, 2)
    }
    train(cases[1]["one_to_two"] | {"stop": 2}, paths)
    shutil.copytree(root / "1/.one_to_two.checkpoint", root / "2/.one_to_two.checkpoint")
    plan = {"cases": cases[2], "paths": paths, "logs": str(root / "logs.json")}
    (root / "plan.json").write_text(json.dumps(plan))
    assert launch([sys.executable, WORKER, str(root / "plan.json")], 2) == 0
    logs = json.loads((root / "logs.json").read_text())
    shutil.copytree(root / "2/.two_to_one.checkpoint", root / "1/.two_to_one.checkpoint")
    cases[1]["two_to_one"]["stop"] = None
    return {
        name: {1: (train(cases[1][name], paths).log, root / "1" / name), 2: (logs[name], root / "2" / name)}
        for name in kinds
    }


def same(one, two, rel):
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=rel, abs=rel), key


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp2", "tied", "lora", "vision", "teacher_alone", "online", "one_to_two"]
)
def test_two_processes_train_as_one_does(both, name):
    """Losses, norms and gains of every step, and the exported weights, in the same files."""
    agree(both[name], name)


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
    (one, here), (two, there) = both["two_to_one"][1], both["two_to_one"][2]
    assert len(two) == 2 and not there.exists()
    same(one, both["one_to_two"][2][0], 2e-4)
    assert (here / "model/model.safetensors").is_file()


def test_bfloat16_agrees_to_its_own_precision(both):
    (one, _), (two, there) = both["bf16"][1], both["bf16"][2]
    same(one, two, 0.05)
    assert {t.dtype for t in load_file(there / "model/model.safetensors").values()} == {torch.bfloat16}


def test_batches_that_do_not_divide_are_refused():
    place = object.__new__(Replicated)
    place.rank, place.world = 1, 4
    assert place.pieces(list(range(8)), 1) == [[1], [5]]
    with pytest.raises(
        LaidError, match="batch_size 8 is not a multiple of 4 processes x .*batch 4: set .* to 2"
    ):
        place.pieces(list(range(8)), 4)


# ------------------------------------------------------------------ the launcher


def test_the_others_end_with_one_that_fails(capfd):
    program = (
        "import os, sys, time\nrank = os.environ['RANK']\nprint('I am', rank)\n"
        "time.sleep(60) if rank == '0' else sys.exit('no such file')"
    )
    start = time.monotonic()
    assert launch([sys.executable, "-c", program], 2) == 1
    assert time.monotonic() - start < 30
    assert capfd.readouterr().err == "no such file\n"


def test_a_signal_is_passed_on_and_waited_for(tmp_path):
    child = (
        "import os, pathlib, signal, sys, time\nrank = os.environ['RANK']\n"
        "def end(*_):\n time.sleep(0.5)\n pathlib.Path(rank).touch()\n sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path('ready' + rank).touch()\ntime.sleep(60)"
    )
    parent = f"import sys\nfrom laid.training.launch import launch\nsys.exit(launch([sys.executable, '-c', {child!r}], 2))"
    running = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    while len(list(tmp_path.glob("ready*"))) < 2:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 143
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
