"""What every result was made from: the records that steps leave behind, followed from a cell to the image files.

A step's record (laid.provenance.collect) names its inputs; `inputs_of` says where such an input lies below
<results>/<scale>/. `Lineage.problems` compares records with what is on disk and in the configuration now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from laid import provenance
from laid.data.coco import load_coco
from laid.data.haystacks import training_paths
from laid.data.pope import is_pope, read_pope
from laid.data.questions import Question, read_questions
from laid.errors import LaidError
from laid.io import parsed, read_json
from laid.layout import Layout
from laid.settings import Settings, slice_for

# One step makes all questions: of its settings, what those of one part do not depend on.
OTHER_PARTS = {
    "test": ("haystacks.train", "haystacks.validation", "haystacks.test.sizes"),
    "train": ("haystacks.test", "haystacks.validation.questions", "haystacks.validation.sizes"),
    "validation": ("haystacks.train", "haystacks.test", "haystacks.validation.sizes"),
}


class Shard(TypedDict):
    file: str
    sha256: str


class Shards(TypedDict):
    """What a teacher cache's index says of its files."""

    shards: list[Shard]


@dataclass(frozen=True)
class Step:
    """One step that left a record: its name, its wildcards, and the file the record stands in."""

    name: str
    wildcards: tuple[tuple[str, Any], ...]
    record: Path

    def __str__(self) -> str:
        return str(self.record.parent if self.record.name in provenance.RECORDS else self.record)


