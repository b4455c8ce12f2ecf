"""Tables 1, 2 and 3 of the paper, and the same numbers for `dvc metrics` and `dvc plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from laid.io import dumps, update
from laid.results.answers import Results
from laid.results.comparisons import star_note, stars_against_base, tests_table
from laid.results.names import NOT_IN_PAPER
from laid.results.needed import table3_student
from laid.results.render import BEST, SECOND, Entry, Table, listed
from laid.results.statistics import mean_relative_gain
from laid.results.windows import continued, published_windows, window, window_tables

Block = tuple[str, Sequence[str]]  # a student and its methods


def build(results: Results) -> list[Table]:
    """Table 1, the same beyond the test sizes where they were measured, Tables 2 and 3, in this order."""
    more = [table1_beyond(results)] if results.farther else []
    return [table1(results), *more, table2(results), table3(results)]


def build_statistics(results: Results) -> list[Table]:
    """The paired tests and the effective windows, ours and the paper's."""
    return [tests_table(results), *window_tables(results), published_windows()]


def table1(results: Results) -> Table:
    """Accuracy over haystack sizes: the teacher, then every student with every method."""
    methods, sizes = results.settings.tables.methods, results.columns("omit")
    title = "Table 1. Accuracy (%) over images in the haystack"
    table = _accuracy_table(results, "table1", title, _rows_of_table1(results), sizes)
    ours = [results.names[m].removesuffix(" (ours)") for m in methods if m in NOT_IN_PAPER]
    if ours:
        table.notes.append(f"Ours, without a row in the paper's Table 1: {' and '.join(ours)}.")
    return table


def _rows_of_table1(results: Results) -> list[Block]:
    methods = results.settings.tables.methods
    return [(results.teacher, ["base"]), *((student, methods) for student in results.students)]


def table1_beyond(results: Results) -> Table:
    """The rows of Table 1 at sizes beyond the test's (beyond.sizes): where dilution alone is left to shorten windows."""
    whole, sizes = results.farther, sorted(results.settings.beyond.sizes)
    title = "Table 1, beyond the paper's sizes. Accuracy (%) over images in the haystack"
    return _accuracy_table(whole, "table1_beyond", title, _rows_of_table1(whole), sizes, beyond=True)


def table3(results: Results) -> Table:
    """The ablations: LAid and LAid+, whole and without one part each."""
    settings = results.settings
    blocks = [(table3_student(settings), settings.tables.ablations)]
    title = "Table 3. Ablations, accuracy (%) over images"
    return _accuracy_table(results, "table3", title, blocks, results.columns("table3_omit"))


def table2(results: Results) -> Table:
    """Prompt tokens and M-RoPE positions per question, as the teacher reads them."""
    sizes = results.columns("omit")
    cells = results.cells.loc[[(results.teacher, "base", size) for size in sizes]]
    data = pd.DataFrame(
        {
            "images": sizes,
            "avg_tokens": cells["tokens_mean"].map(_or_unknown).to_list(),
            "avg_positions": cells["positions_mean"].map(_or_unknown).to_list(),
        }
    )
    notes = [results.questions_note()]
    images = sizes[-1] - sizes[0]
    if images and cells[["tokens_mean", "positions_mean"]].notna().all(axis=None):
        ends = cells[["tokens_mean", "positions_mean"]].iloc[[0, -1]]
        tokens, positions = (ends.iloc[1] - ends.iloc[0]) / images
        why = "M-RoPE advances by the longer side of its merged patches only"
        notes.append(f"One image more adds {tokens:.1f} tokens and {positions:.1f} positions: {why}.")
    return Table(
        "table2",
        "Table 2. Average prompt length over images in the haystack",
        ["Images", "Tokens", "M-RoPE positions"],
        [[Entry(str(value)) for value in row] for row in data.itertuples(index=False)],
        notes,
        names=0,
        data=data,
    )


def _or_unknown(mean: float) -> str:
    """A mean with two digits; a served model's positions are not known."""
    return "unknown" if math.isnan(mean) else f"{mean:.2f}"


