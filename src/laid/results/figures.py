"""The figures drawn from cells: accuracy over images, the bars of Figure 3, needle positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from laid.evaluation.cells import interval_of
from laid.results import plotting
from laid.results.answers import Model, Results
from laid.results.names import LAID, SHIPPED
from laid.results.plotting import Drawing, Look, style
from laid.results.render import percent
from laid.results.windows import bound_text, window

BINS = 5  # needle positions are counted in fifths of the haystack


def build(results: Results) -> list[Drawing]:
    """All figures that cells alone can give."""
    with style():
        drawings = [figure1(results), methods(results), figure3(results), needle_position(results)]
    return [drawing for drawing in drawings if drawing]


def measured(results: Results, models: Sequence[Model], sizes: Sequence[int]) -> pd.DataFrame:
    """student, method, images, accuracy, low, high of cells, as the CSV files hold them."""
    found = results.cells.loc[[(*model, size) for model in models for size in sizes]].reset_index(drop=True)
    found = found[["student", "method", "size", "accuracy", "low", "high"]].rename(columns={"size": "images"})
    return found.assign(**{name: plotting.decimals(found[name]) for name in ("accuracy", "low", "high")})


def figure1(results: Results) -> Drawing:
    """Accuracy over images of the teacher and the base students, with 95 % bands and the effective window."""
    members = [results.teacher, *results.students]
    lines = [
        ((member, "base"), results.member(member), plotting.MODEL_LOOKS[i % 4])
        for i, member in enumerate(members)
    ]
    figure = plotting.new_figure(plotting.COLUMN, 2.7)
    axes = figure.add_subplot()
    data = _curves(axes, results, lines)
    plotting.legend_below(figure, axes, columns=1)
    threshold = results.threshold
    return Drawing(
        "figure1",
        "Figure 1. Window shrinkage",
        f"Accuracy over images in the haystack before any post-training, with 95 % intervals. Dashed: the threshold"
        f" {threshold:g}; the tick on it marks the effective window, the largest haystack answered at that accuracy."
        f" {results.questions_note()}",
        figure,
        data,
    )


def methods(results: Results) -> Drawing:
    """Accuracy over images of every method, one panel per student, the teacher in grey."""
    figure = plotting.new_figure(plotting.PAGE, 3.0)
    panels = figure.subplots(1, len(results.students), sharey=True, squeeze=False)[0]
    looks, data = plotting.method_looks(results.names), []
    for axes, student in zip(panels, results.students, strict=True):
        lines = [((results.teacher, "base"), "teacher", Look(plotting.GREY, "", "-"))]
        lines += [((student, m), results.names[m], looks[m]) for m in results.settings.tables.methods]
        data.append(_curves(axes, results, lines, bands=("base", *LAID), in_legend=False))
        axes.set_title(results.member(student), loc="left", fontweight="bold")
        if axes is not panels[0]:
            axes.set_ylabel("")
    plotting.legend_below(figure, panels, columns=4)
    return Drawing(
        "methods",
        "Every method over images",
        "Accuracy over images for every method; bands: 95 % intervals of base, LAid and LAid+. Ticks on the dashed line mark"
        f" effective windows. {results.questions_note()}",
        figure,
        pd.concat(data),
    )


def _curves(
    axes: Any,
    results: Results,
    lines: Sequence[tuple[Model, str, Look]],
    bands: Sequence[str] | None = None,
    in_legend: bool = True,
) -> pd.DataFrame:
    """Draw (model, name, look) curves with a tick at each effective window; returns what was drawn."""
    threshold, sizes = results.threshold, results.sizes
    axes.axhline(100 * threshold, **plotting.RULE)
    windows = [window(results, model, threshold) for model, _, _ in lines]
    for (model, name, look), own in zip(lines, windows, strict=True):
        cells = results.cells.loc[[(*model, size) for size in sizes]]
        plotting.curve(
            axes, sizes, cells.accuracy, look, f"{name}: window {own.text()}" if in_legend else name, zorder=3
        )
        if bands is None or model[1] in bands:
            axes.fill_between(
                sizes, 100 * cells.low, 100 * cells.high, color=look.color, alpha=0.15, linewidth=0
            )
        if own.exact and own.low <= sizes[-1]:
            tick = {"marker": "|", "markersize": 9, "markeredgewidth": 1.6, "color": look.color}
            axes.plot([own.low], [100 * threshold], **tick)
        texts = (plotting.point_tip(name, c.size, c.accuracy, (c.low, c.high)) for c in cells.itertuples())
        plotting.hover(axes, sizes, cells.accuracy, texts)
    plotting.image_axis(axes, sizes)
    axes.set_ylabel("Accuracy (%)")
    lowest = min(min(line.get_ydata()) for line in axes.lines)
    axes.set_ylim(10 * math.floor((lowest - 3) / 10), 102)
    ends = {
        f"window_{end}": [bound_text(getattr(w, end)) for w in windows for _ in sizes]
        for end in ("low", "high")
    }
    return measured(results, [model for model, _, _ in lines], sizes).assign(**ends)


def figure3(results: Results) -> Drawing:
    """Bars of base, KD, LAid and LAid+ over images, one panel per student (Figure 3 of the paper)."""
    sizes, shown, looks = (
        results.columns("table3_omit"),
        _bar_methods(results),
        plotting.method_looks(results.names),
    )
    figure = plotting.new_figure(plotting.PAGE, 2.5)
    panels = figure.subplots(1, len(results.students), sharey=True, squeeze=False)[0]
    width = 0.8 / len(shown)
    for axes, student in zip(panels, results.students, strict=True):
        for m, method in enumerate(shown):
            name, look = results.names[method], looks[method]
            for k, size in enumerate(sizes):
                cell, x = results.cell(student, method, size), k - 0.4 + (m + 0.5) * width
                (bar,) = axes.bar(
                    [x], [100 * cell.accuracy], width, label=name if k == 0 else None, hatch=look.hatch,
                    color="white" if method == "base" else look.color, edgecolor="black", linewidth=0.6,
                )  # fmt: skip
                more = {"linestyle": "-", "elinewidth": None, "linewidth": 0.8, "capsize": 1.5}
                plotting.bars(axes, [x], [cell.accuracy], [cell.low], [cell.high], "black", **more)
                plotting.tip(bar, plotting.point_tip(name, size, cell.accuracy, (cell.low, cell.high)))
        axes.axhline(50, **plotting.RULE)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("Images in the haystack")
        axes.set_title(results.member(student), loc="left", fontweight="bold")
    panels[0].set_ylabel("Accuracy (%)")
    panels[0].set_ylim(0, 104)
    plotting.legend_below(figure, panels, columns=3)
    return Drawing(
        "figure3",
        "Figure 3. Base, KD, LAid and LAid+",
        f"Base, plain distillation (L_KL + L_SFT), LAid and LAid+; whiskers: 95 % intervals; dashed: chance. {results.questions_note()}",
        figure,
        measured(results, [(student, method) for student in results.students for method in shown], sizes),
    )


def _bar_methods(results: Results) -> list[str]:
    return [m for m in ("base", "kd", *LAID) if m in results.settings.tables.methods]


def by_position(results: Results, bins: int = BINS) -> pd.DataFrame:
    """student, method, images, fifth (from 1), answers, accuracy, low, high: by the needle's place in the haystack.

    A needle at image i of n lies in place floor(bins i / n); questions with several needles have none.
    """
    single = results.answers[results.answers["needles"].str.len() == 1]
    places = bins * single["needles"].str[0].astype(int) // single["size"] + 1
    order = {model: i for i, model in enumerate(results.models)}
    rows = []
    for (student, method, size, place), part in single.groupby(
        ["student", "method", "size", places.rename("fifth")]
    ):
        if (student, method) in order:
            right = part["correct"].to_numpy(np.int8).reshape(part["seed"].nunique(), -1)
            interval, _ = interval_of(right)
            rows.append((student, method, size, place, right.size, float(right.mean()), *interval))
    names = ["student", "method", "images", "fifth", "answers", "accuracy", "low", "high"]
    return pd.DataFrame(sorted(rows, key=lambda row: (order[row[:2]], row[2:4])), columns=names)


def needle_position(results: Results) -> Drawing | None:
    """Accuracy by the needle's place in the haystack, one row per model, one column per size; None without single needles.

    As Visual Haystacks draws it, in fifths.
    """
    sizes = [size for size in results.sizes if size >= 2 * BINS][-4:]
    found = by_position(results)
    found = found[found["images"].isin(sizes)]
    if found.empty:
        return None
    looks = plotting.method_looks(results.names)
    drawn = ("base", "sft", "kd", *LAID)
    shown = [m for m in results.settings.tables.methods if m in drawn or m not in SHIPPED]
    models = [(results.teacher, ["base"]), *((student, shown) for student in results.students)]
    figure = plotting.new_figure(plotting.PAGE, 1.5 * len(models) + 0.8)
    panels = figure.subplots(len(models), len(sizes), sharex=True, sharey=True, squeeze=False)
    for (student, methods_shown), row in zip(models, panels, strict=True):
        for size, axes in zip(sizes, row, strict=True):
            axes.axhline(50, **plotting.RULE)
            for m, method in enumerate(methods_shown):
                part = found[(found.student == student) & (found.method == method) & (found.images == size)]
                xs = part.fifth - 1 + 0.12 * (m - (len(methods_shown) - 1) / 2)
                look, name = looks[method], results.names[method]
                texts = (
                    f"{name}, {size} images, fifth {p.fifth}: {percent(p.accuracy, (p.low, p.high))} % of {p.answers}"
                    for p in part.itertuples()
                )
                plotting.hover(axes, xs, part.accuracy, texts)
                more = {"marker": look.marker, "linestyle": look.dash, "linewidth": 1, "label": name}
                plotting.bars(axes, xs, part.accuracy, part.low, part.high, look.color, **more)
        row[0].set_ylabel(f"{results.member(student)}\naccuracy (%)")
    for size, axes in zip(sizes, panels[0], strict=True):
        axes.set_title(f"{size} images", loc="left", fontweight="bold")
    for axes in panels[-1]:
        axes.set_xticks(range(BINS), [str(i + 1) for i in range(BINS)])
        axes.set_xlabel("Fifth of the haystack")
    panels[0][0].set_ylim(10 * math.floor(100 * found.low.min() / 10), 104)
    plotting.legend_below(figure, panels, columns=4)
    return Drawing(
        "needle_position",
        "Accuracy by needle position",
        "Accuracy by the needle's place in the haystack (first to last fifth), with 95 % intervals; dashed: chance. A level line knows"
        f' no place; a dip in the middle is "lost in the middle". Every model stands in the CSV file. {results.questions_note()}',
        figure,
        found.assign(**{name: plotting.decimals(found[name]) for name in ("accuracy", "low", "high")}),
    )
