"""The tables as `dvc metrics` and `dvc plots` read them: numbers to compare between two commits."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from laid.io import dumps
from laid.results.places import update
from laid.results.tables import Grid


def metrics(grid: Grid) -> dict[str, Any]:
    """{student: {method: {"accuracy": {size: percent}, "window": images}}}, windows at the tables' threshold.

    A window is a bound where accuracy never crosses the threshold; then its text (">= 150") stands for it.
    """
    found: dict[str, Any] = {}
    for student, method in grid.models:
        cells = {size: grid.cell(student, method, size) for size in grid.sizes}
        window = grid.window(student, method, grid.settings["threshold"])
        found.setdefault(student, {})[method] = {
            "accuracy": {str(size): round(100 * cell["accuracy"], 2) for size, cell in cells.items()},
            "window": round(window.low, 2) if window.low == window.high else window.text(),
        }
    return found


def curves(grid: Grid) -> str:
    """CSV of accuracies in percent: one row per size, one column per student and method."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["images", *(f"{student} {method}" for student, method in grid.models)])
    for size in grid.sizes:
        row = [f"{100 * grid.cell(*model, size)['accuracy']:.2f}" for model in grid.models]
        writer.writerow([size, *row])
    return out.getvalue()


def write(grid: Grid, out: str | Path) -> None:
    """Write metrics.json and curves.csv below `out`, where they changed."""
    update(Path(out) / "metrics.json", dumps(metrics(grid)) + "\n")
    update(Path(out) / "curves.csv", curves(grid))
