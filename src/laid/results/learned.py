"""What LAid learned beside the weights: gains per head and frequency, and how teacher heads are mixed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from laid.errors import LaidError
from laid.io import read_json
from laid.results.plotting import PAGE, Drawing, new_figure, style

MAP = "cividis"  # even in lightness: it reads the same in grey and to colour-blind readers


# Gains may be shared by all frequencies of a section (time, height, width), or of a head.
_COLUMNS = {1: "All frequencies", 3: "Section: time, height, width"}


def load(
    folder: str | Path, students: Sequence[str], method: str = "laid"
) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of learned.json of each student's first seed, by student; students without a run are left out."""
    found = {}
    for student in students:
        path = next(iter(sorted(Path(folder).glob(f"{student}/{method}/seed*/learned.json"))), None)
        if path is None:
            continue
        content = read_json(path)
        try:
            found[student] = {key: np.array(value, dtype=float) for key, value in content.items()}
        except (AttributeError, TypeError, ValueError):
            raise LaidError(f"{path}: expected names with arrays of numbers; train this run again") from None
    return found


def build(learned: dict[str, dict[str, np.ndarray]], method_name: str = "LAid") -> list[Drawing]:
    """The figure "learned", or nothing where no run has gains or head weights."""
    panels = [
        (student, kind, values)
        for student, arrays in learned.items()
        for kind, values in (("gain", _gains(arrays)), ("mixture", _mixture(arrays)))
        if values is not None
    ]
    if not panels:
        return []
    with style():
        return [_draw(panels, method_name)]


def _gains(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Gain factors (layers, heads, columns), from gain.log_gain of the same shape."""
    logs = arrays.get("gain.log_gain")
    return None if logs is None or logs.ndim != 3 else np.exp(logs)


def _mixture(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Weights (student heads, teacher heads) of equation 7, of the first pair of layers."""
    keys = sorted(
        k for k, v in arrays.items() if k.startswith("alignment.") and k.endswith(".w") and v.ndim == 2
    )
    return arrays[keys[0]] if keys else None


def _draw(panels: Sequence[tuple[str, str, np.ndarray]], method_name: str) -> Drawing:
    students = list(dict.fromkeys(student for student, _, _ in panels))
    figure = new_figure(PAGE, 2.1 * len(students) + 0.2)
    grid = figure.subplots(len(students), 2, squeeze=False, width_ratios=[2, 1])
    for axes in grid.flat:
        axes.set_visible(False)
    rows: list[list[str]] = []
    for student, kind, values in panels:
        axes = grid[students.index(student)][int(kind == "mixture")]
        axes.set_visible(True)
        axes.grid(visible=False)
        heads = values.shape[-2]
        flat = values.reshape(-1, values.shape[-1])
        image = axes.imshow(flat, cmap=MAP, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if kind == "gain":
            title, below = "gain", _COLUMNS.get(flat.shape[1], "RoPE frequency, high to low")
            axes.set_ylabel("Layer.head")
            shown = range(0, len(flat), -(-len(flat) // 12))
            axes.set_yticks(shown, [f"{row // heads}.{row % heads}" for row in shown])
            for layer in range(heads, len(flat), heads):
                axes.axhline(layer - 0.5, color="white", linewidth=0.8)
        else:
            title, below = "w of equation 7", "Teacher head"
            axes.set_ylabel("Student head")
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(f"{student}: {title}", loc="left")
        axes.set_xlabel(below)
        rows += [[student, kind, str(r), str(c), f"{v:.6g}"] for (r, c), v in np.ndenumerate(flat)]
    caption = (
        f"{method_name}, first seed. Left: the learned gain of each query head on each RoPE frequency, 1 where nothing was"
        " learned. Right: how much of each teacher head stands in the target of each student head."
    )
    return Drawing(
        "learned",
        "Learned gains and head weights",
        caption,
        figure,
        [["student", "kind", "row", "column", "value"], *rows],
    )
