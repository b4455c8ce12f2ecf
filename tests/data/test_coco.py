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

from laid.data.coco import SPLITS, image_problem, load_both, load_coco, load_labels
from laid.errors import LaidError
from laid.provenance import fingerprint

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
        (change("categories", 1, name=" "), r"category 1 \(id 1\) has a name that is blank"),
        (change("images", 0, file_name="images\\b.png"), "has backslashes: use /"),
        *(
            (change("images", 0, file_name=name), f"image 0: file_name .* {says}")
            for name, says in {
                "": "names no file",
                ".": "names no file",
                "a//b.png": "names no file",
                "/b.png": "leaves its folder",
                "b\0.png": "holds a character that no name has",
                "b\ud800.png": "holds a character that no name has",
                "x" * 5000: "is 5,000 characters long",
                "é" * 200: "is 200 characters long",
            }.items()
        ),
        (change("categories", 1, name="a <|vision_start|>"), r"holds the special token <\|vision_start\|>"),
        (change("categories", 1, name="x" * 300), "is 300 characters long, more than 200"),
        (change("categories", 1, name="cup\0"), "holds a character that no name has"),
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
    with pytest.raises(LaidError, match=f"{victim.name}: .*200000000 pixels.* exceeds limit of 178956970"):
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


def test_what_other_tools_write_is_read(tmp_path):
    """Ids and order of categories of each file's own, image ids too, a root category of a class's name, blanks, a
    byte-order mark, empty addresses."""
    data = change("images", 0, coco_url=None)
    data["categories"].insert(0, {"id": 0, "name": "person", "supercategory": "none"})
    data["categories"][1]["name"] = "toothbrush "
    put(tmp_path, "\ufeff" + json.dumps(data))
    data["images"][0]["file_name"], data["images"][1]["file_name"] = "c.png", "d.png"
    for entry in (
        data["categories"] + data["annotations"]
    ):  # 90 toothbrush, 1 person becomes the other way round
        key = "id" if "name" in entry else "category_id"
        entry[key] = {90: 1, 1: 90}.get(entry[key], entry[key])
    data["categories"][0]["name"] = "toothbrush"
    put(tmp_path, data, "train2017")
    train, test = load_both(tmp_path)
    assert train.categories == test.categories == ("toothbrush", "person")
    labels, _ = load_labels(tmp_path)
    assert labels == {
        f"{split}2017/{name}.png": held
        for split, names in {"train": "dc", "val": "ab"}.items()
        for name, held in zip(names, (frozenset(), {"person", "toothbrush"}))
    }
    assert load_coco(tmp_path, "val2017").images["val2017/b.png"].url == ""


@pytest.mark.parametrize("kind", ["files", "folders", "root"])
def test_links_of_the_users_are_read(coco_root, tmp_path, kind):
    """As clusters lay shared data out, and DVC's cache.type symlink."""
    root = tmp_path / "coco"
    if kind == "root":
        root.symlink_to(coco_root)
    else:
        root.mkdir()
        (root / "annotations").symlink_to(coco_root / "annotations")
        for split in SPLITS:
            if kind == "folders":
                (root / split).symlink_to(coco_root / split)
            else:
                (root / split).mkdir()
                for file in (coco_root / split).iterdir():
                    (root / split / file.name).symlink_to(file)
    coco = load_coco(root, "val2017", check="files")
    paths = sorted(coco.images)
    assert fingerprint((root, paths)) == fingerprint((coco_root, paths))
    assert image_problem(coco.file(paths[0]), coco.images[paths[0]]) is None


@pytest.mark.parametrize(("given", "says"), [("coco/train2017", "coco has it"), (".", "coco has it")])
def test_a_root_one_folder_off_is_told(copy, given, says):
    with pytest.raises(LaidError, match=f"instances_val2017.json: no such file; .*{says}: give that folder"):
        load_coco(copy.parent / given, "val2017")


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
