"""The table of POPE's object questions: what a student answers about single images, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from laid.data.pope import STRATEGIES
from laid.errors import LaidError
from laid.evaluation.cells import load_cells
from laid.evaluation.intervals import joint_draws
from laid.results.answers import Model, answers_frame
from laid.results.names import Names
from laid.results.render import Entry, Table, points

SCORES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def scores(answers: pd.DataFrame) -> dict[str, float | None]:
    """What POPE's evaluate.py prints, as fractions; "yes" is the positive class. None: divided by nothing.

    answers: columns answer and label. An answer other than "no" counts as yes, as in POPE.
    """
    said, true = answers["answer"] != "no", answers["label"] == "yes"
    hits, said_yes, truly_yes = int((said & true).sum()), int(said.sum()), int(true.sum())
    return {
        "accuracy": float((said == true).mean()),
        "precision": hits / said_yes if said_yes else None,
        "recall": hits / truly_yes if truly_yes else None,
        "f1": 2 * hits / (said_yes + truly_yes) if hits else None,
        "yes_ratio": said_yes / len(answers),
    }


class PopeAnswers:
    """The answers under all strategies, each model's the same way: `answers` has a row an answer, with its strategy and
    image beside the columns of laid.results.answers.

    Raises LaidError where a strategy lacks a model that another has, or models were asked about other images.
    """

    def __init__(self, folders: Mapping[str, Path]):
        """folders: where the cells of each strategy lie."""
        cells = {strategy: load_cells(folder) for strategy, folder in folders.items()}
        self.models: list[Model] = sorted({key[:2] for found in cells.values() for key in found})
        for strategy, found in cells.items():
            for student, method in self.models:
                if (student, method, 1) not in found:
                    path = folders[strategy] / student / method / "1.json"
                    raise LaidError(f"{path}: no such cell; make it with: snakemake --cores all pope")
        frames = [answers_frame(found).assign(strategy=strategy) for strategy, found in cells.items()]
        self.answers = pd.concat(frames, ignore_index=True)
        self.answers["image"] = self.answers["question"].str.partition(":")[0]
        self.folders = folders

    def of(self, model: Model) -> pd.DataFrame:
        return self.answers[(self.answers["student"] == model[0]) & (self.answers["method"] == model[1])]

    def right(self, model: Model) -> tuple[np.ndarray, int]:
        """(right answers, answers) per image over all strategies: (seeds, images) whole numbers, and a number."""
        by_image = self.of(model).groupby(["seed", "image"])["correct"]
        asked = by_image.size().unique()
        if len(asked) != 1:
            where = next(iter(self.folders.values())).parent
            raise LaidError(
                f"{where}: {min(asked)} to {max(asked)} questions per image, expected as many of each"
            )
        return by_image.sum().unstack().to_numpy(int), int(asked[0])

    def draws(self, models: Sequence[Model]) -> dict[Model, np.ndarray]:
        """Bootstrap accuracies (resamples,) over all strategies: images are drawn, the same for all models, and seeds.

        The questions of one image stand or fall together, so images are what is drawn.
        """
        right = {model: self.right(model) for model in models}
        most = max(asked for _, asked in right.values())
        drawn = joint_draws({model: [counts] for model, (counts, _) in right.items()}, most=most)
        return {model: drawn[model][:, 0] / right[model][1] for model in models}

    def change(self, student: str, method: str) -> tuple[float, float, float]:
        """Accuracy over all strategies, `method` minus base: (difference, low, high) as fractions, 95 % interval."""
        models = [(student, "base"), (student, method)]
        drawn = self.draws(models)
        before, after = (counts.mean() / asked for counts, asked in map(self.right, models))
        low, high = np.quantile(drawn[models[1]] - drawn[models[0]], [0.025, 0.975])
        return float(after - before), float(low), float(high)


def read_pope_answers(folder: Path) -> PopeAnswers:
    """The cells below <folder>/pope_<strategy>/<student>/<method>/1.json."""
    return PopeAnswers({strategy: folder / f"pope_{strategy}" for strategy in STRATEGIES})


def table(found: PopeAnswers, teacher: str, students: Sequence[str], names: Names) -> Table:
    """Every model under every strategy, in percent, and the change of accuracy over all strategies against base.

    Raises LaidError where the cells are of other models.
    """
    models = [
        (student, method)
        for student in (teacher, *students)
        for method in names.ordered([method for name, method in found.models if name == student])
    ]
    if not models:
        there = ", ".join(sorted({student for student, _ in found.models}))
        raise LaidError(
            f"the POPE cells are of {there}, the configuration's models are {', '.join((teacher, *students))}:"
            " name a configuration that has them with --config"
        )
    rows, data = [], []
    for model in models:
        answers = found.of(model)
        parts = {strategy: answers[answers["strategy"] == strategy] for strategy in STRATEGIES}
        for strategy, part in {**parts, "all": answers}.items():
            values = scores(part)
            row = [Entry(model[0]), Entry(names[model[1]]), Entry(strategy)]
            row += [Entry("-" if v is None else f"{100 * v:.2f}") for v in values.values()]
            line = {"student": model[0], "method": model[1], "strategy": strategy, "n": len(part)}
            line |= {name: "" if v is None else f"{100 * v:.4f}" for name, v in values.items()}
            against = dict.fromkeys(("against_base", "low", "high"), "")
            if strategy == "all" and model[1] != "base" and (model[0], "base") in found.models:
                change = found.change(*model)
                row.append(Entry(f"{100 * change[0]:+.2f}", points(change).detail))
                against = {name: f"{100 * v:.4f}" for name, v in zip(against, change, strict=True)}
            else:
                row.append(Entry(""))
            rows.append(row)
            data.append(line | against)
    first = found.of(models[0])
    questions = first[first["strategy"] == STRATEGIES[0]]["question"].nunique()
    return Table(
        "pope",
        "POPE: object questions about single images",
        ["Model", "Method", "Absent objects", "Accuracy", "Precision", "Recall", "F1", "Yes", "Against base"],
        rows,
        [
            f"{first['image'].nunique()} images, {questions} questions a strategy, half of them yes; in %.",
            "Precision, recall and F1 are of yes; Yes is the share of answers that say yes; a dash where nothing divides.",
            "Against base: points of accuracy over all three strategies.",
        ],
        set(range(0, len(rows), len(STRATEGIES) + 1)),
        names=3,
        legend="In brackets the 95 % interval: paired bootstrap over images and seeds.",
        data=pd.DataFrame(data),
    )
