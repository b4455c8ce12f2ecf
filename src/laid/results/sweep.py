"""The sweep's table: which method moves the effective window, with intervals and paired tests, from its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from laid.errors import LaidError
from laid.evaluation.cells import Cells
from laid.evaluation.intervals import RESAMPLES
from laid.results.answers import Model, Results
from laid.results.comparisons import star_note
from laid.results.render import Entry, Table, points
from laid.results.statistics import LEVEL, Comparison, holm
from laid.results.windows import bounds_interval, interval_text, window, window_draws

if TYPE_CHECKING:
    from laid.settings import Settings


def read(cells: Cells, settings: Settings, folder: str | Path, resamples: int = RESAMPLES) -> Results:
    """The sweep's cells on the validation questions, base and rivals first. Raises LaidError where one is missing."""
    if not settings.sweep.methods:
        raise LaidError("sweep.methods names no method; give --config config.yaml configs/sweep.yaml")
    methods = dict.fromkeys(["base", *settings.sweep.against, *settings.sweep.methods])
    keys = [
        (student, method, size)
        for student in settings.sweep.students or settings.models.students
        for method in methods
        for size in sorted(settings.haystacks.validation.sizes)
    ]
    return Results(cells, settings, folder, keys, " --configfile configs/sweep.yaml", resamples)


def sweep_table(results: Results) -> Table:
    """One row per student and method: accuracies, short and long mean, effective window, differences to the rivals.

    A rival is compared too, with the rivals named before it.
    """
    threshold, sizes, rivals = results.threshold, results.sizes, list(results.settings.sweep.against)
    spans = dict(zip(("short", "long"), results.short_long(sizes), strict=True))
    spans = {name: part for name, part in spans.items() if part}
    tests = [
        ((student, rival), (student, method), name)
        for student, method in results.models
        for k, rival in enumerate(rivals)
        if method not in ("base", *rivals[: k + 1])
        for name in spans
    ]
    found = [results.compare(first, second, spans[name]) for first, second, name in tests]
    adjusted = holm([comparison.p for comparison in found])
    compared = {test: (c, p) for test, c, p in zip(tests, found, adjusted, strict=True)}
    rows, data = [], []
    for model in results.models:
        cells = [results.cell(*model, size) for size in sizes]
        seeds = str(len(cells[0].seeds))
        row = [Entry(model[0]), Entry(results.names[model[1]]), Entry(seeds)]
        line = {"student": model[0], "variant": model[1], "seeds": seeds}
        for cell in cells:
            row.append(Entry(f"{100 * cell.accuracy:.1f}", f"[{100 * cell.low:.1f}, {100 * cell.high:.1f}]"))
            line[str(cell.size)] = f"{100 * cell.accuracy:.2f}"
        for name, part in spans.items():
            mean, low, high = _mean(results, model, part)
            row.append(Entry(f"{mean:.1f}", f"[{low:.1f}, {high:.1f}]"))
            line |= {name: f"{mean:.2f}", f"{name}_low": f"{low:.2f}", f"{name}_high": f"{high:.2f}"}
        own = window(results, model, threshold)
        interval = bounds_interval(window_draws(results, model, threshold))
        row.append(Entry(own.text(), interval_text(interval, sizes)))
        ends = {"window": own, "window_ci": interval}
        line |= {
            f"{what}_{end}": f"{getattr(b, end):.4f}" for what, b in ends.items() for end in ("low", "high")
        }
        for rival in rivals:
            for name in spans:
                entry, values = _difference(compared.get(((model[0], rival), model, name)))
                row.append(entry)
                line |= {f"{name}_vs_{rival}{end}": value for end, value in values.items()}
        rows.append(row)
        data.append(line)
    named = {name: name.capitalize() for name in spans}
    header = ["Model", "Variant", "Seeds", *map(str, sizes), *named.values(), f"Window {threshold:g}"]
    header += [f"{title} - {results.names[rival]}" for rival in rivals for title in named.values()]
    return Table(
        "sweep",
        "Sweep over the parts of LAid, accuracy (%) on the validation questions",
        header,
        rows,
        [
            results.questions_note(),
            *(
                f"{named[name]}: mean over {', '.join(map(str, part))} images."
                for name, part in spans.items()
            ),
            f"Window {threshold:g}: images up to which accuracy stays at or above {threshold:g}, interpolated over log size.",
            *([star_note(results, len(tests), "zero")] if tests else []),
        ],
        {i for i, (_, method) in enumerate(results.models) if method == "base"},
        legend="In brackets the 95 % interval: over questions, and over seeds where there are several.",
        data=pd.DataFrame(data),
    )


def _mean(results: Results, model: Model, sizes: Sequence[int]) -> tuple[float, float, float]:
    """Mean accuracy over sizes in %, with its bootstrap interval."""
    mean = 100 * float(results.point(model, sizes).mean())
    low, high = 100 * np.quantile(results.draws(model, sizes).mean(axis=1), [0.025, 0.975])
    return mean, max(0.0, float(low)), min(100.0, float(high))


def _difference(found: tuple[Comparison, float] | None) -> tuple[Entry, dict[str, str]]:
    """A difference in points, printed and as CSV values; empty where there is none."""
    ends = ("", "_low", "_high", "_p", "_p_holm")
    if found is None:
        return Entry(""), dict.fromkeys(ends, "")
    comparison, adjusted = found
    values = (comparison.difference, comparison.low, comparison.high)
    texts = [*(f"{100 * v:.2f}" for v in values), f"{comparison.p:.3g}", f"{adjusted:.3g}"]
    return points(values, "*" if adjusted < LEVEL else ""), dict(zip(ends, texts, strict=True))
