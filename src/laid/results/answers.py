"""All answers of a suite as one table with one row per answer, and beside it one row per cell.

Every table, figure and claim is a query of these two: `Results.answers` and `Results.cells`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from laid.errors import LaidError
from laid.evaluation.cells import Cells, ordered
from laid.evaluation.intervals import RESAMPLES, joint_draws
from laid.evaluation.scoring import is_right
from laid.io import atomic_path, read_json
from laid.results import statistics
from laid.results.names import Names, method_names
from laid.results.needed import Key, missing_cells, needed

if TYPE_CHECKING:
    from laid.settings import Settings

Model = tuple[str, str]  # (student, method)
_OF_CELL = ("scale", "student", "role", "method", "size", "tokens_mean", "positions_mean")
_FACTS = ("accuracy", "interval_method", "compliance", "n", "questions", "seeds", "digest", "provenance")


def answers_frame(cells: Cells, suite: str = "test") -> pd.DataFrame:
    """One row per answer: suite, scale, student, params, role, method, size, tokens_mean, positions_mean, seed,
    question, label, answer, correct, p_yes, needles (places of the needle images in the haystack).

    params is what tables call the student ("7B"), label the right answer. Within a cell rows are sorted by seed, then
    by question.
    """
    parts = []
    for cell in cells.values():
        found = ordered(cell["answers"])
        part = pd.DataFrame(found).rename(columns={"id": "question"})
        part["correct"] = [is_right(answer) for answer in found]
        parts.append(part.assign(params=cell["label"], **_of(cell, _OF_CELL)))
    columns = [*_OF_CELL[:2], "params", *_OF_CELL[2:], "seed", "question", "label", "answer", "correct"]
    frame = pd.concat(parts, ignore_index=True)[[*columns, "p_yes", "needles"]]
    frame.insert(0, "suite", suite)
    return frame


def cells_frame(cells: Cells) -> pd.DataFrame:
    """One row per cell, by (student, method, size): accuracy, both ends of its interval, and what it rests on."""
    rows = [
        {"params": cell["label"], "low": cell["interval"][0], "high": cell["interval"][1]}
        | _of(cell, (*_OF_CELL, *_FACTS))
        for cell in cells.values()
    ]
    return pd.DataFrame(rows).set_index(["student", "method", "size"], drop=False)


def _of(cell: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Values of a cell; what a server did not tell is no number."""
    return {key: math.nan if cell[key] is None else cell[key] for key in keys}


def save_answers(frame: pd.DataFrame, path: Path) -> None:
    """Write the answers as Parquet or CSV, by the suffix of `path`. Raises LaidError for another suffix."""
    frame = frame.assign(question=frame["question"].astype(str))
    if path.suffix not in (".parquet", ".csv"):
        raise LaidError(f"{path}: answers are written as .parquet or .csv")
    with atomic_path(path) as beside:
        if path.suffix == ".csv":
            frame = frame.assign(needles=[" ".join(map(str, places)) for places in frame["needles"]])
            frame.to_csv(beside, index=False, lineterminator="\n")
            return
        try:
            frame.to_parquet(beside, index=False)
        except ImportError:
            raise LaidError(
                f"{path}: Parquet needs pyarrow (pip install pyarrow); .csv does without"
            ) from None


def read_records(folder: str | Path, kind: str) -> dict[str, dict[str, Any]]:
    """The records of one format (of `laid analyse`, of `laid why`) in a folder, by model; other files are passed over.

    Raises LaidError for a file that lies in another's place.
    """
    found = {}
    for path in sorted(Path(folder).glob("[!.]*.json")):
        record = read_json(path)
        if isinstance(record, dict) and record.get("format") == kind:
            if path.stem != record.get("student"):
                raise LaidError(
                    f"{path}: holds the record of {record.get('student')!r}: moved or copied from there?"
                )
            found[record["student"]] = record
    return found


class Curves:
    """Accuracy over sizes of several models, as fractions, with bootstrap draws: measured here, or printed.

    teacher and students are model names, students from large to small; kd names the method read as plain distillation.
    curves[model] is {size: accuracy}, draws_of[model] has shape (resamples, sizes).
    """

    name: str
    teacher: str
    students: list[str]
    names: Names
    short_max: int
    threshold: float
    curves: Mapping[Model, Mapping[int, float]]
    draws_of: Mapping[Model, np.ndarray]
    kd = "kd"
    farther: Curves | None = None  # the same models, or some of them, measured at larger sizes too
    omitted: Sequence[int] = ()
    printed = (
        False  # figures from a paper: exact as they stand, with the error that they would have as shares
    )

    def has(self, student: str, *methods: str) -> bool:
        return all((student, method) in self.curves for method in methods)

    def pairs(self, method: str, against: str = "base") -> Iterator[tuple[str, list[Model]]]:
        """(student, [under `method`, under `against`]) for every student that was measured under both."""
        for student in self.students:
            if self.has(student, method, against):
                yield student, [(student, method), (student, against)]

    def common(self, *models: Model) -> list[int]:
        """The sizes that all the models have, ascending."""
        return sorted(set.intersection(*(set(self.curves[model]) for model in models)))

    def parts(self, *models: Model) -> tuple[list[int], list[int]]:
        """Those of them that have a column in the tables, as the short and the long window."""
        return self.short_long(size for size in self.common(*models) if size not in self.omitted)

    def short_long(self, sizes: Iterable[int]) -> tuple[list[int], list[int]]:
        """The sizes of the short and of the long window."""
        sizes = list(sizes)
        return [s for s in sizes if s <= self.short_max], [s for s in sizes if s > self.short_max]

    def point(self, model: Model, sizes: Sequence[int]) -> np.ndarray:
        """Accuracies (1, sizes)."""
        return np.array([[self.curves[model][size] for size in sizes]])

    def draws(self, model: Model, sizes: Sequence[int]) -> np.ndarray:
        """Bootstrap accuracies (resamples, sizes); all models are drawn together."""
        own = list(self.curves[model])
        return self.draws_of[model][:, [own.index(size) for size in sizes]]


