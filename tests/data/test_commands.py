"""The data and haystacks verbs, by hand as a user would call them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from laid.cli import main
from laid.io import read_json

BASE = Path(__file__).resolve().parents[2] / "config.yaml"


def overlay(folder, **sections):
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(sections))
    return ["--config", str(BASE), str(path)]


def test_rendered_then_haystacks(tmp_path, capsys):
    config = overlay(
        tmp_path,
        data={"rendered": {"train": 60, "val": 40}},
        haystacks={
            "train": {"questions": 40, "max_size": 6},
            "validation": {"questions": 10, "sizes": [5]},
            "test": {"questions": 10, "sizes": [1, 5]},
        },
    )
    assert main(["data", *config, "--out", str(tmp_path / "coco")]) == 0
    assert "60 train2017, 40 val2017 images, 16 categories" in capsys.readouterr().out
    out = tmp_path / "haystacks"
    assert main(["haystacks", *config, "--coco", str(tmp_path / "coco"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "shortcuts.md").read_text().strip() and "target in any image" in printed
    scores = read_json(out / "shortcuts.json")["files"]
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.json")} == {
        *scores,
        "shortcuts.json",
        "laid.json",
    }
    assert scores["test/visual_haystack_1.json"]["accuracy"]["target_anywhere"] == 1.0


def test_local_folder_is_checked_and_linked(coco_root, tmp_path, capsys):
    config = overlay(tmp_path, data={"source": "local", "root": str(coco_root)})
    link = tmp_path / "results" / "coco"
    for _ in range(2):
        assert main(["data", *config, "--out", str(link)]) == 0
        assert link.is_symlink() and link.resolve() == coco_root.resolve()
    assert main(["data", *config, "--out", str(coco_root)]) == 0
    assert not coco_root.is_symlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    assert main(["data", *config, "--out", str(tmp_path / "full")]) == 2
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    assert "not replaced" in capsys.readouterr().err


def test_two_jobs_may_link_the_same_folder_at_once(coco_root, tmp_path, monkeypatch):
    """The workflow looks for the images of haystacks, of beyond and of POPE side by side."""
    link, real = tmp_path / "coco", os.symlink

    def both(root, path, **more):
        real(root, link)  # the other was faster
        real(root, path, **more)

    monkeypatch.setattr(os, "symlink", both)
    config = overlay(tmp_path, data={"source": "local", "root": str(coco_root)})
    assert main(["data", *config, "--out", str(link)]) == 0
    assert link.resolve() == coco_root.resolve() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "root, says",
    [(None, "data.root: data.source is 'local'"), ("/nowhere/coco", "/nowhere/coco: no such folder")],
)
def test_local_folder_missing(tmp_path, capsys, root, says):
    config = overlay(tmp_path, data={"source": "local", "root": root})
    assert main(["data", *config, "--out", str(tmp_path / "coco")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("laid data: error:") and error.count("\n") == 1
    assert not (tmp_path / "coco").exists()


def test_an_image_of_no_split_is_told(coco_root, haystacks, tmp_path, capsys):
    config = overlay(tmp_path, data={"source": "local", "root": str(coco_root)})
    questions = (haystacks / "train.json").read_text().replace("train2017/", "TRAIN2017/")
    (tmp_path / "q.json").write_text(questions)
    words = ["--out", str(tmp_path / "coco"), "--questions", str(tmp_path / "q.json")]
    assert main(["data", *config, *words]) == 2
    assert f"are not annotated in {tmp_path}/coco, first TRAIN2017/" in capsys.readouterr().err


def test_haystacks_error_is_one_line_and_leaves_nothing(coco_root, tmp_path, capsys):
    config = overlay(
        tmp_path,
        haystacks={"test": {"sizes": [1000]}, "validation": {"sizes": [5]}},
        beyond={"sizes": [2000]},
    )
    out = tmp_path / "haystacks"
    assert main(["haystacks", *config, "--coco", str(coco_root), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "999 distractors" in error and "100 images" in error and error.count("\n") == 1
    assert not out.exists()
    broken = tmp_path / "broken"
    (broken / "annotations").mkdir(parents=True)
    (broken / "annotations/instances_train2017.json").write_text(json.dumps({"images": []}))
    assert main(["haystacks", *config, "--coco", str(broken), "--out", str(out)]) == 2
    assert "not COCO instances" in capsys.readouterr().err
