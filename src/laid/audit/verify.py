"""The state of cells: sound, stale, tampered or missing, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from laid import provenance
from laid.audit.lineage import Lineage, Step
from laid.data.questions import ordered_images
from laid.errors import LaidError
from laid.evaluation.cells import interval_of, read_cell, right_answers
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

    missing: not there. tampered: unreadable, or it does not follow from its answers or they not from the questions, or its
    digest is wrong. stale: whole, but the configuration asks for something else now, or an input is not what it was made from.
    """
    if reason := absent(lineage, step):
        return "missing", (reason,)
    try:
        cell = read_cell(step.record)
    except LaidError as error:
        return "tampered", (str(error).removeprefix(f"{step.record}: "),)
    if made_up := tuple(unfounded(lineage, step, cell)):
        return "tampered", made_up
    problems = tuple(dict.fromkeys((*lineage.problems(step), *renamed(lineage, step, cell))))
    return ("stale", problems) if problems else ("sound", ())


def unfounded(lineage: Lineage, step: Step, cell: dict[str, Any]) -> Iterator[str]:
    """What in a cell does not follow from its answers, or in its answers from the questions it names and from how a
    response is scored. Tokens and positions are not counted again."""
    answers = cell["answers"]
    interval, method = interval_of(right_answers(cell))
    if cell["interval_method"] == method and not np.allclose(interval, cell["interval"], rtol=0, atol=1e-6):
        yield f"interval says {cell['interval']}, its answers give {interval}"
    data = cell["provenance"]["data"]
    runs = sorted(int(name[8:]) for name in data if name.startswith("run_seed") and name[8:].isdigit())
    if cell["seeds"] != (runs or [0]):
        yield f"seeds says {cell['seeds']}, its record names the runs {runs or 'none'}"
    odd = [
        a for a in answers if a["p_yes"] not in (None, 0.5) and a["answer"] != ("no", "yes")[a["p_yes"] > 0.5]
    ]
    if odd:
        yield f"{len(odd)} answers contradict their p_yes, first of question {odd[0]['id']}"
    try:
        file = lineage.inputs_of(step, "questions")[0]
        if provenance.fingerprint(file) != data.get("questions"):
            return  # other questions than then: that is stale
        asked = {question.id: question for question in lineage.questions(file)}
    except LaidError:
        return  # as Lineage.problems will say
    if {a["id"] for a in answers} != asked.keys():
        yield f"its answers are not to the questions of {file}"
        return
    settings = cell["provenance"].get("settings")
    order = settings.get("evaluation", {}).get("order_seed") if isinstance(settings, dict) else None
    for what, said in (
        ("label", lambda q: q.answer),
        ("needles", lambda q: ordered_images(q, order)[1]),
    ):
        if what == "needles" and not isinstance(order, int):
            continue
        other = [a for a in answers if a[what] != said(asked[a["id"]])]
        if other:
            first = other[0]
            yield (
                f"{len(other)} answers have another {what} than {file}, first of question {first['id']}:"
                f" {first[what]}, there {said(asked[first['id']])}"
            )


def renamed(lineage: Lineage, step: Step, cell: dict[str, Any]) -> Iterator[str]:
    """What a cell calls itself and its model, where the configuration and the checkpoint say otherwise."""
    models, student = lineage.config.models, cell["student"]
    expected = {
        "scale": lineage.config.scale,
        "role": "teacher" if student == models.teacher else "student",
        "label": cell["label"],
    }
    if cell["label"] != models.labels.get(student) and "endpoint" not in cell["provenance"]:
        expected["label"] = lineage.label(student) or models.labels.get(student) or cell["label"]
    for what, now in expected.items():
        if cell[what] != now:
            yield f"{what} is {now!r} now, was {cell[what]!r}"


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
