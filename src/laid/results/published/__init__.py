"""The figures that the paper prints (Zhou et al., AAAI 2026), as data: what our own results are held against."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from laid.evaluation.intervals import RESAMPLES
from laid.results.answers import Curves, Model
from laid.results.names import SHIPPED, Names

PAPER_QUESTIONS = 100  # per size, as the paper says of its evaluation
# The paper's names of methods, and ours.
METHODS = {"base": "base", "yarn": "yarn", "selfextend": "self_extend", "sft_lora": "sft", "laid": "laid"}


def rows(name: str) -> list[dict[str, str]]:
    """The rows of "table1", "table2" or "table3" as printed, keyed by column, all values text."""
    path = Path(__file__).with_name(f"{name}.csv")
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(line for line in handle if not line.startswith("#")))


def curves(name: str) -> dict[Model, dict[int, float]]:
    """Accuracy as a fraction by (model, our method name) and haystack size, from "table1" or "table3"."""
    return {
        (row["params"], METHODS.get(row["method"], row["method"])): {
            int(column): float(value) / 100 for column, value in row.items() if column.isdigit()
        }
        for row in rows(name)
    }


def tokens() -> dict[int, float]:
    """Average prompt tokens by haystack size, as Table 2 prints them."""
    return {int(row["images"]): float(row["avg_tokens"]) for row in rows("table2")}


class Published(Curves):
    """The printed tables; draws are binomial with 100 questions a size, models apart, for lack of answers.

    Where two tables print another figure for the same cell (7B base at 100 images), the later named counts.
    """

    name, teacher, kd, printed = "published", "32B", "laid_wo_laid", True
    short_max, threshold, names = 20, 0.8, Names(SHIPPED)

    def __init__(
        self,
        resamples: int = RESAMPLES,
        tables: Sequence[str] = ("table3", "table1"),
        seed: int = PAPER_QUESTIONS,
    ):
        self.students, self.resamples, self.seed = ["7B", "3B"], resamples, seed
        self.curves = {model: curve for table in tables for model, curve in curves(table).items()}

    @cached_property
    def draws_of(self) -> dict[Model, np.ndarray]:
        rng = np.random.default_rng([0, self.seed])
        n = PAPER_QUESTIONS
        return {
            model: rng.binomial(n, list(curve.values()), (self.resamples, len(curve))) / n
            for model, curve in self.curves.items()
        }
