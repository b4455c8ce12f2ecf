"""COCO data: one interface to rendered, local and downloaded images with instance annotations.

A COCO root holds annotations/instances_{train,val}2017.json and train2017/, val2017/. Images are named as Visual
Haystacks names them, with their split: "val2017/000000000139.jpg".
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from laid.errors import LaidError
from laid.io import read_json, safe_join
from laid.progress import Progress

SPLITS = ("train2017", "val2017")


@dataclass(frozen=True)
class CocoImage:
    """One image of a split: its COCO id, its path below the root, its size in pixels, where it was published."""

    id: int
    path: str
    width: int
    height: int
    url: str = ""


@dataclass(frozen=True)
class CocoSplit:
    """The annotations of one split, in the order of image ids.

    `labels` maps every image path to the names of the objects annotated in it. Crowd annotations count: a crowd of
    people holds a person, so an image with one must not serve as an image without. (The official Visual Haystacks
    questions do not contradict this, nor do they settle it: none of those whose needle is in our slice turns on a crowd.)
    """

    root: Path
    name: str
    images: dict[str, CocoImage] = field(repr=False)
    categories: tuple[str, ...]
    labels: dict[str, frozenset[str]] = field(repr=False)

    def file(self, path: str) -> Path:
        """The file of an image of this split. Raises LaidError for a path that leaves the root."""
        return safe_join(self.root, path)


def annotation_file(root: str | Path, split: str) -> Path:
    """Where the instance annotations of `split` lie below `root`."""
    if split not in SPLITS:
        raise LaidError(f"unknown COCO split {split!r}: expected one of {', '.join(SPLITS)}")
    return Path(root) / "annotations" / f"instances_{split}.json"


def load_coco(root: str | Path, split: str, check: str = "none") -> CocoSplit:
    """Read the annotations of "train2017" or "val2017" below `root`.

    Ids count within a file; categories of equal names are one category. Names are stripped.
    check: "none" reads annotations only; "files" also asks that every listed image is there; "sizes" also
    decodes each image to its end and compares its size.
    Raises LaidError, naming file, entry and both numbers, for anything missing, broken or contradictory.
    """
    if not Path(root).is_dir():
        raise LaidError(
            f"{root}: no such folder (expected COCO's layout: annotations/, train2017/, val2017/)"
        )
    api = _index(annotation_file(root, split))
    names = {category["id"]: category["name"] for category in api.loadCats(sorted(api.getCatIds()))}
    held: dict[int, set[str]] = {number: set() for number in sorted(api.getImgIds())}
    for number, name in names.items():
        for image in api.getImgIds(catIds=[number]):
            held[image].add(name)
    images = [
        CocoImage(
            entry["id"],
            f"{split}/{entry['file_name']}",
            entry["width"],
            entry["height"],
            str(entry.get("coco_url") or ""),
        )
        for entry in api.loadImgs(list(held))
    ]
    coco = CocoSplit(
        root=Path(root),
        name=split,
        images={image.path: image for image in images},
        categories=tuple(dict.fromkeys(names.values())),
        labels={image.path: frozenset(held[image.id]) for image in images},
    )
    if check != "none":
        check_images(coco, sizes=check == "sizes")
    return coco


def load_both(root: str | Path) -> tuple[CocoSplit, CocoSplit]:
    """(train2017, val2017) below `root`. Raises LaidError where their categories differ or a file name is in both."""
    train, test = (load_coco(root, split) for split in SPLITS)
    if train.categories != test.categories:
        odd = sorted(set(train.categories) ^ set(test.categories))
        how = f"{odd[0]!r} is in one of them only" if odd else "their ids give them different orders"
        raise LaidError(f"{root}: the categories of train2017 and val2017 differ: {how}")
    both = {image.path.split("/", 1)[1] for image in train.images.values()}
    both &= {image.path.split("/", 1)[1] for image in test.images.values()}
    if both:
        raise LaidError(
            f"{root}: {len(both)} images are in train2017 and in val2017, first {min(both)}: take them out of one,"
            " or, where they are different pictures, give them different names"
        )
    return train, test


def load_labels(root: str | Path) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
    """(labels of all images of both splits, category names). Raises LaidError as `load_both` does."""
    train, test = load_both(root)
    return {**train.labels, **test.labels}, train.categories


def check_images(coco: CocoSplit, sizes: bool = True, paths: Iterable[str] | None = None) -> None:
    """Raise LaidError unless every image of the split (or of `paths`) is on disk and, with `sizes`, whole and as
    large as annotated."""
    entries = [coco.images[path] for path in (coco.images if paths is None else paths)]
    missing = [entry.path for entry in entries if not coco.file(entry.path).is_file()]
    if missing:
        raise LaidError(
            f"{coco.root}: {len(missing)} of the {len(entries)} images asked for from {coco.name} are missing,"
            f" first {missing[0]}: copy or download them, or remove them from the annotations"
        )
    if not sizes:
        return
    # Decoding releases the interpreter, so threads help: 120,000 photographs are minutes, once.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Progress(len(entries), f"checking {coco.name}", "image") as bar,
    ):
        try:
            for problem in pool.map(lambda entry: image_problem(coco.file(entry.path), entry), entries):
                if problem:
                    raise LaidError(problem)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def image_problem(file: Path, entry: CocoImage) -> str | None:
    """What is wrong with an image file, or None: it must decode to its end and be as large as annotated."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            size = picture.size
            picture.draft(
                picture.mode, (1, 1)
            )  # JPEG: reads the whole stream, but decodes at an eighth of the size
            picture.load()
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        return (
            f"{file}: annotated as {entry.width} x {entry.height}, says to have more than the {limit:,} pixels"
            " that are opened: shrink it"
        )
    except (OSError, SyntaxError, ValueError) as error:
        return f"{file}: not a whole image ({error}): replace it"
    if size != (entry.width, entry.height):
        return (
            f"{file}: {size[0]} x {size[1]} pixels, annotated as {entry.width} x {entry.height}: replace it"
        )
    return None


