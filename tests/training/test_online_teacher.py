"""A teacher that answers as training goes, against the same teacher's cache."""

import json

import pytest

from laid.commands.train import own_device
from laid.errors import LaidError
from laid.training.recipe import Run, train
from laid.training.teacher_cache import build_cache
from trainer_runs import changed


@pytest.fixture
def trained(micro, family, coco_root, haystacks, tmp_path):
    """trained(name, cache=... or teacher=...): the log of a run of LAid with gaps."""
    config = changed(micro, {"epochs": 1}, "laid")

    def run(name, cache=None, **options):
        out = tmp_path / name
        record = train(
            Run(
                config,
                "laid",
                0,
                "small",
                family["small"],
                coco_root,
                haystacks / "train.json",
                out,
                cache,
                **options,
            )
        )
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], record

    return run


def test_the_same_losses_as_from_the_cache(micro, family, coco_root, haystacks, tmp_path, trained, opened):
    exact = micro.changed({"teacher_cache": {"dtype": "float32"}})
    cache = tmp_path / "cache"
    build_cache(exact, family["teacher"], coco_root, haystacks / "train.json", cache)
    cached, _ = trained("cached", cache)
    opened.clear()
    online, record = trained("online", teacher=family["teacher"])
    assert len(opened) > 24 and set(opened.values()) == {1}  # both towers see what is opened once
    assert len(online) == len(cached) > 1
    for one, two in zip(cached, online, strict=True):
        assert one.keys() == two.keys() and one["loss_laid"] > 0 and one["loss_kl"] > 0
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), key
    assert set(record["provenance"]["data"]) == {"images", "questions", "student", "teacher"}


def test_wrong_uses_are_one_line(micro, family, cache, coco_root, haystacks, tmp_path, trained):
    with pytest.raises(LaidError, match="two sources of one teacher's answers; give one"):
        trained("both", cache, teacher=family["teacher"])
    deep = changed(micro, None, "laid", alignment={"pairs": [[0, 5]]})
    questions, out = haystacks / "train.json", tmp_path / "deep"
    with pytest.raises(LaidError, match="layer 5 does not exist: the model has"):
        train(
            Run(
                deep,
                "laid",
                0,
                "small",
                family["small"],
                coco_root,
                questions,
                out,
                teacher=family["teacher"],
            )
        )
    with pytest.raises(LaidError, match="no such checkpoint folder"):
        trained("none", teacher=tmp_path / "none")
    assert not (tmp_path / "both").exists()


def test_each_process_takes_its_device(monkeypatch):
    assert own_device(None) is None and own_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cpu") == own_device("cpu,cpu") == "cpu"
    with pytest.raises(LaidError, match="3 devices for 2 processes: give one for all, or one for each"):
        own_device("cpu,cpu,cpu")
    with pytest.raises(LaidError, match="--teacher-device gpu: expected auto, cpu, cuda"):
        own_device("cpu,gpu")