def _accuracy_table(
    results: Results,
    name: str,
    title: str,
    blocks: Sequence[Block],
    sizes: Sequence[int],
    beyond: bool = False,
) -> Table:
    """A table of accuracies with gains; best and second best are marked within each student's block.

    beyond: sizes beyond the test's, so that windows, which stand in Table 1, have no column, nor has the short window.
    """
    threshold = results.threshold
    parts = {
        part: own
        for part, own in zip(("short", "long"), results.short_long(sizes), strict=True)
        if own or not beyond
    }
    models = [(student, method) for student, methods in blocks for method in methods]
    cells = results.cells.loc[[(*model, size) for model in models for size in sizes]]
    data = cells["accuracy"].unstack("size").loc[models, sizes]
    base = data.loc[[(student, "base") for student, _ in models]]
    for name_of_part, part in parts.items():
        data[f"{name_of_part}_gain_pct"] = [
            None if method == "base" else mean_relative_gain(own, of_base)
            for (_, method), own, of_base in zip(
                models, data[part].to_numpy().tolist(), base[part].to_numpy().tolist(), strict=True
            )
        ]
    stars, family = stars_against_base(results, models, [*([size] for size in sizes), *parts.values()])
    marks = _marks(data)
    rows = []
    for model in models:
        entries = [_accuracy_entry(results.cell(*model, size)) for size in sizes]
        entries += [
            Entry("" if pd.isna(gain) else f"{gain:+.2f}") for gain in data.loc[model].iloc[len(sizes) :]
        ]
        entries = [
            replace(entry, stars=stars.get((model, i), ""), mark=marks[model][i])
            for i, entry in enumerate(entries)
        ]
        rows.append([Entry(results.member(model[0])), Entry(results.names[model[1]]), *entries])
        if not beyond:
            own = window(results, model, threshold)
            ratio = own / window(results, (model[0], "base"), threshold)
            rows[-1].append(Entry(own.text() + ("" if model[1] == "base" else f" ({ratio.text('x')})")))
    told = ", ".join(f"{part} {listed(own)}" for part, own in parts.items())
    notes = [
        results.questions_note(sizes),
        f"Gain: mean over sizes of the relative change against base, in %; {told} images.",
    ]
    if not beyond:
        notes.append(
            f"Window {threshold:g}: images up to which accuracy stays at or above {threshold:g}, interpolated over"
            f" log size through {listed(results.sizes)} images{continued(results)}; in brackets its ratio to base's."
        )
    if family:
        notes.append(star_note(results, family, "base") + " At a gain: of the mean accuracy over its sizes.")
    return Table(
        name,
        title,
        [
            *("Model", "Method", *map(str, sizes)),
            *(f"{part.capitalize()} gain" for part in parts),
            *([f"Window {threshold:g}"] if not beyond else []),
        ],
        rows,
        notes,
        {i for i, (_, method) in enumerate(models) if method == "base"},
        legend="In brackets the 95 % interval: Wilson for one seed, bootstrap over questions and seeds for several.",
        data=_printed(data, results, models, sizes),
    )


def _printed(
    data: pd.DataFrame, results: Results, models: Sequence[Any], sizes: Sequence[int]
) -> pd.DataFrame:
    """The table's CSV: percent with two decimals, an empty gain for base."""
    shown = data.copy()
    shown[sizes] *= 100
    shown = shown.map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
    shown.insert(0, "method", [method for _, method in models])
    shown.insert(
        0, "params", [results.cell(student, "base", results.sizes[0]).params for student, _ in models]
    )
    return shown


def _accuracy_entry(cell: Any) -> Entry:
    key = f"{cell.student}/{cell.method}/{cell.size}"
    return Entry(f"{100 * cell.accuracy:.2f}", f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]", cell=key)


def _marks(data: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """By model, the marks of its columns: the largest and the second largest value of a student's block.

    Equals share their mark; a block of one row, or of equal values only, has none.
    """
    ranks = data.astype(float).round(9).groupby(level="student").rank(method="dense", ascending=False)
    several = data.astype(float).round(9).groupby(level="student").transform("nunique") > 1
    marks = ranks.where(several).map(lambda rank: {1: BEST, 2: SECOND}.get(rank, ""))
    return dict(zip(marks.index, marks.to_numpy().tolist(), strict=True))


# ------------------------------------------------------------------ for DVC


def metrics(results: Results) -> dict[str, Any]:
    """{student: {method: {"accuracy": {size: percent}, "window": images}}}, windows at the tables' threshold.

    A window is a bound where accuracy never crosses the threshold; then its text (">= 150") stands for it.
    """
    found: dict[str, Any] = {}
    for student, method in results.models:
        curve, own = results.curves[student, method], window(results, (student, method), results.threshold)
        found.setdefault(student, {})[method] = {
            "accuracy": {str(size): round(100 * accuracy, 2) for size, accuracy in curve.items()},
            "window": round(own.low, 2) if own.exact else own.text(),
        }
    return found


def write_metrics(results: Results, out: str | Path) -> None:
    """Write metrics.json, and curves.csv with a row a model ("small laid") and size, where they changed."""
    update(Path(out) / "metrics.json", dumps(metrics(results)) + "\n")
    curves = 100 * pd.DataFrame({" ".join(model): results.curves[model] for model in results.models})
    rows = curves.rename_axis("images").reset_index().melt("images", var_name="model", value_name="accuracy")
    text = rows[["model", "images", "accuracy"]].to_csv(index=False, float_format="%.2f", lineterminator="\n")
    update(Path(out) / "curves.csv", text)
