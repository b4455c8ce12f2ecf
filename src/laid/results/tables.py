"""Tables 1, 2 and 3 of the paper, from cells only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from laid.errors import LaidError
from laid.evaluation.cells import Cells
from laid.results import stats
from laid.results.comparisons import (
    Answers,
    published_windows,
    star_note,
    stars_against_base,
    tests_table,
    window_tables,
)
from laid.results.needed import needed, table3_students
from laid.results.places import update
from laid.results.render import BEST, SECOND, Entry, Table, csv_text, markdown

METHOD_NAMES = {
    "base": "base",
    "yarn": "YaRN",
    "self_extend": "SelfExtend",
    "sft": "SFT (LoRA)",
    "kd": "KD (ours)",
    "laid": "LAid",
    "laid_long": "LAid long (ours)",
    "laid_wo_kl": "LAid w/o KL",
    "laid_wo_laid": "LAid w/o alignment",
}
NOT_IN_PAPER = ("kd", "laid_long")
GAIN_COLUMNS = ["short_gain_pct", "long_gain_pct"]


class Grid:
    """The cells that the configuration's tables stand on, all present, or a LaidError that says what to run.

    folder: where the cells lie, for messages. Sizes ascend.
    """

    def __init__(self, cells: Cells, config: dict[str, Any], folder: str | Path):
        self.cells, self.config, self.folder = cells, config, Path(folder)
        self.settings = config["tables"]
        self.teacher: str = config["models"]["teacher"]
        self.students: list[str] = list(config["models"]["students"])
        self.sizes: list[int] = sorted(config["haystacks"]["test"]["sizes"])
        wanted = list(needed(config))
        missing = [key for key in wanted if key not in cells]
        if missing:
            raise LaidError(missing_message(self.folder, missing))
        # (student, method) of every model that the tables read, base first within a student.
        members = [self.teacher, *self.students]
        self.models = sorted(
            dict.fromkeys(key[:2] for key in wanted), key=lambda model: members.index(model[0])
        )

    @cached_property
    def answers(self) -> Answers:
        """All answers with their joint bootstrap, made when first asked for."""
        return Answers(self)

    def cell(self, student: str, method: str, size: int) -> dict[str, Any]:
        return self.cells[student, method, size]

    def accuracies(self, student: str, method: str, sizes: Sequence[int]) -> list[float]:
        """Accuracies as fractions at the sizes."""
        return [self.cell(student, method, size)["accuracy"] for size in sizes]

    def window(self, student: str, method: str, threshold: float) -> stats.Bounds:
        """Effective window in images over all measured sizes."""
        return stats.effective_window(self.sizes, self.accuracies(student, method, self.sizes), threshold)

    def columns(self, omit: str) -> list[int]:
        """Sizes with a column in a table, given the key of `tables` that lists those without."""
        shown = [size for size in self.sizes if size not in self.settings[omit]]
        if not shown:
            raise LaidError(f"tables.{omit} {self.settings[omit]} leaves none of the test sizes {self.sizes}")
        return shown

    def window_sizes(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The sizes of the short and of the long window."""
        edge = self.settings["short_max"]
        return [s for s in sizes if s <= edge], [s for s in sizes if s > edge]

    def questions_note(self) -> str:
        """How many questions, seeds and answers stand behind a cell."""
        per_cell = sorted({cell["questions"] for cell in self.cells.values()})
        seeds = sorted({len(cell["seeds"]) for cell in self.cells.values()})
        asked = str(per_cell[0]) if len(per_cell) == 1 else f"{per_cell[0]} to {per_cell[-1]}"
        trained = "1 training seed" if seeds[-1] == 1 else f"{seeds[-1]} training seeds per trained method"
        scale = next(iter(self.cells.values()))["scale"]
        return f"Scale {scale}; {asked} questions per cell, half of them yes; {trained}."


