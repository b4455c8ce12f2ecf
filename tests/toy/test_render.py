"""Rendered scenes against pycocotools and against their own pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from laid.data.coco import load_coco
from laid.errors import LaidError
from laid.io import sha256_folder
from laid.toy.render import CATEGORIES, MARK, draw_scene, polygon_area, render


@pytest.fixture(scope="module")
def official(coco_root):
    with contextlib.redirect_stdout(io.StringIO()):
        return {s: COCO(str(coco_root / f"annotations/instances_{s}.json")) for s in ("train2017", "val2017")}


def test_pycocotools_reads_the_same_labels(coco_root, official):
    for split, api in official.items():
        ours = load_coco(coco_root, split, check="sizes")
        names = {c["id"]: c["name"] for c in api.loadCats(api.getCatIds())}
        assert len(names) == 16 and set(ours.categories) == set(names.values())
        theirs = {}
        for number in api.getImgIds():
            entry = api.loadImgs([number])[0]
            held = {names[a["category_id"]] for a in api.loadAnns(api.getAnnIds(imgIds=[number]))}
            theirs[f"{split}/{entry['file_name']}"] = held
        assert theirs == ours.labels


def test_splits_are_disjoint_and_annotation_ids_unique(official):
    train, val = official["train2017"], official["val2017"]
    assert not set(train.getImgIds()) & set(val.getImgIds())
    assert len(train.anns) == len(train.dataset["annotations"])
    assert not set(train.anns) & set(val.anns)


def test_masks_areas_and_boxes_agree_with_pycocotools(official):
    api = official["val2017"]
    ratios = []
    for number in list(api.anns)[:120]:
        entry = api.anns[number]
        mask = api.annToMask(entry)
        ys, xs = np.nonzero(mask)
        x, y, width, height = entry["bbox"]
        assert entry["iscrowd"] == 0
        assert abs(mask.sum() - entry["area"]) <= 0.06 * entry["area"] + 4
        ratios.append(mask.sum() / entry["area"])
        # Masks never pass the box by more than rounding; a sharp tip may end up to two pixels inside.
        inset = np.array([xs.min() - x, ys.min() - y, x + width - xs.max() - 1, y + height - ys.max() - 1])
        assert inset.min() >= -0.52 and inset.max() <= 2.3
    assert abs(np.mean(ratios) - 1) < 0.01  # rounding has no bias


def test_what_the_mask_says_is_what_the_picture_shows(coco_root, official):
    """Inside an eroded mask every pixel has the object's colour; far from every mask the ground is grey."""
    from scipy.ndimage import binary_dilation, binary_erosion

    api = official["val2017"]
    names = {c["id"]: c["name"] for c in api.dataset["categories"]}
    structure = np.ones((3, 3), dtype=bool)
    seen = set()
    for number in api.getImgIds():
        entry = api.loadImgs([number])[0]
        pixels = np.asarray(Image.open(coco_root / "val2017" / entry["file_name"])).astype(int)
        covered = np.zeros(pixels.shape[:2], dtype=bool)
        for annotation in api.loadAnns(api.getAnnIds(imgIds=[number])):
            mask = api.annToMask(annotation).astype(bool)
            assert not (mask & covered).any(), "objects overlap"
            covered |= mask
            inside = binary_erosion(mask, structure, iterations=2)
            assert inside.sum() > 30
            colour = np.array(CATEGORIES[names[annotation["category_id"]]][0])
            off = np.abs(pixels[inside] - colour).max(1) > 14 + 9 + 1  # tint, noise, rounding
            assert off.mean() <= 0.01  # pycocotools fills a pixel of a sharp inner corner
            seen.add(annotation["category_id"])
        ground = pixels[~binary_dilation(covered, structure, iterations=4)]
        assert np.ptp(ground, axis=1).max() == 0  # grey
        assert ground.std() < 8 and ground.std() > 2  # plain, but noisy
    assert len(seen) == 16


def test_every_category_survives_14_pixels():
    """A nearest-centroid classifier on 14 x 14 crops, as the model's patches see them, tells all categories apart."""
    rng = np.random.default_rng(0)
    crops, names = [], []
    while len(crops) < 500:
        pixels, objects = draw_scene(rng, 84, 4)
        small = np.asarray(Image.fromarray(pixels).resize((28, 28), Image.Resampling.BICUBIC), dtype=float)
        for entry in objects:
            x, y = np.mean(entry["polygons"][0][0::2]), np.mean(entry["polygons"][0][1::2])
            left, top = 14 * int(x >= 42), 14 * int(y >= 42)
            crops.append(small[top : top + 14, left : left + 14].ravel())
            names.append(entry["category"])
    crops, names = np.array(crops), np.array(names)
    centroids = {name: crops[:250][names[:250] == name].mean(0) for name in CATEGORIES}
    known = np.array(list(centroids))
    distance = ((crops[250:, None] - np.array(list(centroids.values()))) ** 2).sum(-1)
    assert (known[distance.argmin(1)] == names[250:]).mean() >= 0.97


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        render(tmp_path / name, train=6, val=5, seed=seed)
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b") != sha256_folder(tmp_path / "c")
    # A longer run begins with the same scenes, and train and val never repeat a scene.
    pictures = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "a").rglob("*.png")]
    assert len(set(pictures)) == 11


def test_number_of_objects_is_uniform_and_categories_are_distinct():
    rng = np.random.default_rng(1)
    scenes = [draw_scene(rng, 28, 4)[1] for _ in range(600)]
    counts = Counter(map(len, scenes))
    assert set(counts) == {1, 2, 3, 4} and max(abs(c - 150) for c in counts.values()) < 45
    assert all(len({o["category"] for o in scene}) == len(scene) for scene in scenes)


def test_polygon_area_by_hand():
    assert polygon_area([0, 0, 4, 0, 4, 3, 0, 3]) == 12
    assert polygon_area([0, 0, 4, 0, 0, 3]) == 6
    assert polygon_area([0, 3, 4, 0, 0, 0]) == 6


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"max_objects": 5}, "4 cells"),
        ({"max_objects": 0}, "max_objects"),
        ({"canvas": 20}, "28"),
        ({"val": 0}, "0 val"),
    ],
)
def test_senseless_settings_are_refused(tmp_path, wrong, says):
    with pytest.raises(LaidError, match=says):
        render(tmp_path / "coco", **{"train": 3, "val": 3, **wrong})
    assert not (tmp_path / "coco").exists()


def test_replaces_its_own_work_but_nothing_else(tmp_path):
    own = tmp_path / "own"
    (own / "val2017").mkdir(parents=True)  # as a workflow engine leaves it before a rule
    render(own, train=2, val=2)
    (own / "annotations/instances_val2017.json").unlink()  # half-removed: still ours
    render(own, train=2, val=3)
    assert len(load_coco(own, "val2017", check="files").images) == 3

    for foreign in ("photo.jpg", "val2017/000000000139.jpg", "notes.txt"):
        folder = tmp_path / foreign.replace("/", "_")
        (folder / foreign).parent.mkdir(parents=True)
        (folder / foreign).write_text("precious")
        with pytest.raises(LaidError, match="not replaced"):
            render(folder, train=2, val=2)
        assert (folder / foreign).read_text() == "precious"
    other = tmp_path / "someone"
    (other / "annotations").mkdir(parents=True)
    (other / "annotations/instances_val2017.json").write_text('{"info": {"description": "mine"}}')
    with pytest.raises(LaidError, match="not replaced"):
        render(other, train=2, val=2)
    assert MARK not in (other / "annotations/instances_val2017.json").read_text()
