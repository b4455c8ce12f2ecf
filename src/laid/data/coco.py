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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from laid.data.images import THINNEST, lies_on_its_side, open_image
from laid.data.questions import name_problem
from laid.errors import LaidError
from laid.io import path_problem, read_json, safe_join
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
    file = annotation_file(root, split)
    if not Path(root).is_dir():
        raise LaidError(
            f"{root}: no such folder (expected COCO's layout: annotations/, train2017/, val2017/)"
        )
    if not file.exists() and (right := _meant(root, split)):
        raise LaidError(f"{file}: no such file; {right} has it: give that folder")
    api = _index(file)
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


def _meant(root: str | Path, split: str) -> Path | None:
    """The folder laid out like COCO that lies above `root`, or in it, where the user named one too deep or too high."""
    here = Path(root).absolute()
    around = [here.parent, *sorted(path for path in here.iterdir() if path.is_dir())]
    return next((folder for folder in around if annotation_file(folder, split).is_file()), None)


def load_both(root: str | Path) -> tuple[CocoSplit, CocoSplit]:
    """(train2017, val2017) below `root`. Raises LaidError where their categories differ or a file name is in both."""
    train, test = (load_coco(root, split) for split in SPLITS)
    if odd := sorted(set(train.categories) ^ set(test.categories)):
        raise LaidError(
            f"{root}: the categories of train2017 and val2017 differ: {odd[0]!r} is in one of them only"
        )
    test = replace(test, categories=train.categories)  # ids and their order are each file's own
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
    """What is wrong with an image file, or None: it must decode to its end, be as large as annotated, and of use to models."""
    try:
        size = open_image(file).size
    except LaidError as error:
        return str(error)
    if size != (entry.width, entry.height):
        why = "replace it"
        if size == (entry.height, entry.width) and lies_on_its_side(file):
            why = "EXIF turns it by a quarter: annotate it as it is seen, or take the orientation out of the file"
        return f"{file}: {size[0]} x {size[1]} pixels, annotated as {entry.width} x {entry.height}: {why}"
    if max(size) > THINNEST * min(size):
        return f"{file}: {size[0]} x {size[1]} pixels, thinner than the {THINNEST} to 1 that models take: crop it"
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
        if problem := name_problem(entry["name"]):
            raise LaidError(f"{source}: category {at} (id {entry['id']}) has a name that {problem}")
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
        if problem := path_problem(name):
            raise LaidError(f"{source}: image {at}: file_name {name!r:.80} {problem}")
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
