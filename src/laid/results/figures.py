"""The figures drawn from cells: accuracy over images, the bars of Figure 3, needle positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from laid.evaluation.cells import interval_of
from laid.evaluation.scoring import is_right
from laid.results.plotting import (
    COLUMN,
    METHOD_LOOKS,
    MODEL_LOOKS,
    PAGE,
    Drawing,
    Look,
    image_axis,
    new_figure,
    percent,
    style,
    tip,
)
from laid.results.render import Entry, Table
from laid.results.tables import METHOD_NAMES, Grid

BINS = 5  # needle positions are counted in fifths of the haystack


def build(grid: Grid) -> list[Drawing]:
    """All figures that cells alone can give."""
    with style():
        drawings = [figure1(grid), methods(grid), figure3(grid)]
        positions = needle_position(grid)
        return [*drawings, *([positions] if positions else [])]


def figure1(grid: Grid) -> Drawing:
    """Accuracy over images of the teacher and the base students, with 95 % bands and the effective window."""
    members = [grid.teacher, *grid.students]
    curves = [(member, "base", name_of(grid, member), MODEL_LOOKS[i % 4]) for i, member in enumerate(members)]
    figure = new_figure(COLUMN, 2.7)
    axes = figure.add_subplot()
    rows = _curves(axes, grid, curves)
    _below(figure, axes, columns=1)
    threshold = grid.settings["threshold"]
    return Drawing(
        "figure1",
        "Figure 1. Window shrinkage",
        f"Accuracy over images in the haystack before any post-training, with 95 % intervals. Dashed: the threshold"
        f" {threshold:g}; the tick on it marks the effective window, the largest haystack answered at that accuracy."
        f" {grid.questions_note()}",
        figure,
        [["student", "method", "images", "accuracy", "low", "high", "window_low", "window_high"], *rows],
    )


def methods(grid: Grid) -> Drawing:
    """Accuracy over images of every method, one panel a student, the teacher in grey."""
    figure = new_figure(PAGE, 3.0)
    panels = figure.subplots(1, len(grid.students), sharey=True, squeeze=False)[0]
    rows: list[list[str]] = []
    for axes, student in zip(panels, grid.students, strict=True):
        teacher = (grid.teacher, "base", "teacher", Look("#888888", "", "-"))
        curves = [
            (student, method, METHOD_NAMES[method], METHOD_LOOKS[method])
            for method in grid.settings["methods"]
        ]
        rows += _curves(axes, grid, [teacher, *curves], bands=("base", "laid"), in_legend=False)
        axes.set_title(name_of(grid, student), loc="left", fontweight="bold")
        if axes is not panels[0]:
            axes.set_ylabel("")
    _below(figure, panels[0], columns=4)
    return Drawing(
        "methods",
        "Every method over images",
        "Accuracy over images for every method; bands: 95 % intervals of base and LAid. Ticks on the dashed line mark"
        f" effective windows. {grid.questions_note()}",
        figure,
        [["student", "method", "images", "accuracy", "low", "high", "window_low", "window_high"], *rows],
    )


def _curves(
    axes: Any,
    grid: Grid,
    curves: Sequence[tuple[str, str, str, Look]],
    bands: Sequence[str] | None = None,
    in_legend: bool = True,
) -> list[list[str]]:
    """Draw (student, method, name, look) curves; returns their CSV rows."""
    threshold, sizes, rows = grid.settings["threshold"], grid.sizes, []
    axes.axhline(100 * threshold, color="#555555", linewidth=0.7, linestyle=(0, (4, 3)))
    for student, method, name, look in curves:
        cells = [grid.cell(student, method, size) for size in sizes]
        window = grid.window(student, method, threshold)
        label = f"{name}: window {window.text()}" if in_legend else name
        values = [100 * cell["accuracy"] for cell in cells]
        axes.plot(
            sizes, values, color=look.color, linestyle=look.dash, marker=look.marker, label=label, zorder=3
        )
        if bands is None or method in bands:
            low, high = ([100 * cell["interval"][i] for cell in cells] for i in (0, 1))
            axes.fill_between(sizes, low, high, color=look.color, alpha=0.15, linewidth=0)
        if window.low == window.high:
            axes.plot(
                [window.low],
                [100 * threshold],
                marker="|",
                markersize=9,
                markeredgewidth=1.6,
                color=look.color,
            )
        for size, cell in zip(sizes, cells, strict=True):
            rows.append(
                [
                    student,
                    method,
                    str(size),
                    f"{cell['accuracy']:.6f}",
                    *(f"{v:.6f}" for v in cell["interval"]),
                    _bound(window.low),
                    _bound(window.high),
                ]
            )
            text = f"{name}, {size} images: {percent(cell['accuracy'], cell['interval'])} %"
            (spot,) = axes.plot([size], [100 * cell["accuracy"]], "o", markersize=9, alpha=0, zorder=4)
            tip(spot, text)
    image_axis(axes, sizes)
    axes.set_ylabel("Accuracy (%)")
    axes.set_ylim(*_limits(axes))
    return rows


def _limits(axes: Any) -> tuple[float, float]:
    """From the ten below the lowest drawn value to a little above 100."""
    low = min(min(line.get_ydata()) for line in axes.lines)
    return 10 * math.floor((low - 3) / 10), 102


def _below(figure: Any, axes: Any, columns: int) -> None:
    """One legend below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def figure3(grid: Grid) -> Drawing:
    """Bars of base, KD and LAid over images, one panel a student (Figure 3 of the paper)."""
    sizes = grid.columns("table3_omit")
    shown = [m for m in ("base", "kd", "laid") if m in grid.settings["methods"]]
    figure = new_figure(PAGE, 2.5)
    panels = figure.subplots(1, len(grid.students), sharey=True, squeeze=False)[0]
    rows: list[list[str]] = []
    for axes, student in zip(panels, grid.students, strict=True):
        for m, method in enumerate(shown):
            look, width = METHOD_LOOKS[method], 0.8 / len(shown)
            for k, size in enumerate(sizes):
                cell = grid.cell(student, method, size)
                x, height = k - 0.4 + (m + 0.5) * width, 100 * cell["accuracy"]
                low, high = (100 * v for v in cell["interval"])
                (bar,) = axes.bar(
                    [x], [height], width, label=METHOD_NAMES[method] if k == 0 else None,
                    color="white" if method == "base" else look.color, edgecolor="black", linewidth=0.6, hatch=look.hatch,
                )  # fmt: skip
                axes.errorbar(
                    [x],
                    [height],
                    [[height - low], [high - height]],
                    color="black",
                    linewidth=0.8,
                    capsize=1.5,
                )
                tip(
                    bar,
                    f"{METHOD_NAMES[method]}, {size} images: {percent(cell['accuracy'], cell['interval'])} %",
                )
                rows.append(
                    [student, method, str(size), *(f"{v:.6f}" for v in (cell["accuracy"], *cell["interval"]))]
                )
        axes.axhline(50, color="#555555", linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("Images in the haystack")
        axes.set_title(name_of(grid, student), loc="left", fontweight="bold")
    panels[0].set_ylabel("Accuracy (%)")
    panels[0].set_ylim(0, 104)
    _below(figure, panels[0], columns=3)
    return Drawing(
        "figure3",
        "Figure 3. Base, KD and LAid",
        f"Base, plain distillation (L_KL + L_SFT) and LAid; whiskers: 95 % intervals; dashed: chance. {grid.questions_note()}",
        figure,
        [["student", "method", "images", "accuracy", "low", "high"], *rows],
    )


def needle_position(grid: Grid) -> Drawing | None:
    """Accuracy by the needle's place in the haystack, a row a model, a column a size; None without single needles.

    As Visual Haystacks draws it, in fifths: a needle at image i of n lies in fifth floor(5 i / n).
    """
    sizes = [size for size in grid.sizes if size >= 2 * BINS][-4:]
    models = [(grid.teacher, ["base"])]
    shown = [m for m in ("base", "sft", "kd", "laid") if m in grid.settings["methods"]]
    models += [(student, shown) for student in grid.students]
    counts = {
        (student, method, size): by_position(grid.cell(student, method, size))
        for student, methods_shown in models
        for method in methods_shown
        for size in sizes
    }
    if not any(right.size for bins in counts.values() for right in bins):
        return None
    figure = new_figure(PAGE, 1.5 * len(models) + 0.8)
    panels = figure.subplots(len(models), len(sizes), sharex=True, sharey=True, squeeze=False)
    rows = [
        row
        for student, method in grid.models
        for size in sizes
        for row in _position_rows(student, method, size, by_position(grid.cell(student, method, size)))
    ]
    for (student, methods_shown), row in zip(models, panels, strict=True):
        for size, axes in zip(sizes, row, strict=True):
            axes.axhline(50, color="#555555", linewidth=0.7, linestyle=(0, (4, 3)))
            for m, method in enumerate(methods_shown):
                shift = 0.12 * (m - (len(methods_shown) - 1) / 2)
                _position_line(axes, method, size, counts[student, method, size], shift)
        row[0].set_ylabel(f"{name_of(grid, student)}\naccuracy (%)")
    for size, axes in zip(sizes, panels[0], strict=True):
        axes.set_title(f"{size} images", loc="left", fontweight="bold")
    for axes in panels[-1]:
        axes.set_xticks(range(BINS), [str(i + 1) for i in range(BINS)])
        axes.set_xlabel("Fifth of the haystack")
    panels[0][0].set_ylim(10 * math.floor(min(100 * float(row[6]) for row in rows) / 10), 104)
    _below(figure, panels[-1][0], columns=4)
    return Drawing(
        "needle_position",
        "Accuracy by needle position",
        "Accuracy by the needle's place in the haystack (first to last fifth), with 95 % intervals; dashed: chance. A level line knows"
        f' no place; a dip in the middle is "lost in the middle". Every model stands in the CSV file. {grid.questions_note()}',
        figure,
        [["student", "method", "images", "fifth", "answers", "accuracy", "low", "high"], *rows],
    )


def _position_rows(student: str, method: str, size: int, bins: Sequence[np.ndarray]) -> list[list[str]]:
    """CSV rows of one model at one size: accuracy and interval of every fifth that was asked."""
    rows = []
    for place, right in enumerate(bins):
        if right.size:
            (low, high), _ = interval_of(right)
            values = [f"{v:.6f}" for v in (right.mean(), low, high)]
            rows.append([student, method, str(size), str(place + 1), str(right.size), *values])
    return rows


def _position_line(axes: Any, method: str, size: int, bins: Sequence[np.ndarray], shift: float) -> None:
    look, points = METHOD_LOOKS[method], []
    for place, right in enumerate(bins):
        if not right.size:
            continue
        (low, high), _ = interval_of(right)
        share = float(right.mean())
        points.append((place + shift, 100 * share, 100 * (share - low), 100 * (high - share)))
        (spot,) = axes.plot([place + shift], [100 * share], "o", markersize=9, alpha=0, zorder=4)
        what = f"{METHOD_NAMES[method]}, {size} images, fifth {place + 1}"
        tip(spot, f"{what}: {percent(share, (low, high))} % of {right.size}")
    xs, ys, below, above = zip(*points, strict=True) if points else ([], [], [], [])
    axes.errorbar(
        xs, ys, [below, above], color=look.color, marker=look.marker, linestyle=look.dash, linewidth=1,
        elinewidth=0.6, label=METHOD_NAMES[method],
    )  # fmt: skip


def by_position(cell: dict[str, Any], bins: int = BINS) -> list[np.ndarray]:
    """Right answers (seeds, questions) by the needle's place, floor(bins * index / size); single needles only."""
    seeds = {seed: i for i, seed in enumerate(cell["seeds"])}
    places: list[dict[Any, list[int]]] = [{} for _ in range(bins)]
    for answer in cell["answers"]:
        if len(answer["needles"]) == 1:
            place = places[bins * answer["needles"][0] // cell["size"]]
            place.setdefault(answer["id"], [0] * len(seeds))[seeds[answer["seed"]]] = int(is_right(answer))
    return [np.array(list(place.values()), dtype=np.int8).reshape(-1, len(seeds)).T for place in places]


def summary(grid: Grid) -> list[Table]:
    """What Figures 1 and 3 show, as tables for a terminal."""
    members = [(member, "base") for member in (grid.teacher, *grid.students)]
    shown = [m for m in ("base", "kd", "laid") if m in grid.settings["methods"]]
    bars = [(student, method) for student in grid.students for method in shown]
    out = []
    for name, title, lines, sizes in (
        ("figure1", "Figure 1. Accuracy (%) before post-training", members, grid.sizes),
        ("figure3", "Figure 3. Accuracy (%) of base, KD and LAid", bars, grid.columns("table3_omit")),
    ):
        rows, breaks = [], set()
        for i, (student, method) in enumerate(lines):
            if method == "base" and i and name == "figure3":
                breaks.add(i)
            values = [Entry(percent(a)) for a in grid.accuracies(student, method, sizes)]
            window = Entry(grid.window(student, method, grid.settings["threshold"]).text())
            rows.append([Entry(name_of(grid, student)), Entry(METHOD_NAMES[method]), *values, window])
        header = ["Model", "Method", *map(str, sizes), f"Window {grid.settings['threshold']:g}"]
        out.append(Table(name, title, header, rows, [], [], breaks))
    return out


def name_of(grid: Grid, student: str) -> str:
    """As "small (0.35M)": the member's name and its label."""
    label = grid.cell(student, "base", grid.sizes[0])["label"]
    return student if student == label else f"{student} ({label})"


def _bound(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.4f}"
