"""docs/guides/own_data.md, its commands as they stand there, on an export made of rendered photographs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from guides import ROOT, blocks, walk
from laid.cli import main
from laid.data.coco import load_both
from laid.data.export import lay_out
from laid.errors import LaidError
from laid.io import read_json
from laid.settings import load

GUIDE = "docs/guides/own_data.md"


@pytest.fixture(scope="module")
def export(coco_root, tmp_path_factory):
    """One file with the annotations of all images, which lie in one folder, as tools export them."""
    home = tmp_path_factory.mktemp("own")
    content = read_json(coco_root / "annotations/instances_train2017.json")
    (home / "export/images").mkdir(parents=True)
    for entry in content["images"]:
        shutil.copy(coco_root / "train2017" / entry["file_name"], home / "export/images")
        entry["file_name"] = f"images/{entry['file_name']}"
    (home / "export/result.json").write_text(json.dumps(content))
    return home


def test_the_guide_runs_as_it_stands(export, family, micro_file, monkeypatch, capsys):
    monkeypatch.chdir(export)
    shutil.copy(micro_file, "config.yaml")
    Path("models").symlink_to(family["teacher"].parent)
    shown = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words in walk(GUIDE):
        assert words[0] == "laid" and main(words[1:]) == 0, words
        shown.append(capsys.readouterr().out)
    train, test = load_both("coco")
    assert len(train.images) == 112 and len(test.images) == 48
    assert "laid_plus" in shown[2] and "112 train2017, 48 val2017 images" in shown[0]
    assert re.search(r"small.*LAid\+", shown[-2]) and Path("tables/table1.csv").is_file()
    *_, numbers, looked = shown[-1].splitlines()
    assert re.match(r"probability [01]\.\d{3}.*; 160 images", numbers)
    assert re.match(r"look.png: image \d+, \d+.png, gets \d+\.\d % of layer \d head \d at '", looked)
    with Image.open("look.png") as picture:
        assert picture.size[0] == 1400


def test_the_overlay_fits_the_configurations_that_the_guide_names(tmp_path):
    (overlay,) = (yaml.safe_load(body) for kind, body in blocks(GUIDE) if kind == "yaml")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    for files in (["config.yaml"], ["config.yaml", "configs/paper.yaml"]):
        assert load([*(ROOT / file for file in files), tmp_path / "mine.yaml"]).scale == "mine"


@pytest.mark.parametrize("above", ["images\\", "C:\\work\\images\\", "/data/upload/1/", "../images/"])
def test_paths_of_the_tools_own_are_found_by_their_names(above, export, tmp_path):
    """As tools on Windows and servers write them; nothing outside of --images is looked at."""
    content = read_json(export / "export/result.json")
    for entry in content["images"]:
        entry["file_name"] = above + entry["file_name"].removeprefix("images/")
    (tmp_path / "e.json").write_text(json.dumps(content))
    counts = lay_out(tmp_path / "e.json", export / "export/images", tmp_path / "coco")
    assert sum(counts.values()) == len(content["images"]) == 160
    assert all(f.resolve().parent == export / "export/images" for f in tmp_path.glob("coco/*2017/*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": None}, "not a COCO export: it lacks a list of images"),
        ({"images": [{"id": 1}]}, "image 0 has no file_name"),
        ({"images": [{"id": 1, "file_name": "no.png"}]}, "image 0: no.png is not below"),
        ({"images": [{"id": 1, "file_name": "../x.png"}]}, "image 0: ../x.png is not below"),
        ({"images": [{"id": [], "file_name": "no.png"}]}, r"image 0: id is \[\], expected a whole number"),
        ({"annotations": [{"image_id": "1"}]}, "annotation 0: image_id is '1', expected a whole number"),
        ({"info": float("nan")}, "holds a number or a character that JSON does not have"),
        ({"info": "\ud800"}, "holds a number or a character that JSON does not have"),
    ],
)
def test_an_export_that_is_none_is_told(change, said, export, tmp_path):
    content = {"images": [], "annotations": [], "categories": []} | change
    (tmp_path / "e.json").write_text(json.dumps(content))
    with pytest.raises(LaidError, match=said):
        lay_out(tmp_path / "e.json", export / "export/images", tmp_path / "coco")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("precious")
    with pytest.raises(LaidError, match="is no COCO folder"):
        lay_out(export / "export/result.json", export / "export", tmp_path / "full")
