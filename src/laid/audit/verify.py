"""The state of cells: sound, stale, tampered or missing, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from laid.audit.lineage import Lineage, Step
from laid.errors import LaidError
from laid.evaluation.cells import read_cell
from laid.results.needed import needed, needed_beyond

STATES = ("sound", "stale", "tampered", "missing")


def locate(lineage: Lineage, path: Path) -> Step:
    """The step of a cell given by its path. Raises LaidError for a path that cannot be a cell's."""
    parts = path.parts
    if len(parts) < 4 or path.suffix != ".json" or not path.stem.isdigit():
        raise LaidError(
            f"{path}: not a cell; expected {lineage.root / 'cells'}/<suite>/<student>/<method>/<size>.json"
        )
    step = lineage.cell(*parts[-4:-1], int(path.stem))
    if os.path.realpath(path) != os.path.realpath(step.record):
        raise LaidError(
            f"{path}: not a cell of this configuration, whose cells lie below {lineage.root / 'cells'}"
        )
    return step


def there(lineage: Lineage, path: Path) -> Step:
    """The step of a cell that lies at `path`. Raises LaidError where none does."""
    step = locate(lineage, path)
    if reason := absent(lineage, step):
        raise LaidError(f"{step.record}: {reason}")
    return step


def absent(lineage: Lineage, step: Step) -> str | None:
    """How to make a missing cell, or why nothing makes it; None for a cell that exists."""
    if step.record.is_file():
        return None
    return unknown(lineage, step) or "no such file; `snakemake --cores all` with this path makes it"


def unknown(lineage: Lineage, step: Step) -> str | None:
    """Which of a cell's suite, model, method and size the configuration lacks; None if it has them all."""
    wildcards, layout = dict(step.wildcards), lineage.layout
    suite = layout.suites.get(wildcards["suite"])
    for what, name, known in (
        ("suite", wildcards["suite"], list(layout.suites)),
        ("model", wildcards["student"], layout.known),
        ("method", wildcards["method"], list(lineage.config.methods)),
        ("size", wildcards["size"], suite.sizes if suite else [wildcards["size"]]),
    ):
        if name not in known:
            return f"the configuration has no {what} {name}; it has {', '.join(map(str, known))}"
    return None


def all_cells(lineage: Lineage) -> Iterator[Step]:
    """Every cell that the tables need, then every other one on disk that the configuration knows.

    Of the suite `test` also those that it does not know: nothing foreign may lie beside the tables' cells.
    """
    seen = set()
    for suite, keys in (("test", needed(lineage.config)), ("beyond", needed_beyond(lineage.config))):
        for key in keys:
            step = lineage.cell(suite, *key)
            seen.add(step.record)
            yield step
    for path in sorted((lineage.root / "cells").glob("*/*/*/*.json")):
        if path.stem.isdigit() and path not in seen:
            step = lineage.cell(*path.parts[-4:-1], int(path.stem))
            if path.parts[-4] == "test" or not unknown(lineage, step):
                yield step


def judge(lineage: Lineage, step: Step) -> tuple[str, tuple[str, ...]]:
    """(state, reasons) of one cell.

    missing: not there. tampered: unreadable, or its numbers do not follow from its answers, or its digest is wrong.
    stale: whole, but the configuration asks for something else now, or an input is not what it was made from.
    """
    if reason := absent(lineage, step):
        return "missing", (reason,)
    try:
        read_cell(step.record)
    except LaidError as error:
        return "tampered", (str(error).removeprefix(f"{step.record}: "),)
    problems = tuple(dict.fromkeys(lineage.problems(step)))
    return ("stale", problems) if problems else ("sound", ())


def grouped(found: dict[Step, tuple[str, tuple[str, ...]]]) -> list[tuple[tuple, list[Step]]]:
    """Cells of one student and method that share their state and reasons, together."""
    groups: dict[tuple, list[Step]] = {}
    for step, verdict in found.items():
        groups.setdefault((*verdict, step.record.parent), []).append(step)
    return [((state, reasons), steps) for (state, reasons, _), steps in groups.items()]


def name_of(steps: list[Step]) -> str:
    """One path for several sizes: .../laid/{5,10}.json."""
    folder = steps[0].record.parent
    sizes = [step.record.stem for step in steps]
    return str(folder / (f"{{{','.join(sizes)}}}.json" if len(sizes) > 1 else f"{sizes[0]}.json"))
