"""An annotation tool's export, one COCO file and a folder of images, as the COCO folder that laid works on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laid.data.coco import SPLITS, annotation_file
from laid.errors import LaidError
from laid.io import path_problem, read_json, write_json

HELD_OUT = 0.3  # of the images, for test questions


def lay_out(export: str | Path, images: str | Path, out: str | Path) -> dict[str, int]:
    """Write out/annotations and link every image into out/train2017 or out/val2017; returns images per split.

    Which split an image is in follows from its name's hash, the HELD_OUT share with the smallest in val2017, so that the same export
    gives the same folder. export: COCO JSON as CVAT, Label Studio, Roboflow and others write it (images, annotations, categories);
    file names may have folders before them. Raises LaidError for a file that is no such export, a missing image, two images of a
    name, and an `out` that holds other things.
    """
    content = read_json(export)
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise LaidError(f"{export}: not a COCO export: it lacks a list of {', '.join(lists)}")
    found: dict[str, tuple[Mapping[str, Any], Path]] = {}
    for at, entry in enumerate(content["images"]):
        written = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(written, str) or not written:
            raise LaidError(f"{export}: image {at} has no file_name")
        _require_number(entry, "id", f"{export}: image {at}")
        written = written.replace("\\", "/")
        name = written.rsplit("/", 1)[-1]
        places = [
            place for place in (written, name) if not path_problem(place)
        ]  # of a path of the tool's own, the name
        file = next((f for place in places if (f := Path(images) / place).is_file()), None)
        if file is None:
            raise LaidError(f"{export}: image {at}: {written} is not below {images}")
        if name in found:
            raise LaidError(f"{export}: two images are called {name}: give them different names")
        found[name] = ({**entry, "file_name": name}, file)
    for at, entry in enumerate(content["annotations"]):
        _require_number(entry, "image_id", f"{export}: annotation {at}")
    out = Path(out)
    if (
        out.exists()
        and not all((out / name).is_dir() for name in ("annotations", *SPLITS))
        and any(out.iterdir())
    ):
        raise LaidError(f"{out}: exists and is no COCO folder: choose another folder for --out")
    ranked = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    parts = dict(
        zip(
            reversed(SPLITS),
            (ranked[: round(HELD_OUT * len(ranked))], ranked[round(HELD_OUT * len(ranked)) :]),
        )
    )
    for split, names in parts.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        ids = {found[name][0]["id"] for name in names}
        held = [a for a in content["annotations"] if a["image_id"] in ids]
        for name in names:
            link = out / split / name
            if not link.exists():
                os.symlink(found[name][1].absolute(), link)
        part = {**content, "images": [found[name][0] for name in sorted(names)], "annotations": held}
        try:
            write_json(annotation_file(out, split), part)
        except ValueError:  # NaN, half a character
            raise LaidError(f"{export}: holds a number or a character that JSON does not have") from None
    return {split: len(names) for split, names in parts.items()}


def _require_number(entry: Any, key: str, who: str) -> None:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int):
        raise LaidError(f"{who}: {key} is {value!r:.40}, expected a whole number")
