"""One process of tests/training/test_distributed.py: runs the trainings that a JSON file names, one after another."""

import json
import sys

import torch

from laid.commands.shared import deterministic
from laid.settings import validate
from laid.training.parallel import join
from laid.training.trainer import Trainer


def train(case, paths, parallel=None):
    """A run: {"log": lines} with, where it is not cut short by `stop`, its folder in case["out"]."""
    config, method = validate(case["config"]), case["method"]
    teacher = paths["teacher"] if case["online"] else None
    cache = None if method == "sft" or teacher else paths["cache"]
    trainer = Trainer(
        config, method, 0, "small", paths[case["student"]], cache, paths["coco"], paths["questions"], case["out"], "cpu",
        parallel=parallel, teacher=teacher,
    )  # fmt: skip
    real = trainer._step

    def stepping(indices, at):
        # As a signal would, and in one process only: the others are to hear of it.
        trainer.interrupted = (
            at + 1 == case.get("stop") and trainer.parallel.rank == trainer.parallel.world - 1
        )
        return real(indices, at)

    trainer._step = stepping
    try:
        trainer.train()
    except SystemExit:
        assert case["stop"]
    return trainer


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        plan = json.load(file)
    deterministic(1)
    logs = {}
    for name, case in plan["cases"].items():
        training = case["config"]["training"]
        parallel = join(training["parallel"], "cpu", getattr(torch, training["dtype"]))
        assert parallel.world == 2
        logs[name] = train(case, plan["paths"], parallel).log
    if parallel.main:
        with open(plan["logs"], "w", encoding="utf-8") as file:
            json.dump(logs, file)
