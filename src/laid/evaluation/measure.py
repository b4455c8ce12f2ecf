"""From questions to cells, whoever answers: answers are kept as they come, each cell is written as its size ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from laid import provenance
from laid.evaluation.cells import Answer, make_cell, write_cell
from laid.evaluation.kept import Kept
from laid.evaluation.scoring import is_right
from laid.evaluation.sets import QuestionSet
from laid.io import remove_half_written, write_json
from laid.progress import Progress
from laid.settings import Settings

# (seed, questions, ids of those that are answered) -> answers in batches: what a cell has of each but its seed, and the prompt's
# "tokens" and "positions", None where nobody knows them
Ask = Callable[[int, QuestionSet, set[Any]], Iterator[list[dict[str, Any]]]]


def measure(
    config: Settings,
    student: str,
    method: str,
    sets: Sequence[QuestionSet],
    out: str | Path,
    ask: Ask,
    *,
    label: str,
    records: Sequence[dict[str, Any]],
    by: Any,
    seeds: Sequence[int] = (0,),
    found: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = lambda _: {},
    cost: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Ask every question once a seed, smallest sets first; write out/<size>.json each.

    records: of laid.provenance, one for each set. by: what else answers follow from (hardware). What an earlier call with the same
    records left unfinished is gone on with. found: what a set's answers add to its record. label: the student's name in tables.
    cost: as evaluate_cells has it.
    """
    start = time.perf_counter()
    order = sorted(range(len(sets)), key=lambda at: sets[at].size)
    paths = [Path(out) / f"{part.size}.json" for part in sets]
    for path in paths:
        remove_half_written(path.parent, path.name)
    kept = [Kept(path, [student, method, record, by]) for path, record in zip(paths, records, strict=True)]
    had, total = (sum(map(len, parts)) for parts in ([k.answers for k in kept], [p.questions for p in sets]))
    if any(part.strange for part in kept):
        print(
            f"{student} {method}: the answers of an unfinished evaluation in {out} are not of this model, these questions and"
            " settings on this machine: they are asked again",
            file=sys.stderr,
        )
    if had:
        print(f"{student} {method}: goes on after {had} of {total * len(seeds)} answers", file=sys.stderr)
    cells: dict[int, dict[str, Any]] = {}
    with Progress(total * len(seeds) - had, f"{student} {method}", unit="questions") as bar:
        for seed in seeds:
            for at in order:
                mine = kept[at]
                for batch in ask(seed, sets[at], mine.ids(seed)):
                    mine.add([{**answer, "seed": seed} for answer in batch])
                    right = sum(map(is_right, mine.answers)) / len(mine.answers)
                    bar.update(len(batch), size=sets[at].size, accuracy=right)
                if seed == seeds[-1]:
                    record = records[at] | found(mine.answers)
                    cells[at] = _cell(config, student, method, label, sets[at], mine.answers, record)
                    write_cell(paths[at], cells[at])
    # Not before: a workflow takes the cells of a job that fails away.
    for part in kept:
        part.remove()
    write_json(Path(out) / "cost.json" if cost is None else cost, provenance.cost(start))
    return [cells[at] for at in range(len(sets))]


def _cell(
    config: Settings,
    student: str,
    method: str,
    label: str,
    part: QuestionSet,
    answers: Sequence[dict[str, Any]],
    record: dict[str, Any],
) -> dict[str, Any]:
    return make_cell(
        scale=config.scale,
        student=student,
        label=label,
        role="teacher" if student == config.models.teacher else "student",
        method=method,
        size=part.size,
        answers=[{key: answer[key] for key in Answer.__annotations__} for answer in answers],
        tokens_mean=_mean(answers, "tokens"),
        positions_mean=_mean(answers, "positions"),
        provenance=record,
    )


def _mean(answers: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [answer[key] for answer in answers]
    return None if None in values else sum(values) / len(values)