class Results(Curves):
    """The cells of one suite that a configuration's tables need. Raises LaidError, with the command, where one is missing.

    folder: where the cells lie, for messages. keys: the (student, method, size) that are wanted, by default those of
    Tables 1 to 3. hint: what the command that makes a missing one needs besides.
    """

    def __init__(
        self,
        cells: Cells,
        settings: Settings,
        folder: str | Path,
        keys: Iterable[Key] | None = None,
        hint: str = "",
        resamples: int | None = None,
    ):
        keys = list(needed(settings) if keys is None else keys)
        labels = settings.models.labels  # a cell holds the label of the day it was measured
        cells = {key: {**cell, "label": labels.get(key[0], cell["label"])} for key, cell in cells.items()}
        self.folder, self.settings = Path(folder), settings
        if missing := [key for key in keys if key not in cells]:
            raise LaidError(missing_cells(self.folder, missing) + hint)
        self.name, self.teacher = settings.scale, settings.models.teacher
        self.names = method_names(settings)
        self.short_max, self.threshold = settings.tables.short_max, settings.tables.threshold
        self.omitted = settings.tables.omit
        members = list(dict.fromkeys(student for student, _, _ in keys))
        self.students = [name for name in members if name != self.teacher]
        self.sizes = sorted({size for _, _, size in keys})
        self.models = sorted(dict.fromkeys(key[:2] for key in keys), key=lambda m: members.index(m[0]))
        self.answers, self.cells = answers_frame(cells), cells_frame(cells)
        table = self.cells["accuracy"].unstack("size")
        self.curves = {model: dict(table.loc[model, self.sizes].items()) for model in self.models}
        # The smallest p-value of n resamples is 2 / (n + 1): with too few, no test of a large family could hold.
        self.one_seed = all(len(seeds) == 1 for seeds in self.wanted["seeds"])
        family = len(self.models) * (len(self.sizes) + 2)
        enough = RESAMPLES if self.one_seed else max(RESAMPLES, round(3 * family / statistics.LEVEL))
        self.resamples = resamples or enough

    @property
    def wanted(self) -> pd.DataFrame:
        """The cells of `models` at `sizes`, in that order."""
        return self.cells.loc[[(*model, size) for model in self.models for size in self.sizes]]

    def cell(self, student: str, method: str, size: int) -> Any:
        """A cell's row, by attributes."""
        return self._rows[student, method, size]

    @cached_property
    def _rows(self) -> dict[Key, Any]:
        return {(row.student, row.method, row.size): row for row in self.cells.itertuples(index=False)}

    @cached_property
    def right(self) -> dict[Model, list[np.ndarray]]:
        """Right (1) and wrong (0) answers (seeds, questions) of every model, by size."""
        flags = {
            key: part.to_numpy(np.int8)
            for key, part in self.answers.groupby(["student", "method", "size"], sort=False)["correct"]
        }
        return {
            model: [
                flags[*model, size].reshape(len(self.cell(*model, size).seeds), -1) for size in self.sizes
            ]
            for model in self.models
        }

    @cached_property
    def draws_of(self) -> dict[Model, np.ndarray]:
        """Joint bootstrap of all models: questions, the same for all, and seeds."""
        return joint_draws(self.right, self.resamples)

    def compare(self, first: Model, second: Model, sizes: Sequence[int]) -> statistics.Comparison:
        """The second's mean accuracy over sizes minus the first's."""
        return statistics.compare(
            *self._pair(first, second, sizes), *(self.draws(m, sizes) for m in (first, second))
        )

    def p_value(self, first: Model, second: Model, sizes: Sequence[int]) -> float:
        """The p-value of `compare`, without the bootstrap where one seed each lets McNemar's test do."""
        pair = self._pair(first, second, sizes)
        return (
            statistics.mcnemar_of(*pair)
            if statistics.one_seed(*pair)
            else self.compare(first, second, sizes).p
        )

    def _pair(self, first: Model, second: Model, sizes: Sequence[int]) -> list[list[np.ndarray]]:
        return [[self.right[model][self.sizes.index(size)] for size in sizes] for model in (first, second)]

    def columns(self, omit: str) -> list[int]:
        """Sizes with a column in a table, given the key of `tables` that lists those without."""
        omitted = getattr(self.settings.tables, omit)
        shown = [size for size in self.sizes if size not in omitted]
        if not shown:
            raise LaidError(f"tables.{omit} {omitted} leaves none of the test sizes {self.sizes}")
        return shown

    def member(self, student: str) -> str:
        """As "small (0.35M)": the member's name and its label."""
        label = self.cell(student, "base", self.sizes[0]).params
        return student if student == label else f"{student} ({label})"

    def questions_note(self, sizes: Sequence[int] | None = None) -> str:
        """How many questions and seeds stand behind a cell, of `sizes` or of all."""
        cells = self.wanted[self.wanted["size"].isin(sizes or self.sizes)]
        asked, seeds = cells["questions"], cells["seeds"].map(len).max()
        each = str(asked.min()) if asked.min() == asked.max() else f"{asked.min()} to {asked.max()}"
        trained = "1 training seed" if seeds == 1 else f"{seeds} training seeds per trained method"
        scale = cells["scale"].iloc[0]
        return f"Scale {scale}; {each} questions per cell, half of them yes; {trained}."
