"""Rendered scenes: the embedded, deterministic stand-in for COCO, saved in COCO's own format.

A scene is a square picture of 2 x 2 cells on a plain, noisy, grey ground; 1 to `max_objects` cells hold one object
each, of distinct categories. Every category is one bold shape in its own colour, so that it survives down-scaling to
14 x 14 pixels, which is what the Qwen image processor leaves of a cell when a scene becomes one visual token.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from laid.errors import LaidError
from laid.io import atomic_path, write_json
from laid.progress import Progress

GRID = 2
SUPERSAMPLE = 3
MARK = "laid rendered scenes"

Polygon = list[tuple[float, float]]


def _regular(corners: int, radius: float = 1.0, turn: float = 0.0) -> Polygon:
    step = 2 * math.pi / corners
    return [(radius * math.sin(turn + k * step), -radius * math.cos(turn + k * step)) for k in range(corners)]


def _arc(radius: float, start: float, end: float, steps: int = 14, dx: float = 0.0) -> Polygon:
    angles = [start + (end - start) * k / steps for k in range(steps + 1)]
    return [(dx + radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def _star() -> Polygon:
    outer, inner = _regular(5), _regular(5, 0.42, math.pi / 5)
    return [point for pair in zip(outer, inner) for point in pair]


def _half_ring(start: float) -> Polygon:
    return _arc(0.96, start, start + math.pi) + _arc(0.5, start + math.pi, start)


def _heart() -> Polygon:
    points = []
    for k in range(28):
        t = 2 * math.pi * k / 28
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 15.5))
    return points


# name -> (RGB, polygons in the unit square [-1, 1]^2, y downwards). Several polygons of one object do not overlap:
# COCO polygons have no holes, so a ring is two halves.
CATEGORIES: dict[str, tuple[tuple[int, int, int], list[Polygon]]] = {
    "disc": ((214, 24, 44), [_regular(28, 0.95)]),
    "ring": ((20, 60, 220), [_half_ring(0.0), _half_ring(math.pi)]),
    "square": ((40, 170, 50), [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]]),
    "frame": (
        (245, 125, 20),
        [
            [(-0.95, -0.95), (0.95, -0.95), (0.95, -0.5), (-0.5, -0.5), (-0.5, 0.95), (-0.95, 0.95)],
            [(0.95, -0.5), (0.95, 0.95), (-0.5, 0.95), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)],
        ],
    ),
    "triangle": ((125, 30, 170), [[(0, -0.95), (0.95, 0.85), (-0.95, 0.85)]]),
    "cross": (
        (250, 245, 235),
        [
            [(x / 3, y / 3) for x, y in [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]]
            + [(x / 3, y / 3) for x, y in [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]]
        ],
    ),
    "star": ((255, 225, 25), [_star()]),
    "diamond": ((30, 205, 235), [[(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]]),
    "heart": ((250, 80, 170), [_heart()]),
    "moon": (
        (240, 225, 150),
        [
            _arc(0.97, math.radians(123), math.radians(417))
            + _arc(0.66, math.radians(396.4), math.radians(143.6), dx=0.42)
        ],
    ),
    "arrow": (
        (110, 65, 25),
        [[(-0.95, -0.3), (0.05, -0.3), (0.05, -0.85), (0.98, 0), (0.05, 0.85), (0.05, 0.3), (-0.95, 0.3)]],
    ),
    "bar": ((12, 12, 70), [[(-0.98, -0.36), (0.98, -0.36), (0.98, 0.36), (-0.98, 0.36)]]),
    "chevron": (
        (170, 240, 70),
        [[(-0.95, -0.1), (0, -0.95), (0.95, -0.1), (0.95, 0.75), (0, -0.1), (-0.95, 0.75)]],
    ),
    "hexagon": ((0, 120, 115), [_regular(6, 0.95, math.pi / 6)]),
    "bolt": (
        (190, 170, 255),
        [[(0.3, -1), (-0.7, 0.15), (-0.12, 0.15), (-0.35, 1), (0.7, -0.25), (0.1, -0.25), (0.75, -1)]],
    ),
    "post": ((90, 0, 20), [[(-0.34, -0.98), (0.34, -0.98), (0.34, 0.98), (-0.34, 0.98)]]),
}


def draw_scene(
    rng: np.random.Generator, canvas: int, max_objects: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One scene: (pixels (canvas, canvas, 3) uint8, objects [{"category": name, "polygons": [[x0, y0, x1, ...]]}]).

    Polygons are in pixels of the picture, the same that are drawn. The number of objects is uniform in
    1..max_objects, categories and cells are uniform without repetition.
    """
    from PIL import Image, ImageDraw

    names = list(CATEGORIES)
    count = int(rng.integers(1, max_objects + 1))
    chosen = rng.choice(len(names), count, replace=False)
    cells = rng.choice(GRID * GRID, count, replace=False)
    ground = float(rng.uniform(112, 142))
    wide = canvas * SUPERSAMPLE
    picture = Image.new("RGB", (wide, wide), (int(ground),) * 3)
    pen = ImageDraw.Draw(picture)
    cell = canvas / GRID
    objects = []
    for category, place in zip(chosen, cells):
        colour, shapes = CATEGORIES[names[category]]
        tint = tuple(int(min(255, max(0, c + rng.uniform(-14, 14)))) for c in colour)
        half = cell / 2 * float(rng.uniform(0.74, 0.88))
        slack = cell / 2 - half * 1.04
        cx = (place % GRID + 0.5) * cell + float(rng.uniform(-slack, slack))
        cy = (place // GRID + 0.5) * cell + float(rng.uniform(-slack, slack))
        tilt = float(rng.uniform(-0.1, 0.1))
        cos, sin = math.cos(tilt) * half, math.sin(tilt) * half
        polygons = []
        for shape in shapes:
            points = [(round(cx + x * cos - y * sin, 2), round(cy + x * sin + y * cos, 2)) for x, y in shape]
            # Pillow cuts coordinates off, so that this, not a shift by half a sub-pixel, is where COCO's polygon lies.
            pen.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=tint)
            polygons.append([value for point in points for value in point])
        objects.append({"category": names[category], "polygons": polygons})
    pixels = np.asarray(picture.resize((canvas, canvas), Image.Resampling.BOX), dtype=np.int16)
    noise = rng.integers(-9, 10, (canvas, canvas, 1), dtype=np.int16)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), objects


