"""Cells: one JSON file per suite, student, method and size, with every answer; written, read back and checked.

Everything printed is computed from these files, so reading one recomputes what its answers imply. The digest
covers the whole cell: a changed digit anywhere is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from laid.errors import LaidError
from laid.evaluation.intervals import cluster_bootstrap, wilson
from laid.evaluation.scoring import is_right
from laid.io import parsed, read_json, sha256_json, write_json

FORMAT = "laid-cell/1"
ONE_SEED, SEVERAL_SEEDS = "wilson 95%", "bootstrap over questions, Student's t over seeds, 95%"
_TINY = 1e-6

Cells = dict[tuple[str, str, int], dict[str, Any]]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
_CLOSED = ConfigDict(extra="forbid")


class Answer(TypedDict):
    """answer: what was found in the response; laid.evaluation.scoring.is_right says what counts as correct."""

    __pydantic_config__ = _CLOSED
    id: int | str
    seed: int
    label: Literal["yes", "no"]
    answer: Literal["yes", "no", "both", "none"]
    p_yes: Share | None
    needles: list[NonNegativeInt]


class Provenance(TypedDict):
    """What every record of laid.provenance.collect has."""

    __pydantic_config__ = ConfigDict(extra="allow")
    code: dict[str, Any]
    config: str
    data: dict[str, str]
    libraries: dict[str, str | None]


class Cell(TypedDict):
    """What a cell's file holds."""

    __pydantic_config__ = _CLOSED
    format: Literal["laid-cell/1"]
    scale: Name
    student: Name
    label: Name
    role: Literal["teacher", "student"]
    method: Name
    size: PositiveInt
    n: int
    questions: int
    seeds: list[int]
    accuracy: Share
    compliance: Share
    interval: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]
    interval_method: Name
    answers: Annotated[list[Answer], Field(min_length=1)]
    tokens_mean: FiniteFloat | None
    positions_mean: FiniteFloat | None
    provenance: Provenance
    digest: Name


def right_answers(cell: dict[str, Any]) -> np.ndarray:
    """Right (1) and wrong (0) answers of a cell, shape (seeds, questions), questions in the order of their ids."""
    ids = {key: i for i, key in enumerate(sorted({a["id"] for a in cell["answers"]}, key=_id_order))}
    seeds = {seed: i for i, seed in enumerate(cell["seeds"])}
    right = np.zeros((len(seeds), len(ids)), dtype=np.int8)
    for answer in cell["answers"]:
        right[seeds[answer["seed"]], ids[answer["id"]]] = is_right(answer)
    return right


