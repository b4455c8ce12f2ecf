"""training.trackers: what laid logs reaches trackers that are installed, through Accelerate."""

import csv
import json

import pytest

from laid.errors import LaidError
from laid.training import engine
from laid.training.recipe import train
from trainer_runs import changed


def test_tensorboard_and_dvclive_hold_the_lines_of_the_log(micro, start, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trackers = {"trackers": ["tensorboard", "dvclive"], "epochs": 1}
    run = start(changed(micro, trackers), "kd", tmp_path / "runs/seed0")
    train(run)
    log = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log]
    board = EventAccumulator(str(run.logs / "laid"))
    board.Reload()
    for name in ("loss", "loss_kl", "grad_norm", "lr"):
        wanted = [line[name] for line in log]
        scalars = board.Scalars(name)
        assert [s.step for s in scalars] == steps
        assert [s.value for s in scalars] == pytest.approx(wanted)
        (file,) = run.logs.glob(f"dvclive/plots/metrics/{name}.tsv")
        rows = list(csv.DictReader(file.open(), delimiter="\t"))
        assert [int(row["step"]) for row in rows] == steps
        assert [float(row[name]) for row in rows] == pytest.approx(wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}  # nothing beside the run's own folders


def test_off_by_default(micro, start, tmp_path):
    train(start(changed(micro, {"epochs": 1}), "sft", tmp_path / "seed0"))
    assert not (tmp_path / "seed0.trackers").exists() and micro.training.trackers == []


def test_one_that_is_not_installed_is_named(micro, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(LaidError, match="training.trackers: mlflow is not installed: pip install mlflow"):
        engine.start(changed(micro, {"trackers": ["mlflow"]}).training)
