"""The sweep's table: which variant moves the effective window, with intervals and paired tests, from its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laid.errors import LaidError
from laid.evaluation.cells import Cells
from laid.results import stats
from laid.results.comparisons import LEVEL, Answers, interval_text, star_note
from laid.results.render import Entry, Table
from laid.results.tables import METHOD_NAMES, Grid


class SweepGrid(Grid):
    """The sweep's cells on the validation questions, read as the tables read theirs.

    only: variants wanted (none: those of sweep.only, or all). Raises LaidError where one of their cells is missing.
    """

    def __init__(self, cells: Cells, config: dict[str, Any], folder: str | Path, only: Sequence[str] = ()):
        sweep = config["sweep"]
        self.cells, self.config, self.folder = cells, config, Path(folder)
        self.settings, self.teacher = config["tables"], config["models"]["teacher"]
        self.students = list(sweep["students"] or config["models"]["students"])
        self.sizes = sorted(config["haystacks"]["validation"]["sizes"])
        unknown = [name for name in only if name not in sweep["variants"]]
        if unknown or not sweep["variants"]:
            known = ", ".join(sweep["variants"]) or "none; give --config config.yaml configs/sweep.yaml"
            raise LaidError(f"no variant {(unknown or ['to tell about'])[0]!r} in sweep.variants: {known}")
        self.variants = list(only or sweep["only"] or sweep["variants"])
        self.rivals = list(sweep["against"])
        methods = list(dict.fromkeys(["base", *self.rivals, *self.variants]))
        self.models = [(student, method) for student in self.students for method in methods]
        for student, method in self.models:
            for size in self.sizes:
                if (student, method, size) not in cells:
                    path = self.folder / student / method / f"{size}.json"
                    raise LaidError(
                        f"{path}: no such cell; make it with: snakemake --cores all {path}"
                        " --configfile configs/sweep.yaml"
                    )


def sweep_table(grid: SweepGrid, resamples: int = stats.RESAMPLES) -> Table:
    """One row per student and method: accuracies, short and long mean, effective window, differences to the rivals.

    A rival is compared too, with the rivals named before it.
    """
    answers = Answers(grid, resamples)
    short, long = grid.window_sizes(grid.sizes)
    spans = [(name, sizes) for name, sizes in (("short", short), ("long", long)) if sizes]
    threshold = grid.settings["threshold"]
    tests = [
        ((student, rival), (student, method), name, sizes)
        for student, method in grid.models
        for k, rival in enumerate(grid.rivals)
        if method in grid.variants or method in grid.rivals[k + 1 :]
        for name, sizes in spans
    ]
    found = [answers.compare(first, second, sizes) for first, second, _, sizes in tests]
    adjusted = stats.holm([comparison.p for comparison in found])
    compared = {test[:3]: (c, p) for test, c, p in zip(tests, found, adjusted, strict=True)}

    csv = [["student", "variant", "seeds", *map(str, grid.sizes)]]
    for name, _ in spans:
        csv[0] += [name, f"{name}_low", f"{name}_high"]
    csv[0] += ["window_low", "window_high", "window_ci_low", "window_ci_high"]
    for rival in grid.rivals:
        for name, _ in spans:
            csv[0] += [f"{name}_vs_{rival}{end}" for end in ("", "_low", "_high", "_p", "_p_holm")]
    rows, breaks = [], set()
    for student, method in grid.models:
        key = (student, method)
        if method == "base":
            breaks.add(len(rows))
        cells = [grid.cell(*key, size) for size in grid.sizes]
        row = [Entry(student), Entry(METHOD_NAMES.get(method, method)), Entry(str(len(cells[0]["seeds"])))]
        line = [student, method, str(len(cells[0]["seeds"]))]
        for cell in cells:
            low, high = (100 * bound for bound in cell["interval"])
            row.append(Entry(f"{100 * cell['accuracy']:.1f}", f"[{low:.1f}, {high:.1f}]"))
            line.append(f"{100 * cell['accuracy']:.2f}")
        for _, sizes in spans:
            mean, low, high = _mean(answers, key, sizes)
            row.append(Entry(f"{mean:.1f}", f"[{low:.1f}, {high:.1f}]"))
            line += [f"{value:.2f}" for value in (mean, low, high)]
        window = grid.window(*key, threshold)
        interval = stats.bounds_interval(answers.windows(key, threshold))
        row.append(Entry(window.text(), interval_text(interval, grid.sizes)))
        line += [f"{value:.4f}" for b in (window, interval) for value in (b.low, b.high)]
        for rival in grid.rivals:
            for name, _ in spans:
                entry, values = _difference(compared.get(((student, rival), key, name)))
                row.append(entry)
                line += values
        rows.append(row)
        csv.append(line)
    header = ["Model", "Variant", "Seeds", *map(str, grid.sizes), *(name.capitalize() for name, _ in spans)]
    header += [f"Window {threshold:g}"]
    header += [
        f"{name.capitalize()} - {METHOD_NAMES.get(rival, rival)}"
        for rival in grid.rivals
        for name, _ in spans
    ]
    return Table(
        "sweep",
        "Sweep over the parts of LAid, accuracy (%) on the validation questions",
        header,
        rows,
        csv,
        [
            grid.questions_note(),
            *(f"{name.capitalize()}: mean over {', '.join(map(str, sizes))} images." for name, sizes in spans),
            f"Window {threshold:g}: images up to which accuracy stays at or above {threshold:g}, interpolated over log size.",
            *([star_note(answers, len(tests), "zero")] if tests else []),
        ],
        breaks,
        legend="In brackets the 95 % interval: over questions, and over seeds where there are several.",
    )  # fmt: skip


def _mean(answers: Answers, key: tuple[str, str], sizes: Sequence[int]) -> tuple[float, float, float]:
    """Mean accuracy over sizes in %, with its bootstrap interval."""
    at = [answers.sizes.index(size) for size in sizes]
    mean = 100 * float(np.mean([answers.right[key][i].mean() for i in at]))
    low, high = 100 * np.quantile(answers.draws[key][:, at].mean(axis=1), [0.025, 0.975])
    return mean, max(0.0, float(low)), min(100.0, float(high))


def _difference(found: tuple[stats.Comparison, float] | None) -> tuple[Entry, list[str]]:
    """A difference in points, printed and as CSV values; empty where there is none."""
    if found is None:
        return Entry(""), [""] * 5
    comparison, adjusted = found
    points = [100 * value for value in (comparison.difference, comparison.low, comparison.high)]
    entry = Entry(
        f"{points[0]:+.1f}", f"[{points[1]:+.1f}, {points[2]:+.1f}]", "*" if adjusted < LEVEL else ""
    )
    return entry, [*(f"{v:.2f}" for v in points), f"{comparison.p:.3g}", f"{adjusted:.3g}"]