def ordered(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers by seed, then by question: numbers by value before text by letters."""
    return sorted(answers, key=lambda a: (a["seed"], _id_order(a["id"])))


def make_cell(
    *,
    scale: str,
    student: str,
    label: str,
    role: str,
    method: str,
    size: int,
    answers: Iterable[dict[str, Any]],
    tokens_mean: float,
    positions_mean: float,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """A cell from its answers: accuracy, interval, compliance and digest are computed here.

    answers: {"id", "seed", "label": yes|no, "answer": yes|no|both|none, "p_yes": 0..1 or None, "needles": [int]}, for
    every seed the same questions. tokens_mean, positions_mean: prompt tokens and M-RoPE positions per question.
    Raises LaidError where the answers do not make a cell.
    """
    found = ordered(answers)
    cell: dict[str, Any] = {
        "format": FORMAT,
        "scale": scale,
        "student": student,
        "label": label,
        "role": role,
        "method": method,
        "size": size,
        "answers": found,
        "n": len(found),
        "seeds": sorted({a["seed"] for a in found}),
        "questions": len({a["id"] for a in found}),
        "tokens_mean": tokens_mean,
        "positions_mean": positions_mean,
        "provenance": provenance,
    }
    where = f"cell {student}/{method}/{size}"
    parsed(found, list[Answer], where)
    _check_answers(cell, where)
    cell["accuracy"] = _share(is_right(a) for a in found)
    cell["compliance"] = _share(a["answer"] != "none" for a in found)
    cell["interval"], cell["interval_method"] = interval_of(right_answers(cell))
    cell["digest"] = _digest(cell)
    check_cell(cell, where)
    return cell


def write_cell(path: str | Path, cell: dict[str, Any]) -> None:
    """Check a cell of make_cell and write it, into any folder; the same cell gives the same bytes. Raises LaidError."""
    check_cell(cell, str(path))
    write_json(path, cell)


def read_cell(path: str | Path) -> dict[str, Any]:
    """Read and check one cell. Raises LaidError, one line naming the file, if it is missing, cut short or changed."""
    cell = read_json(path)
    check_cell(cell, str(path))
    _check_place(cell, Path(path))
    return cell


def load_cells(folder: str | Path, target: str = "") -> Cells:
    """All cells below `folder`/<student>/<method>/<size>.json, by (student, method, size); cost.json is no cell.

    target: what Snakemake is asked for to make them, all if empty. Raises LaidError for a cell that is broken, lies in
    another's place, is of another scale than the others, or answers other questions than the others of its size: such a
    mixture cannot stand in one table.
    """
    root = Path(folder)
    if not root.is_dir():
        raise LaidError(f"{root}: no such folder of cells; `snakemake --cores all{target}` makes it")
    cells: Cells = {}
    first: dict[Any, tuple[Path, Any]] = {}
    for path in sorted(root.glob("*/*/*.json")):
        if not path.stem.isdigit() or any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        cell = read_cell(path)
        if cell["interval_method"] not in (ONE_SEED, SEVERAL_SEEDS):
            # Answers are what was measured; an interval of an earlier kind is no reason to measure again.
            cell["interval"], cell["interval_method"] = interval_of(right_answers(cell))
        asked = sorted({(str(a["id"]), a["label"]) for a in cell["answers"]})
        for what, key, value in (("scale", "scale", cell["scale"]), ("questions", cell["size"], asked)):
            known_path, known = first.setdefault(key, (path, value))
            if known != value:
                raise LaidError(
                    f"{path}: not the same {what} as {known_path}: cells of one folder must belong together;"
                    " remove the stale one and run `snakemake --cores all`"
                )
        cells[cell["student"], cell["method"], cell["size"]] = cell
    return cells


def check_cell(cell: Any, where: str) -> None:
    """Check keys, types and that every derived number follows from the answers. Raises LaidError naming `where`."""
    if not isinstance(cell, dict) or cell.get("format") != FORMAT:
        found = cell.get("format") if isinstance(cell, dict) else type(cell).__name__
        raise LaidError(f"{where}: not a cell: format {found!r}, expected {FORMAT!r}")
    parsed(cell, Cell, where)
    _check_answers(cell, where)
    answers = cell["answers"]
    for key, implied in (
        ("n", len(answers)),
        ("questions", len({a["id"] for a in answers})),
        ("seeds", sorted({a["seed"] for a in answers})),
        ("accuracy", _share(is_right(a) for a in answers)),
        ("compliance", _share(a["answer"] != "none" for a in answers)),
    ):
        same = abs(cell[key] - implied) < _TINY if isinstance(implied, float) else cell[key] == implied
        if not same:
            raise LaidError(f"{where}: {key} says {cell[key]}, its answers give {implied}: changed by hand?")
    interval = cell["interval"]
    if not -_TINY <= interval[0] <= cell["accuracy"] + _TINY <= interval[1] + 2 * _TINY <= 1 + 3 * _TINY:
        raise LaidError(f"{where}: interval {interval} does not hold the accuracy {cell['accuracy']}")
    if cell["digest"] != _digest(cell):
        raise LaidError(f"{where}: the cell does not match its digest: changed by hand; make it again")


def _check_answers(cell: dict[str, Any], where: str) -> None:
    """What no type can say of answers: images that are there, every question once a seed, one label each."""
    answers, size = cell["answers"], cell["size"]
    seen: set[tuple[Any, Any]] = set()
    labels: dict[Any, str] = {}
    for i, answer in enumerate(answers):
        if not all(place < size for place in answer["needles"]):
            raise LaidError(
                f"{where}: answer {i}: needles {answer['needles']} must be image indices below the size {size}"
            )
        key = (answer["seed"], answer["id"])
        if key in seen:
            raise LaidError(f"{where}: question {answer['id']!r} is answered twice by seed {answer['seed']}")
        if labels.setdefault(answer["id"], answer["label"]) != answer["label"]:
            raise LaidError(f"{where}: question {answer['id']!r} has two labels")
        seen.add(key)
    seeds = {seed for seed, _ in seen}
    if len(seen) != len(seeds) * len(labels):
        raise LaidError(
            f"{where}: {len(labels)} questions x {len(seeds)} seeds make {len(seeds) * len(labels)} answers,"
            f" found {len(seen)}: some seed did not answer every question"
        )


def _check_place(cell: dict[str, Any], path: Path) -> None:
    """A cell names the place it lies in; a copied or renamed one does not pass for another."""
    inside = f"{cell['student']}/{cell['method']}/{cell['size']}.json"
    # By its text alone: the file may be a link, into DVC's cache or to another disk.
    if not os.path.abspath(path).endswith(f"/{inside}"):
        raise LaidError(f"{path}: holds the cell {inside}: moved or copied from there?")


def interval_of(right: np.ndarray) -> tuple[list[float], str]:
    """The 95 % interval of the mean of `right` (seeds, questions), as fractions, and the method's name."""
    seeds, questions = right.shape
    # Resampling can say nothing where all answers are right, or all wrong; Wilson's interval over the questions can.
    if seeds == 1 or right.min() == right.max():
        low, high = wilson(int(right[0].sum()), questions)
        return [round(low, 9), round(high, 9)], ONE_SEED
    low, high = cluster_bootstrap(right)
    # The percentile interval of very few seeds can miss the mean by a hair; the interval always holds it.
    mean = float(right.mean())
    return [round(min(low, mean), 9), round(max(high, mean), 9)], SEVERAL_SEEDS


def _id_order(question: int | str) -> tuple[bool, int, str]:
    """Sorts numbers by value before text by letters."""
    return (True, 0, question) if isinstance(question, str) else (False, question, "")


def _digest(cell: dict[str, Any]) -> str:
    return sha256_json({key: value for key, value in cell.items() if key != "digest"})


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)