def missing_message(folder: Path, missing: Sequence[tuple[str, str, int]]) -> str:
    """One line that names the first missing cell, counts the rest, and gives the command."""
    student, method, size = missing[0]
    path = folder / student / method / f"{size}.json"
    more = f" (and {len(missing) - 1} more cells)" if len(missing) > 1 else ""
    return f"{path}: no such cell{more}; make it with: snakemake --cores all {path}"


def build(grid: Grid) -> list[Table]:
    """Tables 1, 2 and 3 in this order."""
    return [table1(grid), table2(grid), table3(grid)]


def build_statistics(grid: Grid) -> list[Table]:
    """The paired tests and the effective windows, ours and the paper's."""
    return [tests_table(grid.answers), *window_tables(grid.answers), published_windows()]


def write(tables: Sequence[Table], out: str | Path) -> list[Path]:
    """Write each table as <name>.csv and <name>.md below `out`, where they changed; returns the paths."""
    paths = []
    for table in tables:
        for suffix, text in (("csv", csv_text(table)), ("md", markdown(table))):
            paths.append(Path(out) / f"{table.name}.{suffix}")
            update(paths[-1], text)
    return paths


def table1(grid: Grid) -> Table:
    """Accuracy over haystack sizes: the teacher, then every student with every method."""
    methods = grid.settings["methods"]
    blocks = [(grid.teacher, ["base"]), *((student, methods) for student in grid.students)]
    table = _accuracy_table(
        grid, "table1", "Table 1. Accuracy (%) over images in the haystack", blocks, "omit"
    )
    ours = [METHOD_NAMES[m].removesuffix(" (ours)") for m in methods if m in NOT_IN_PAPER]
    if ours:
        table.notes.append(
            f"(ours): {' and '.join(ours)} has no row in the paper's Table 1; it is added here."
        )
    return table


def table3(grid: Grid) -> Table:
    """The ablations: base, without L_KL, without L_LAid, and the whole."""
    blocks = [(student, grid.settings["ablations"]) for student in table3_students(grid.config)]
    return _accuracy_table(
        grid, "table3", "Table 3. Ablations, accuracy (%) over images", blocks, "table3_omit"
    )


def table2(grid: Grid) -> Table:
    """Prompt tokens and M-RoPE positions per question, as the teacher reads them."""
    sizes = grid.columns("omit")
    cells = [grid.cell(grid.teacher, "base", size) for size in sizes]
    csv_rows = [["images", "avg_tokens", "avg_positions"]]
    rows = []
    for size, cell in zip(sizes, cells, strict=True):
        tokens, positions = f"{cell['tokens_mean']:.2f}", f"{cell['positions_mean']:.2f}"
        csv_rows.append([str(size), tokens, positions])
        rows.append([Entry(str(size)), Entry(tokens), Entry(positions)])
    return Table(
        name="table2",
        title="Table 2. Average prompt length over images in the haystack",
        header=["Images", "Tokens", "M-RoPE positions"],
        rows=rows,
        csv=csv_rows,
        notes=[
            grid.questions_note(),
            *_cost_of_an_image(cells),
        ],
        names=0,
    )


def _cost_of_an_image(cells: Sequence[dict[str, Any]]) -> list[str]:
    """What one image more adds, between the smallest and the largest size."""
    first, last = cells[0], cells[-1]
    images = last["size"] - first["size"]
    if not images:
        return []
    tokens, positions = ((last[key] - first[key]) / images for key in ("tokens_mean", "positions_mean"))
    why = "M-RoPE advances by the longer side of its merged patches only"
    return [f"One image more adds {tokens:.1f} tokens and {positions:.1f} positions: {why}."]


