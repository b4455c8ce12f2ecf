"""One process of tests/training/test_distributed.py: runs the trainings that a JSON file names, one after another."""

import json
import os
import sys
from pathlib import Path
from unittest import mock

from laid.commands.shared import deterministic
from laid.errors import LaidError
from laid.settings import validate
from laid.training import engine, recipe
from laid.training.recipe import Run


def train(case, paths):
    """A run: the lines of its log, those of its checkpoint where it is cut short by `stop`; its folder is case["out"]."""
    settings, method, out = validate(case["config"]), case["method"], Path(case["out"])
    teacher = paths["teacher"] if case["online"] else None
    cache = None if method == "sft" or teacher else paths["cache"]
    run = Run(
        settings,
        method,
        0,
        "small",
        paths[case["student"]],
        paths["coco"],
        paths["questions"],
        out,
        cache,
        teacher,
        validation=tuple(paths["held_out"]) if settings.training.validation else (),
    )
    here, real, lines = engine.start(settings.training), recipe.training_step, []

    def stepping(t, indices, at):
        # As a signal would, and in one process only: the others are to hear of it.
        if at + 1 == case.get("stop") and here.rank == here.world - 1:
            os.kill(os.getpid(), 15)
        lines.append(real(t, indices, at))
        return lines[-1]

    with mock.patch.object(recipe, "training_step", stepping):
        try:
            recipe.train(run, here)
        except SystemExit:
            assert case["stop"]
    return lines, here


def lines_of(case, lines):
    """All lines of a run, of which some were made by another start of it."""
    file = Path(case["out"]) / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else lines


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    deterministic(1)
    logs = {}
    for name, case in plan["cases"].items():
        try:
            lines, here = train(case, plan["paths"])
        except LaidError as error:
            logs[name] = str(error)
            continue
        assert here.world == 2
        logs[name] = lines_of(case, lines)
    if here.main:
        Path(plan["logs"]).write_text(json.dumps(logs), encoding="utf-8")