def polygon_area(polygon: list[float]) -> float:
    """Area inside a flat [x0, y0, x1, y1, ...] polygon (shoelace formula), in square pixels."""
    x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _instances(split: str, scenes: list[tuple[int, int, list[dict]]]) -> dict[str, Any]:
    numbers = {name: k + 1 for k, name in enumerate(CATEGORIES)}
    images, annotations = [], []
    for image_id, canvas, objects in scenes:
        images.append(
            {
                "id": image_id,
                "file_name": f"{image_id:012d}.png",
                "width": canvas,
                "height": canvas,
                "license": 1,
                "date_captured": "2017-01-01 00:00:00",
            }
        )
        for entry in objects:
            xs = [v for polygon in entry["polygons"] for v in polygon[0::2]]
            ys = [v for polygon in entry["polygons"] for v in polygon[1::2]]
            annotations.append(
                {
                    "id": (1 if split == "val2017" else 10_000_000) + len(annotations),
                    "image_id": image_id,
                    "category_id": numbers[entry["category"]],
                    "segmentation": entry["polygons"],
                    "area": round(sum(map(polygon_area, entry["polygons"])), 3),
                    "bbox": [round(v, 2) for v in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": MARK, "version": "1.0", "year": 2017, "contributor": "laid", "split": split},
        "licenses": [
            {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}
        ],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name, "supercategory": "shape"} for name, k in numbers.items()],
    }


_OURS = re.compile(r"annotations/instances_(train|val)2017\.json|(train|val)2017/\d{12}\.png|laid\.json")


def is_rendered(folder: str | Path) -> bool:
    """Whether `folder` holds nothing but data that `render` made (whole or not), and may therefore be replaced."""
    folder = Path(folder)
    if not folder.is_dir() or folder.is_symlink():
        return False
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    if any(path.is_symlink() or not _OURS.fullmatch(path.relative_to(folder).as_posix()) for path in files):
        return False
    return all(MARK.encode() in path.read_bytes() for path in files if path.match("annotations/*.json"))


def render(
    out: str | Path, train: int, val: int, canvas: int = 84, max_objects: int = 4, seed: int = 0
) -> None:
    """Draw `train` + `val` scenes into a fresh COCO root `out`; all of it appears at once or not at all.

    The same arguments give the same bytes. Ids: val2017 counts from 1, train2017 from 100001.
    Raises LaidError for sizes that make no sense, or where `out` holds something that is not rendered data.
    """
    if not 1 <= max_objects <= GRID * GRID:
        raise LaidError(
            f"data.rendered.max_objects is {max_objects}: a scene has {GRID * GRID} cells, give 1 to {GRID * GRID}"
        )
    if canvas < 28:
        raise LaidError(f"data.rendered.canvas is {canvas} pixels: give at least 28, one visual token")
    if not 1 <= train < 900_000 or not 1 <= val < 100_000:
        raise LaidError(
            f"data.rendered asks for {train} train and {val} val images: give 1..899999 and 1..99999"
        )
    out = Path(out)
    if (out.exists() or out.is_symlink()) and not is_rendered(out):
        raise LaidError(
            f"{out}: exists and is not rendered data, so it is not replaced: remove it or choose another folder"
        )
    from PIL import Image

    with atomic_path(out) as folder, Progress(train + val, "rendering scenes", "image") as progress:
        for split, count, first, code in (("val2017", val, 1, 1), ("train2017", train, 100_001, 0)):
            (folder / split).mkdir(parents=True)
            scenes = []
            for number in range(count):
                rng = np.random.default_rng([seed, code, number])
                pixels, objects = draw_scene(rng, canvas, max_objects)
                image_id = first + number
                Image.fromarray(pixels).save(folder / split / f"{image_id:012d}.png", compress_level=2)
                scenes.append((image_id, canvas, objects))
                progress.update()
            write_json(
                folder / "annotations" / f"instances_{split}.json", _instances(split, scenes), indent=None
            )
