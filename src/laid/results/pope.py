"""The table of POPE's object questions: what a student answers about single images, before and after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laid.data.pope import STRATEGIES
from laid.errors import LaidError
from laid.evaluation.cells import Cells, load_cells
from laid.evaluation.scoring import is_right
from laid.results import stats
from laid.results.render import Entry, Table
from laid.results.tables import METHOD_NAMES

Key = tuple[str, str]  # (student, method)


@dataclass(frozen=True)
class Scores:
    """What POPE's evaluate.py prints, as fractions; "yes" is the positive class. None: divided by nothing."""

    accuracy: float
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float


def scores(answers: Iterable[dict[str, Any]]) -> Scores:
    """The scores of a cell's answers. An answer other than "no" counts as yes, as in POPE."""
    pairs = [(a["answer"] != "no", a["label"] == "yes") for a in answers]
    hits = sum(said and true for said, true in pairs)
    said = sum(said for said, _ in pairs)
    true = sum(true for _, true in pairs)
    return Scores(
        accuracy=sum(said == true for said, true in pairs) / len(pairs),
        precision=hits / said if said else None,
        recall=hits / true if true else None,
        f1=2 * hits / (said + true) if hits else None,
        yes_ratio=said / len(pairs),
    )


class PopeCells:
    """The cells of all strategies below a folder: <strategy>/<student>/<method>/1.json.

    Raises LaidError where a strategy lacks a model that another has, or models were asked about other images.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.cells: dict[str, Cells] = {s: load_cells(self.folder / s) for s in STRATEGIES}
        self.models: list[Key] = sorted({key[:2] for cells in self.cells.values() for key in cells})
        for strategy, cells in self.cells.items():
            for student, method in self.models:
                if (student, method, 1) not in cells:
                    raise LaidError(
                        f"{self.folder / strategy / student / method}/1.json: no such cell; make it with:"
                        " snakemake --cores all pope"
                    )

    def answers(self, key: Key, strategy: str) -> list[dict[str, Any]]:
        """The answers of a model under a strategy, all seeds."""
        return self.cells[strategy][(*key, 1)]["answers"]

    def right(self, key: Key) -> tuple[np.ndarray, int]:
        """(right answers, answers) per image over all strategies: (seeds, images) whole numbers, and a number."""
        found: dict[tuple[int, str], list[bool]] = {}
        for strategy in STRATEGIES:
            for answer in self.answers(key, strategy):
                image = answer["id"].partition(":")[0]
                found.setdefault((answer["seed"], image), []).append(is_right(answer))
        asked = {len(right) for right in found.values()}
        if len(asked) != 1:
            raise LaidError(
                f"{self.folder}: {min(asked)} to {max(asked)} questions per image, expected as many of each"
            )
        seeds, images = (sorted({key[k] for key in found}) for k in (0, 1))
        return np.array([[sum(found[seed, image]) for image in images] for seed in seeds]), asked.pop()

    def draws(self, keys: Sequence[Key]) -> dict[Key, np.ndarray]:
        """Bootstrap accuracies (resamples,) over all strategies: images are drawn, the same for all models, and seeds.

        The questions of one image stand or fall together, so images are what is drawn.
        """
        right = {key: self.right(key) for key in keys}
        most = max(asked for _, asked in right.values())
        drawn = stats.joint_draws({key: [counts] for key, (counts, _) in right.items()}, most=most)
        return {key: drawn[key][:, 0] / right[key][1] for key in keys}

    def change(self, student: str, method: str) -> tuple[float, float, float]:
        """Accuracy over all strategies, `method` minus base: (difference, low, high) as fractions, 95 % interval."""
        keys = [(student, "base"), (student, method)]
        drawn = self.draws(keys)
        before, after = (counts.mean() / asked for counts, asked in map(self.right, keys))
        low, high = np.quantile(drawn[keys[1]] - drawn[keys[0]], [0.025, 0.975])
        return float(after - before), float(low), float(high)


def table(found: PopeCells, teacher: str, students: Sequence[str]) -> Table:
    """Every model under every strategy, in percent, and the change of accuracy over all strategies against base."""
    order = {name: at for at, name in enumerate([teacher, *students])}
    methods = list(METHOD_NAMES)
    models = sorted(
        (key for key in found.models if key[0] in order),
        key=lambda key: (order[key[0]], methods.index(key[1]) if key[1] in methods else len(methods), key[1]),
    )
    header = [
        "Model",
        "Method",
        "Absent objects",
        "Accuracy",
        "Precision",
        "Recall",
        "F1",
        "Yes",
        "Against base",
    ]
    csv = [["student", "method", "strategy", "n", "accuracy", "precision", "recall", "f1", "yes_ratio", "against_base", "low", "high"]]  # fmt: skip
    rows, breaks = [], set()
    for key in models:
        breaks.add(len(rows))
        parts = {strategy: found.answers(key, strategy) for strategy in STRATEGIES}
        parts["all"] = [answer for part in parts.values() for answer in part]
        for strategy, answers in parts.items():
            values = astuple(scores(answers))
            change = None
            if strategy == "all" and key[1] != "base" and (key[0], "base") in found.models:
                change = [100 * v for v in found.change(*key)]
            name = METHOD_NAMES.get(key[1], key[1])
            row = [Entry(key[0]), Entry(name), Entry(strategy)]
            row += [Entry("-" if v is None else f"{100 * v:.2f}") for v in values]
            row.append(
                Entry("")
                if change is None
                else Entry(f"{change[0]:+.2f}", f"[{change[1]:+.1f}, {change[2]:+.1f}]")
            )
            rows.append(row)
            csv.append(
                [*key, strategy, str(len(answers))]
                + ["" if v is None else f"{100 * v:.4f}" for v in values]
                + (["", "", ""] if change is None else [f"{v:.4f}" for v in change])
            )
    questions = {len({a["id"] for a in found.answers(key, STRATEGIES[0])}) for key in models}
    images = found.right(models[0])[0].shape[1]
    notes = [
        f"{images} images, {max(questions)} questions a strategy, half of them yes; in %.",
        "Precision, recall and F1 are of yes; Yes is the share of answers that say yes; a dash where nothing divides.",
        "Against base: points of accuracy over all three strategies.",
    ]
    legend = "In brackets the 95 % interval: paired bootstrap over images and seeds."
    return Table(
        "pope",
        "POPE: object questions about single images",
        header,
        rows,
        csv,
        notes,
        breaks,
        names=3,
        legend=legend,
    )