def _index(source: Path) -> COCO:
    """The instances of one file behind pycocotools' queries, checked first: COCO itself trusts what it is given."""
    collects = gc.isenabled()
    gc.disable()  # its repeated walks over millions of live objects take two thirds of the time
    try:
        data = read_json(source)
        _check(source, data)
        api = COCO()
        api.dataset = data
        with contextlib.redirect_stdout(io.StringIO()):
            api.createIndex()
        return api
    finally:
        if collects:
            gc.enable()


_LISTS = ("images", "annotations", "categories")


def _check(source: Path, data: Any) -> None:
    """Raise LaidError for the first thing that is wrong with the content of an annotation file; strip its names."""
    if not isinstance(data, dict) or any(not isinstance(data.get(key), list) for key in _LISTS):
        raise LaidError(f"{source}: not COCO instances: expected lists {', '.join(_LISTS)}")
    for group, keys in (
        ("categories", {"id": int, "name": str}),
        ("images", {"id": int, "file_name": str, "width": int, "height": int}),
        ("annotations", {"image_id": int, "category_id": int}),
    ):
        for at, entry in enumerate(data[group]):
            for key, kind in keys.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):
                    found = str(value)[:40]
                    raise LaidError(
                        f"{source}: {group}[{at}] has no {key} of type {kind.__name__} (found {found!r})"
                    )

    categories: set[int] = set()
    for at, entry in enumerate(data["categories"]):
        if entry["id"] in categories:
            raise LaidError(f"{source}: category {at} repeats id {entry['id']}")
        categories.add(entry["id"])
        entry["name"] = " ".join(entry["name"].split())
        if not entry["name"]:
            raise LaidError(f"{source}: category {at} (id {entry['id']}) has a blank name")
    images: set[int] = set()
    names: set[str] = set()
    for at, entry in enumerate(data["images"]):
        number, name, width, height = (entry[key] for key in ("id", "file_name", "width", "height"))
        if number in images:
            raise LaidError(f"{source}: image {at} repeats id {number}")
        images.add(number)
        if name in names:
            raise LaidError(f"{source}: image {at} repeats file_name {name!r}")
        names.add(name)
        if width < 1 or height < 1:
            raise LaidError(
                f"{source}: image {at} ({name}) is {width} x {height} pixels, expected at least 1 x 1"
            )
        if "\\" in name:
            raise LaidError(f"{source}: image {at} ({name!r}) has backslashes in file_name: use /")
        # By its text alone: resolving 118,000 paths on a network disk takes minutes. `file` resolves where it matters.
        if name.startswith("/") or ".." in name.split("/"):
            raise LaidError(f"{source}: image {at} ({name!r}) leaves its folder")
    for at, entry in enumerate(data["annotations"]):
        for key, listed in (("image_id", images), ("category_id", categories)):
            if entry[key] not in listed:
                raise LaidError(
                    f"{source}: annotation {at} names {key.removesuffix('_id')} {entry[key]},"
                    " which the file does not list"
                )
        entry["id"] = (
            at  # COCO's index needs one of each; some tools write none, or count from 1 in each image
        )
