"""COCO data: one interface to rendered, local and downloaded images with instance annotations.

A COCO root holds annotations/instances_{train,val}2017.json and train2017/, val2017/. Images are named as Visual
Haystacks names them, with their split: "val2017/000000000139.jpg".
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

    check: "none" reads annotations only; "files" also asks that every listed image is there; "sizes" also
    decodes each image to its end and compares its size.
    Raises LaidError, naming file, entry and both numbers, for anything missing, broken or contradictory.
    """
    source = annotation_file(root, split)
    if not Path(root).is_dir():
        raise LaidError(
            f"{root}: no such folder (expected COCO's layout: annotations/, train2017/, val2017/)"
        )
    data = _read_large(source)
    if not isinstance(data, dict) or any(not isinstance(data.get(k), list) for k in _LISTS):
        raise LaidError(f"{source}: not COCO instances: expected lists {', '.join(_LISTS)}")

    names: dict[int, str] = {}
    for at, entry in enumerate(data["categories"]):
        number, name = (
            _get(entry, "id", int, source, "categories", at),
            _get(entry, "name", str, source, "categories", at),
        )
        if number in names or name in names.values():
            raise LaidError(f"{source}: category {at} repeats id {number} or name {name!r}")
        names[number] = name
    images: dict[int, CocoImage] = {}
    for at, entry in enumerate(data["images"]):
        number = _get(entry, "id", int, source, "images", at)
        file_name = _get(entry, "file_name", str, source, "images", at)
        if number in images:
            raise LaidError(f"{source}: image {at} repeats id {number}")
        width, height = (_get(entry, key, int, source, "images", at) for key in ("width", "height"))
        if width < 1 or height < 1:
            raise LaidError(
                f"{source}: image {at} ({file_name}) is {width} x {height} pixels, expected at least 1 x 1"
            )
        # By its text alone: resolving 118,000 paths on a network disk takes minutes. `file` resolves where it matters.
        if file_name.startswith("/") or "\\" in file_name or ".." in file_name.split("/"):
            raise LaidError(f"{source}: image {at} ({file_name!r}) leaves its folder")
        images[number] = CocoImage(
            number, f"{split}/{file_name}", width, height, str(entry.get("coco_url", ""))
        )
    if len({image.path for image in images.values()}) < len(images):
        raise LaidError(f"{source}: two images share one file_name")
    held: dict[int, set[str]] = {number: set() for number in images}
    for at, entry in enumerate(data["annotations"]):
        image, category = (
            _get(entry, key, int, source, "annotations", at) for key in ("image_id", "category_id")
        )
        if image not in held:
            raise LaidError(f"{source}: annotation {at} names image {image}, which the file does not list")
        if category not in names:
            raise LaidError(
                f"{source}: annotation {at} names category {category}, which the file does not list"
            )
        held[image].add(names[category])
    order = sorted(images)
    coco = CocoSplit(
        root=Path(root),
        name=split,
        images={images[number].path: images[number] for number in order},
        categories=tuple(names[number] for number in sorted(names)),
        labels={images[number].path: frozenset(held[number]) for number in order},
    )
    if check != "none":
        check_images(coco, sizes=check == "sizes")
    return coco


def load_labels(
    root: str | Path, splits: tuple[str, ...] = SPLITS
) -> tuple[dict[str, frozenset[str]], tuple[str, ...]]:
    """(labels of all images of the splits, category names). Raises LaidError where the splits disagree or overlap."""
    labels: dict[str, frozenset[str]] = {}
    categories: tuple[str, ...] | None = None
    numbers: set[int] = set()
    for split in splits:
        coco = load_coco(root, split)
        if categories is not None and coco.categories != categories:
            raise LaidError(f"{annotation_file(root, split)}: its categories differ from {splits[0]}'s")
        categories = coco.categories
        ids = {image.id for image in coco.images.values()}
        if numbers & ids:
            raise LaidError(f"{root}: image {min(numbers & ids)} is in train2017 and in val2017")
        numbers |= ids
        labels.update(coco.labels)
    return labels, categories or ()


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
    except (OSError, SyntaxError, ValueError) as error:
        return f"{file}: not a whole image ({error}): replace it"
    if size != (entry.width, entry.height):
        return (
            f"{file}: {size[0]} x {size[1]} pixels, annotated as {entry.width} x {entry.height}: replace it"
        )
    return None


def _read_large(source: Path) -> Any:
    """read_json without the collector's repeated walks over millions of live objects (measured: two thirds of the time)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return read_json(source)
    finally:
        if was_on:
            gc.enable()


_LISTS = ("images", "annotations", "categories")


def _get(entry: Any, key: str, kind: type, source: Path, group: str, at: int) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise LaidError(
            f"{source}: {group}[{at}] has no {key} of type {kind.__name__} (found {str(value)[:40]!r})"
        )
    return value