def _accuracy_table(
    grid: Grid, name: str, title: str, blocks: Sequence[tuple[str, Sequence[str]]], omit: str
) -> Table:
    """A table of accuracies with gains; best and second best are marked within each student's block."""
    sizes, threshold = grid.columns(omit), grid.settings["threshold"]
    short, long = grid.window_sizes(sizes)
    rows: list[list[Entry]] = []
    csv_rows = [["params", "method", *map(str, sizes), *GAIN_COLUMNS]]
    breaks = set()
    keys = [(student, method) for student, methods in blocks for method in methods]
    stars, family = stars_against_base(grid.answers, keys, [*([size] for size in sizes), short, long])
    for student, methods in blocks:
        breaks.add(len(rows))
        columns: list[list[float | None]] = []  # by column: values to rank
        body: list[list[Entry]] = []
        base_window = grid.window(student, "base", threshold)
        for method in methods:
            cells = [grid.cell(student, method, size) for size in sizes]
            gains = [_gain(grid, student, method, part) for part in (short, long)]
            window = grid.window(student, method, threshold)
            columns.append([*(cell["accuracy"] for cell in cells), *gains])
            shown = [*map(_accuracy_entry, cells), *map(_gain_entry, gains)]
            body.append(
                [replace(e, stars=stars.get(((student, method), i), "")) for i, e in enumerate(shown)]
            )
            label = cells[0]["label"]
            csv_rows.append(
                [
                    label,
                    method,
                    *(f"{100 * cell['accuracy']:.2f}" for cell in cells),
                    *("" if gain is None else f"{gain:.2f}" for gain in gains),
                ]
            )
            ratio = "" if method == "base" else f" ({(window / base_window).text('x')})"
            head = [
                Entry(student if student == label else f"{student} ({label})"),
                Entry(METHOD_NAMES[method]),
            ]
            body[-1] = [*head, *body[-1], Entry(window.text() + ratio)]
        if len(methods) > 1:
            _mark(body, columns)
        rows += body
    notes = [
        grid.questions_note(),
        "Gain: mean over sizes of the relative change against base, in %;"
        + f" short {_listed(short)}, long {_listed(long)} images.",
        f"Window {threshold:g}: images up to which accuracy stays at or above {threshold:g}, interpolated over"
        + f" log size through {_listed(grid.sizes)} images; in brackets its ratio to base's.",
    ]
    if family:
        notes.append(
            star_note(grid.answers, family, "base") + " At a gain: of the mean accuracy over its sizes."
        )
    header = ["Model", "Method", *map(str, sizes), "Short gain", "Long gain", f"Window {threshold:g}"]
    legend = (
        "In brackets the 95 % interval: Wilson for one seed, bootstrap over questions and seeds for several."
    )
    return Table(name, title, header, rows, csv_rows, notes, breaks, legend=legend)


def _gain(grid: Grid, student: str, method: str, sizes: Sequence[int]) -> float | None:
    if method == "base":
        return None
    return stats.mean_relative_gain(
        grid.accuracies(student, method, sizes), grid.accuracies(student, "base", sizes)
    )


def _accuracy_entry(cell: dict[str, Any]) -> Entry:
    low, high = cell["interval"]
    key = f"{cell['student']}/{cell['method']}/{cell['size']}"
    return Entry(f"{100 * cell['accuracy']:.2f}", f"[{100 * low:.1f}, {100 * high:.1f}]", cell=key)


def _gain_entry(gain: float | None) -> Entry:
    return Entry("") if gain is None else Entry(f"{gain:+.2f}")


def _mark(body: list[list[Entry]], columns: list[list[float | None]]) -> None:
    """Mark the largest and second largest value of each column in place; equals share their mark."""
    for c in range(len(columns[0])):
        known = sorted({round(row[c], 9) for row in columns if row[c] is not None}, reverse=True)
        for r, row in enumerate(columns):
            if row[c] is None or len(known) < 2:
                continue
            rank = known.index(round(row[c], 9))
            if rank < 2:
                entry = body[r][c + 2]
                body[r][c + 2] = replace(entry, mark=(BEST, SECOND)[rank])


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) if sizes else "none"
