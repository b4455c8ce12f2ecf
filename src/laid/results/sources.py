"""Accuracy curves to put claims to the test on: the printed tables, or the cells of a scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from laid.results import published, stats
from laid.results.comparisons import PAPER_QUESTIONS
from laid.results.tables import Grid

Key = tuple[str, str]  # (model, method)


class Source:
    """Points and bootstrap draws of accuracy curves, as fractions.

    teacher and students are model names, students from large to small; kd names the method read as plain distillation.
    """

    name: str
    teacher: str
    students: list[str]
    kd: str
    short_max: int
    threshold: float
    omitted: Sequence[int] = ()
    curves: dict[Key, dict[int, float]]
    all_draws: dict[Key, np.ndarray]

    def has(self, model: str, *methods: str) -> bool:
        return all((model, method) in self.curves for method in methods)

    def sizes(self, *keys: Key) -> list[int]:
        """The sizes that all the curves have, ascending."""
        return sorted(set.intersection(*(set(self.curves[key]) for key in keys)))

    def windows(self, *keys: Key) -> tuple[list[int], list[int]]:
        """Those of them that have a column in the tables, parted into the short and the long window."""
        sizes = [size for size in self.sizes(*keys) if size not in self.omitted]
        return [s for s in sizes if s <= self.short_max], [s for s in sizes if s > self.short_max]

    def point(self, key: Key, sizes: list[int]) -> np.ndarray:
        """Accuracies (1, sizes)."""
        return np.array([[self.curves[key][size] for size in sizes]])

    def draws(self, key: Key, sizes: list[int]) -> np.ndarray:
        """Bootstrap accuracies (resamples, sizes); models of one source are drawn together."""
        own = list(self.curves[key])
        return self.all_draws[key][:, [own.index(size) for size in sizes]]


class CellSource(Source):
    """The cells of a scale; draws resample questions, the same for all models, and seeds."""

    kd = "kd"

    def __init__(self, grid: Grid):
        self.grid = grid
        self.name = grid.config["scale"]
        self.teacher, self.students = grid.teacher, grid.students
        self.short_max, self.threshold = grid.settings["short_max"], grid.settings["threshold"]
        self.omitted = grid.settings["omit"]
        self.curves = {
            key: dict(zip(grid.sizes, grid.accuracies(*key, grid.sizes), strict=True)) for key in grid.models
        }

    @cached_property
    def all_draws(self) -> dict[Key, np.ndarray]:
        return self.grid.answers.draws


class PublishedSource(Source):
    """Tables 1 and 3 as printed; draws are binomial with 100 questions a size, models apart, for lack of answers.

    Where the two tables print another figure for the same cell (7B base at 100 images), Table 1 counts.
    """

    name, teacher, kd = "published", "32B", "laid_wo_laid"
    short_max, threshold = 20, 0.8

    def __init__(self, resamples: int = stats.RESAMPLES):
        self.students = ["7B", "3B"]
        self.curves = {**published.curves("table3"), **published.curves("table1")}
        self.resamples = resamples

    @cached_property
    def all_draws(self) -> dict[Key, np.ndarray]:
        rng = np.random.default_rng([0, PAPER_QUESTIONS])
        n = PAPER_QUESTIONS
        return {
            key: rng.binomial(n, list(curve.values()), (self.resamples, len(curve))) / n
            for key, curve in self.curves.items()
        }