class Lineage:
    """The steps behind the cells of one configuration.

    `root` replaces <results>/<scale> (a copy of the results elsewhere). What was hashed once is not hashed again.
    """

    def __init__(self, config: Settings, root: str | Path | None = None):
        self.config = config
        self.layout = Layout(config, root)
        self.root, self.coco = Path(self.layout.root), Path(self.layout.coco)
        self._found: dict[Step, list[str]] = {}
        self._labels: dict[str, str | None] = {}
        self._questions: dict[Path, list[Question]] = {}

    # -------------------------------------------------------------- where things are

    def data(self) -> Step | None:
        """The step that made the images and their labels; None for the user's own, and for data without a record."""
        return self._recorded(Step("data", (), self.root / "coco" / "laid.json"))

    def haystacks(self, part: str) -> Step | None:
        """The step that made the questions of `part` (train, validation, test); None without a record."""
        return self._recorded(Step("haystacks", (("part", part),), self.root / "haystacks" / "laid.json"))

    def _recorded(self, step: Step) -> Step | None:
        """`step`, where it left a record: data and questions made before there was one are known by their hashes."""
        local = step.name == "data" and self.config.data.source == "local"
        return step if not local and step.record.is_file() else None

    def cell(self, suite: str, student: str, method: str, size: int) -> Step:
        wildcards = (("suite", suite), ("student", student), ("method", method), ("size", size))
        return Step("evaluate", wildcards, Path(self.layout.cell(suite, student, method, size)))

    def run(self, student: str, method: str, seed: int) -> Step:
        wildcards = (("student", student), ("method", method), ("seed", seed))
        return Step("train", wildcards, Path(self.layout.run(student, method, seed)) / "run.json")

    def member(self, name: str) -> Step | None:
        """The step that made a member; None for a published checkpoint."""
        if self.layout.given(name):
            return None
        return Step("pretrain", (("member", name),), Path(self.layout.checkpoint(name)) / "laid.json")

    def teacher_cache(self) -> Step:
        return Step("teacher_cache", (), Path(self.layout.teacher_cache))

    def inputs_of(self, step: Step, name: str) -> tuple[Any, Step | None]:
        """(what to hash, the step that made it) for the input that a record calls `name`.

        Raises LaidError for a name that steps of this kind do not have.
        """
        wildcards = dict(step.wildcards)
        if name.startswith("annotations"):
            split = name.removeprefix("annotations").removeprefix("_") or "train2017"
            return self.coco / "annotations" / f"instances_{split}.json", self.data()
        if name == "questions" and "suite" in wildcards:
            suite = wildcards["suite"]
            maker = self.haystacks(suite) if suite in ("test", "validation") else None
            return Path(self.layout.questions(suite, wildcards["size"])), maker
        if name == "questions":
            return Path(self.layout.training_questions), self.haystacks("train")
        if name == "images" and step.name == "pretrain":
            train = load_coco(self.coco, "train2017")
            return (self.coco, training_paths(self.config.haystacks, train)), None
        if name == "images":
            return (self.coco, self.images(self.inputs_of(step, "questions")[0])), None
        if name == "validation_images":
            files = map(Path, self.layout.validation)
            return (self.coco, sorted({image for file in files for image in self.asked_images(file)})), None
        if name.startswith("validation_"):
            file = dict(enumerate(self.layout.validation)).get(int(name.removeprefix("validation_")))
            if file is not None:
                return Path(file), self.haystacks("validation")
        if name in ("model", "student", "teacher"):
            member = self.layout.models.teacher if name == "teacher" else wildcards["student"]
            checkpoint = self.layout.checkpoint(member)
            if self.layout.given(member):
                return (Path(checkpoint) if Path(checkpoint).is_dir() else f"hub:{checkpoint}"), None
            return Path(checkpoint), self.member(member)
        if name.startswith("run_seed") and name[8:].isdigit():
            run = self.run(wildcards["student"], wildcards["method"], int(name[8:]))
            return run.record.parent / "model", run
        if name == "teacher_cache":
            cache = self.teacher_cache()
            return cache.record, cache
        raise LaidError(f"{step.record}: names an input {name!r} that a {step.name} step does not have")

    def label(self, member: str) -> str | None:
        """How a member is called by its size, from its config.json; None where it is not at hand."""
        if member not in self._labels:
            from laid.models.loading import (  # seconds: only who asks waits
                empty_model,
                parameter_label,
                parameters,
            )

            folder = Path(self.layout.checkpoint(member))
            try:
                found = parameter_label(parameters(empty_model(folder))) if folder.is_dir() else None
            except LaidError:  # another message says so
                found = None
            self._labels[member] = found
        return self._labels[member]

    def questions(self, file: Path) -> list[Question]:
        """The questions of a file, read once. Raises LaidError for a file that is missing or broken."""
        if file not in self._questions:
            self._questions[file] = read_pope(file, self.coco) if is_pope(file) else read_questions(file)
        return self._questions[file]

    def images(self, questions: Path) -> list[str]:
        """The image paths that a question file names, sorted."""
        return sorted({p for q in self.questions(questions) for p in (*q.needles, *q.distractors)})

    def asked_images(self, questions: Path) -> set[str]:
        """Those of the first questions of a file, as many as validation asks."""
        asked = self.config.training.validation
        first = self.questions(questions)[: asked.questions if asked else 0]
        return {p for q in first for p in (*q.needles, *q.distractors)}

    def record(self, step: Step) -> dict[str, Any]:
        """The provenance record of a step. Raises LaidError where it is missing or broken."""
        content = read_json(step.record)
        found = content.get("provenance") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not isinstance(found.get("data"), dict):
            raise LaidError(f"{step.record}: holds no provenance; make it again")
        parts = [(key, found.get(key), dict) for key in ("code", "libraries")] + [
            ("config", found.get("config"), str)
        ]
        parts += [(f"data.{name}", value, str) for name, value in found["data"].items()]
        for key, value, kind in parts:
            if not isinstance(value, kind):
                expected = "a mapping" if kind is dict else "a text"
                raise LaidError(
                    f"{step.record}: provenance.{key} is not {expected}: changed by hand? make it again"
                )
        return found

    # -------------------------------------------------------------- what is wrong

    def problems(self, step: Step) -> list[str]:
        """Why the result of `step` is not valid as it is, nearest cause first; empty if it is."""
        if step not in self._found:
            self._found[step] = list(self._problems(step))
        return self._found[step]

    def _problems(self, step: Step) -> Iterator[str]:
        try:
            record = self.record(step)
        except LaidError as error:
            yield str(error)
            return
        wildcards = dict(step.wildcards)
        served = record.get("endpoint")
        if served:
            yield f"answered by {served['model']} at {served['url']}: what weights that was, nobody can check"
        now = slice_for("served" if served else step.name, self.config, **wildcards)
        other = OTHER_PARTS.get(wildcards.get("part"), ())
        yield from (
            change
            for change in changed_settings(record.get("settings", {}), now)
            if not change.startswith(tuple(f"{key}{end}" for key in other for end in (".", " ")))
        )
        if step.name == "teacher_cache":
            try:
                yield from self._changed_shards(step)
            except LaidError as error:
                yield str(error)
        for name, recorded in record["data"].items():
            try:
                value, maker = self.inputs_of(step, name)
                present = provenance.fingerprint(value)
            except LaidError as error:
                yield f"input {name}: {error}"
                continue
            if present != recorded:
                where = value[0] if isinstance(value, tuple) else value
                yield f"input {name} ({where}) is {present[:12]}, was {recorded[:12]}"
            if maker is not None:
                yield from (f"{maker}: {problem}" for problem in self.problems(maker))

    def _changed_shards(self, step: Step) -> Iterator[str]:
        """What training read of a teacher's cache: its index names every shard with its hash."""
        shards = parsed(read_json(step.record), Shards, step.record)["shards"]
        hashes = {shard["file"]: shard["sha256"] for shard in shards}
        yield from provenance.changed(step.record.parent, hashes)


def changed_settings(recorded: Any, present: Any, path: str = "") -> Iterator[str]:
    """One line per value that differs between two nested mappings, by dotted key."""
    if isinstance(recorded, dict) and isinstance(present, dict):
        for key in sorted(recorded.keys() | present.keys()):
            inner = f"{path}.{key}" if path else key
            yield from changed_settings(recorded.get(key), present.get(key), inner)
    elif recorded != present:
        yield f"{path} is {present!r} now, was {recorded!r}"
