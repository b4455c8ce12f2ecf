"""Reading COCO annotations: the right labels from right files, one clear line from wrong ones."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import zlib

import pytest
from PIL import Image

from laid.data.coco import load_coco, load_labels
from laid.errors import LaidError

GOOD = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 4, "height": 3, "coco_url": "http://example.org/b.png"},
        {"id": 2, "file_name": "a.png", "width": 5, "height": 5},
    ],
    "annotations": [
        {"image_id": 7, "category_id": 90, "iscrowd": 0},
        {"image_id": 7, "category_id": 1, "iscrowd": 1},
        {"image_id": 7, "category_id": 1, "iscrowd": 0},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
}


def put(root, data, split="val2017"):
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    text = data if isinstance(data, str) else json.dumps(data)
    (root / "annotations" / f"instances_{split}.json").write_text(text)


def test_by_hand(tmp_path):
    put(tmp_path, GOOD)
    coco = load_coco(tmp_path, "val2017")
    assert list(coco.images) == ["val2017/a.png", "val2017/b.png"]
    assert coco.categories == ("person", "toothbrush")
    assert coco.labels == {"val2017/a.png": frozenset(), "val2017/b.png": {"person", "toothbrush"}}
    assert coco.images["val2017/b.png"].url == "http://example.org/b.png"
    assert (coco.images["val2017/b.png"].width, coco.images["val2017/b.png"].height) == (4, 3)
    assert coco.file("val2017/b.png") == tmp_path / "val2017/b.png"


def change(group, at, **values):
    data = json.loads(json.dumps(GOOD))
    data[group][at].update(values)
    return data


def without(group, at, key):
    data = json.loads(json.dumps(GOOD))
    del data[group][at][key]
    return data


@pytest.mark.parametrize(
    "data, says",
    [
        (json.dumps(GOOD)[:-40], "not valid JSON"),
        ("[]", "expected lists images, annotations, categories"),
        ({k: v for k, v in GOOD.items() if k != "annotations"}, "expected lists"),
        (change("images", 1, id=7), r"image 1 repeats id 7"),
        (change("images", 1, file_name="b.png"), "image 1 repeats file_name 'b.png'"),
        (change("images", 0, width="4"), r"images\[0\] has no width of type int \(found '4'\)"),
        (change("images", 0, height=0), "4 x 0 pixels"),
        (change("images", 0, file_name="../../etc/passwd"), "leaves its folder"),
        (change("annotations", 2, image_id=8), "annotation 2 names image 8"),
        (change("annotations", 1, category_id=2), "annotation 1 names category 2"),
        (change("categories", 1, id=90), "category 1 repeats id 90"),
        (change("categories", 1, name=" "), r"category 1 \(id 1\) has a blank name"),
        (change("images", 0, file_name="images\\b.png"), "has backslashes in file_name: use /"),
        (without("annotations", 0, "image_id"), r"annotations\[0\] has no image_id"),
        (without("images", 1, "file_name"), r"images\[1\] has no file_name"),
    ],
)
def test_wrong_annotations_are_one_clear_line(tmp_path, data, says):
    put(tmp_path, data)
    with pytest.raises(LaidError, match=says) as caught:
        load_coco(tmp_path, "val2017")
    assert "\n" not in str(caught.value)


def test_missing_folder_file_and_split(tmp_path):
    with pytest.raises(LaidError, match="no such folder"):
        load_coco(tmp_path / "nowhere", "val2017")
    with pytest.raises(LaidError, match="instances_val2017.json: no such file"):
        load_coco(tmp_path, "val2017")
    with pytest.raises(LaidError, match="'test2017'.*train2017, val2017"):
        load_coco(tmp_path, "test2017")


@pytest.fixture
def copy(coco_root, tmp_path):
    shutil.copytree(coco_root, tmp_path / "coco")
    return tmp_path / "coco"


def test_missing_image_is_found(copy):
    victim = next((copy / "val2017").iterdir())
    victim.unlink()
    load_coco(copy, "val2017")
    with pytest.raises(
        LaidError, match=f"1 of the 100 images asked for .* missing, first val2017/{victim.name}"
    ):
        load_coco(copy, "val2017", check="files")
    with pytest.raises(LaidError, match="missing"):
        load_coco(copy, "val2017", check="sizes")


def test_half_written_image_is_found(copy):
    victim = sorted((copy / "val2017").iterdir())[50]
    victim.write_bytes(victim.read_bytes()[:-2000])
    load_coco(copy, "val2017", check="files")
    with pytest.raises(LaidError, match=f"{victim.name}: not a whole image"):
        load_coco(copy, "val2017", check="sizes")
    load_coco(copy, "train2017", check="sizes")


def test_half_written_jpeg_and_no_image_at_all_are_found(tmp_path):
    put(tmp_path, change("images", 0, file_name="b.jpg", width=300, height=200))
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "val2017/a.png")
    Image.effect_noise((300, 200), 60).convert("RGB").save(tmp_path / "val2017/b.jpg")
    load_coco(tmp_path, "val2017", check="sizes")
    whole = (tmp_path / "val2017/b.jpg").read_bytes()
    for broken in (whole[: len(whole) // 2], b"<html>404</html>", b""):
        (tmp_path / "val2017/b.jpg").write_bytes(broken)
        with pytest.raises(LaidError, match="b.jpg: not a whole image"):
            load_coco(tmp_path, "val2017", check="sizes")


def test_image_too_large_to_open_is_one_line(copy):
    victim = sorted((copy / "val2017").iterdir())[3]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">II5B", 20_000, 10_000, 8, 2, 0, 0, 0))
    victim.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(
        LaidError, match=f"{victim.name}: .* more than the 178,956,970 pixels that are opened"
    ):
        load_coco(copy, "val2017", check="sizes")


def test_image_of_another_size_is_found(copy):
    victim = sorted((copy / "val2017").iterdir())[3]
    Image.new("RGB", (84, 83)).save(victim)
    with pytest.raises(LaidError, match="84 x 83 pixels, annotated as 84 x 84"):
        load_coco(copy, "val2017", check="sizes")


def test_splits_that_overlap_or_disagree_are_refused(tmp_path):
    put(tmp_path, GOOD)
    put(tmp_path, GOOD, "train2017")
    with pytest.raises(LaidError, match="2 images are in train2017 and in val2017, first a.png"):
        load_labels(tmp_path)
    put(tmp_path, change("categories", 0, name="comb"), "train2017")
    with pytest.raises(LaidError, match="categories .* differ: 'comb' is in one of them only"):
        load_labels(tmp_path)
    swapped = json.loads(json.dumps(GOOD))
    swapped["categories"] = [{"id": 1, "name": "toothbrush"}, {"id": 90, "name": "person"}]
    put(tmp_path, swapped, "train2017")
    with pytest.raises(LaidError, match="categories .* differ: their ids give them different orders"):
        load_labels(tmp_path)


def test_what_other_tools_write_is_read(tmp_path):
    """Ids counted anew in each file, a root category of a class's name, blanks, a byte-order mark, empty addresses."""
    data = change("images", 0, coco_url=None)
    data["categories"].insert(0, {"id": 0, "name": "person", "supercategory": "none"})
    data["categories"][1]["name"] = "toothbrush "
    put(tmp_path, "\ufeff" + json.dumps(data))
    data["images"][0]["file_name"], data["images"][1]["file_name"] = "c.png", "d.png"
    put(tmp_path, data, "train2017")
    labels, categories = load_labels(tmp_path)
    assert categories == ("person", "toothbrush")
    assert labels == {
        f"{split}2017/{name}.png": held
        for split, names in {"train": "dc", "val": "ab"}.items()
        for name, held in zip(names, (frozenset(), {"person", "toothbrush"}))
    }
    assert load_coco(tmp_path, "val2017").images["val2017/b.png"].url == ""


def test_real_slice_against_pycocotools(shared):
    from pycocotools.coco import COCO

    crowds = 0
    for split in ("val2017", "train2017"):
        with contextlib.redirect_stdout(io.StringIO()):
            api = COCO(str(shared / f"coco_slice/annotations/instances_{split}.json"))
        ours = load_coco(shared / "coco_slice", split, check="sizes")
        names = {c["id"]: c["name"] for c in api.dataset["categories"]}
        for number in api.getImgIds():
            found = api.loadAnns(api.getAnnIds(imgIds=[number]))
            crowds += sum(a["iscrowd"] for a in found)
            path = f"{split}/{api.imgs[number]['file_name']}"
            assert ours.labels[path] == {names[a["category_id"]] for a in found}
        assert len(ours.images) == len(api.imgs) and len(ours.categories) == 80
    assert crowds == 39
