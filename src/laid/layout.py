"""Where everything lies below <results>/<scale>, and what each result is made from.

The rules, the audit and the results share this. It names files and opens none.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from laid.errors import LaidError
from laid.results.needed import needed, needed_beyond, needed_by_tune
from laid.settings import Settings, TrainedMethod
from laid.settings.tune import tuned_students, variants


@dataclass(frozen=True)
class Suite:
    """A set of questions that models are asked; cells/<name>/<student>/<method>/<size>.json holds the answers.

    questions: the file of a size, below <results>/<scale>, with {size} open. seeds: training runs behind a cell.
    """

    name: str
    questions: str
    sizes: tuple[int, ...]
    seeds: int

    @property
    def folder(self) -> str:
        """Below which folder of <results>/<scale> its questions lie: haystacks, beyond or pope."""
        return self.questions.partition("/")[0]


def suites(settings: Settings) -> dict[str, Suite]:
    """Every suite that the settings describe, by name."""
    haystacks, seeds = settings.haystacks, settings.seeds

    def of_haystacks(name: str, folder: str, sizes: list[int], seeds: int) -> Suite:
        return Suite(name, f"{folder}/visual_haystack_{{size}}.json", tuple(sorted(sizes)), seeds)

    found = [
        of_haystacks("test", "haystacks/test", haystacks.test.sizes, seeds),
        of_haystacks(
            "validation",
            "haystacks/validation",
            haystacks.validation.sizes,
            settings.sweep.seeds,
        ),
        of_haystacks("beyond", "beyond/haystacks", settings.beyond.sizes, seeds),
        *(
            Suite(f"pope_{strategy}", f"pope/questions/coco_pope_{strategy}.json", (1,), seeds)
            for strategy in ("random", "popular", "adversarial")
        ),
    ]
    return {suite.name: suite for suite in found}


class Layout:
    """Places, as text, of one configuration's results; `root` replaces <results>/<scale> (a copy elsewhere)."""

    def __init__(self, settings: Settings, root: str | Path | None = None):
        self.settings = settings
        self.root = str(root or Path(settings.results) / settings.scale)
        local = settings.data.source == "local"
        self.coco: str = settings.data.root if local else f"{self.root}/coco"
        self.suites = suites(settings)
        self.models = settings.models
        self.members: list[str] = [self.models.teacher, *self.models.students]
        # Whoever can have a checkpoint, runs and cells: those that methods are tuned on, too.
        self.known: list[str] = list(dict.fromkeys([*self.members, *tuned_students(settings)]))

    def cell(self, suite: str, student: str, method: str, size: int) -> str:
        return f"{self.root}/cells/{suite}/{student}/{method}/{size}.json"

    def needed(self, student: str | None = None) -> list[str]:
        """The cells that the tables read, those of the test first, of one student or of all."""
        return [
            self.cell(suite, *key)
            for suite, keys in (("test", needed(self.settings)), ("beyond", needed_beyond(self.settings)))
            for key in keys
            if student is None or key[0] == student
        ]

    def needed_by_tune(self) -> list[str]:
        """The validation cells that the table of tuning reads."""
        return [self.cell("validation", *key) for key in needed_by_tune(self.settings)]

    def chosen(self, section: str, student: str) -> list[str]:
        """The methods that a section of the settings names, those that the student's tables have."""
        own = {method for name, method, _ in needed(self.settings) if name == student}
        return [method for method in getattr(self.settings, section).methods if method in own]

    def questions(self, suite: str, size: int) -> str:
        """The question file of a suite's cells of one size."""
        return f"{self.root}/{self.suites[suite].questions.format(size=size)}"

    def given(self, member: str) -> str | None:
        """A checkpoint of the user's own, a folder or a hub id; None for a member that is made here."""
        return self.models.checkpoints.get(member)

    def hub_id(self, member: str) -> bool:
        """Whether the member's checkpoint is a hub's, no folder. Raises LaidError for a folder that is not there.

        owner/name may be either: it is a folder's where the folder `owner` is here, or `name` in one of a similar name.
        """
        given = self.given(member)
        if given is None or os.path.exists(given):
            return False
        above, name = os.path.split(given)
        if os.path.isdir(above or "."):
            close = difflib.get_close_matches(name, os.listdir(above or "."), n=1)
            meant = [os.path.join(above, one) for one in close]
        else:
            similar = difflib.get_close_matches(above, os.listdir("."))
            meant = [path for folder in similar if os.path.isdir(path := os.path.join(folder, name))]
            if not meant and given.count("/") == 1 and given[0] not in "./":
                return True
        hint = f"did you mean {meant[0]}?" if meant else "a hub id has the form owner/name"
        raise LaidError(f"models.checkpoints.{member} = {given!r}: no such folder; {hint}")

    def checkpoint(self, member: str) -> str:
        """Where a member's checkpoint is: a folder made here, a folder of the user's, or a hub id."""
        return self.given(member) or f"{self.root}/models/{member}"

    def run(self, student: str, method: str, seed: int) -> str:
        return f"{self.root}/runs/{student}/{method}/seed{seed}"

    def runs(self, student: str, method: str, seeds: int) -> list[str]:
        """The training runs of a method, one per seed; none for base, YaRN and SelfExtend."""
        seeds = seeds if self.is_trained(method) else 0
        return [self.run(student, method, seed) for seed in range(seeds)]

    def is_trained(self, method: str) -> bool:
        return isinstance(self.settings.methods.get(method), TrainedMethod)

    @property
    def training_questions(self) -> str:
        return f"{self.root}/haystacks/train.json"

    @property
    def validation(self) -> list[str]:
        """The question files that a training run is asked on the way (training.validation)."""
        asked = self.settings.training.validation
        sizes = (asked.sizes or self.settings.haystacks.validation.sizes) if asked else []
        return [self.questions("validation", size) for size in sizes]

    def hears_teacher(self, method: str) -> bool:
        """Whether one of a method's losses needs what the teacher said."""
        weights = self.settings.methods[method]
        return any((weights.lambda_kl, weights.lambda_laid))

    def aligned(self) -> list[str]:
        """The students that a method of their tables pulls to the teacher's heads (equation 7)."""
        asked = dict.fromkeys((student, method) for student, method, _ in needed(self.settings))
        return [
            student
            for student in self.models.students
            if any(
                name == student and self.is_trained(method) and self.settings.methods[method].lambda_laid
                for name, method in asked
            )
        ]

    @property
    def teacher_cache(self) -> str:
        """The index of what the teacher said of the training questions: names every shard and its hash."""
        return f"{self.root}/teacher_cache/train/index.json"

    def needs_cache(self) -> bool:
        """Whether a method of tables, sweep or tune learns from what the teacher said."""
        sweep, tune = self.settings.sweep, variants(self.settings.tune.methods)
        named = {*(method for _, method, _ in needed(self.settings)), *sweep.against, *sweep.methods, *tune}
        return any(self.is_trained(method) and self.hears_teacher(method) for method in named)

    def question_files(self, folder: str) -> list[str]:
        """All question files below a folder (haystacks, beyond, pope), in the order of making."""
        asked = [
            self.questions(suite.name, size)
            for suite in self.suites.values()
            if suite.folder == folder
            for size in suite.sizes
        ]
        return [*([self.training_questions] if folder == "haystacks" else ()), *asked]
