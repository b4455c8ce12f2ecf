"""Distillation tests share the tiny models of tests/methods, a teacher's cache and one run of each method."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "methods"))


@pytest.fixture(scope="session")
def cache(micro, family, coco_root, haystacks, tmp_path_factory):
    from laid.distill.teacher_cache import build_cache

    out = tmp_path_factory.mktemp("cache") / "teacher_cache"
    build_cache(micro, family["teacher"], coco_root, haystacks / "train.json", out)
    return out


@pytest.fixture(scope="session")
def start(family, coco_root, haystacks, cache):
    """start(config, method, out, ...): a Trainer, ready to train."""
    from laid.distill.trainer import Trainer

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


@pytest.fixture(scope="session")
def runs(micro, start, tmp_path_factory):
    """One run per method, made when it is first asked for."""
    from trainer_runs import Run

    made = {}

    def run(method):
        if method not in made:
            out = tmp_path_factory.mktemp("runs") / method / "seed0"
            made[method] = Run(start(micro, method, out), out)
        return made[method]

    return run
