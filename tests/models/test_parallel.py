"""A model that two processes share (gloo, CPU), against the same in one: answers, probabilities, what equation 7 compares."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from laid import cli
from laid.commands.shared import pick_devices
from laid.errors import LaidError
from laid.models import parallel
from laid.models.loading import load_model, read_config

# All verbs in one start: importing the libraries takes longer than their work.
WORKER = """
import json, sys
from laid import cli
from laid.models import parallel
for words in sys.argv[1:]:
    assert cli.main(json.loads(words)) == 0
    parallel.join = lambda device: device  # these processes have joined
"""


@pytest.fixture(scope="module")
def verbs(micro_file, family, coco_root, haystacks, tmp_path_factory):
    """Words of `laid evaluate` and `laid teacher-cache` of the teacher, by the folder they write: tied has one matrix for words in
    and out, as the 3B student."""
    tied = shutil.copytree(family["teacher"], tmp_path_factory.mktemp("tied") / "teacher")
    model = load_model(tied)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    of = ["--config", str(micro_file), "--coco", str(coco_root), "--device", "cpu"]
    teacher, questions = str(family["teacher"]), str(haystacks / "test/visual_haystack_5.json")
    asked = ["evaluate", *of, "--questions", questions, "--student-name", "teacher"]
    return {
        "cells": [*asked, "--method", "self_extend", "--model", teacher],
        "tied": [*asked, "--method", "base", "--model", str(tied)],
        "cache": ["teacher-cache", *of, "--teacher", teacher, "--questions", str(haystacks / "train.json")],
    }


@pytest.fixture(scope="module")
def shared(verbs, tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    words = [json.dumps([*verb, "--out", str(root / name)]) for name, verb in verbs.items()]
    (root / "worker.py").write_text(WORKER)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, str(root / "worker.py"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return root, done


@pytest.mark.parametrize("name", ["cells", "tied"])
def test_two_processes_answer_as_one_does(shared, verbs, name, tmp_path):
    root, done = shared
    assert cli.main([*verbs[name], "--out", str(tmp_path)]) == 0
    one, two = (json.loads((folder / "5.json").read_text()) for folder in (tmp_path, root / name))
    assert [a["id"] for a in one["answers"]] == [a["id"] for a in two["answers"]]
    for ours, theirs in zip(one["answers"], two["answers"], strict=True):
        assert ours["p_yes"] == pytest.approx(theirs["p_yes"], abs=2e-5)
        assert ours["answer"] == theirs["answer"] or abs(ours["p_yes"] - 0.5) < 1e-4
    assert one["provenance"] == two["provenance"]
    assert done.stdout.count("5 images:") == 2  # of two cells: the first alone speaks


def test_the_cache_has_every_head_of_both(shared, cache):
    found, wanted = (load_file(next(f.glob("*.safetensors"))) for f in (shared[0] / "cache", cache))
    assert found.keys() == wanted.keys() and {"logits", "q.2", "k.2"} <= found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_who_can_share_a_model(family, monkeypatch):
    config = read_config(family["teacher"])  # 4 heads, 2 key heads
    assert [parallel.processes(config, gpus) for gpus in (0, 1, 2, 3, 4)] == [1, 1, 2, 2, 2]
    monkeypatch.setattr(parallel, "world", lambda: 3)
    with pytest.raises(
        LaidError, match="there: 4 heads and 2 key heads cannot be shared by 3 processes: start"
    ):
        parallel.require_shares("there", config)


def test_a_verb_starts_a_process_for_each_gpu_where_one_is_too_small(family, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    size = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: size)
    args = SimpleNamespace(device="auto", words=["evaluate", "--model", "large"])
    assert pick_devices(args, family["teacher"], "bfloat16") == "cuda" and not started
    size.total_memory = 1
    pick_devices(args, family["teacher"], "bfloat16")
    assert started[0][-4:] == ["laid", *args.words] and "2" in started[0] and Path(started[0][0]).name
