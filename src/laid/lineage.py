"""What every result was made from: the records that steps leave behind, followed from a cell to the image files.

A step's record (laid.provenance.collect) names its inputs; `inputs_of` says where such an input lies below
<results>/<scale>/. `Lineage.problems` compares records with what is on disk and in the configuration now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laid import provenance
from laid.config import slice_for
from laid.data.questions import Question, read_questions
from laid.errors import LaidError
from laid.io import read_json


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

    def __init__(self, config: dict[str, Any], root: str | Path | None = None):
        self.config = config
        self.root = Path(root) if root else Path(config["results"]) / config["scale"]
        local = config["data"]["source"] == "local"
        self.coco = Path(config["data"]["root"]) if local else self.root / "coco"
        self._found: dict[Step, list[str]] = {}
        self._questions: dict[Path, list[Question]] = {}

    # -------------------------------------------------------------- where things are

    def cell(self, student: str, method: str, size: int) -> Step:
        wildcards = (("student", student), ("method", method), ("size", size))
        return Step("evaluate", wildcards, self.root / "cells" / student / method / f"{size}.json")

    def run(self, student: str, method: str, seed: int) -> Step:
        wildcards = (("student", student), ("method", method), ("seed", seed))
        return Step("train", wildcards, self.root / "runs" / student / method / f"seed{seed}" / "run.json")

    def member(self, name: str) -> Step | None:
        """The step that made a member; None for a published checkpoint."""
        if name in self.config["models"]["checkpoints"]:
            return None
        return Step("pretrain", (("member", name),), self.root / "models" / name / "laid.json")

    def teacher_cache(self, long: bool = False) -> Step:
        folder = "teacher_cache_long" if long else "teacher_cache"
        return Step("teacher_cache", (("long", long),), self.root / folder / "index.json")

    def _long(self, step: Step) -> bool:
        """Whether a step learns from the long haystacks: its method does, or it is their teacher's cache."""
        wildcards = dict(step.wildcards)
        method = self.config["methods"].get(wildcards.get("method"), {})
        return wildcards.get("long", method.get("questions") == "long")

    def inputs_of(self, step: Step, name: str) -> tuple[Any, Step | None]:
        """(what to hash, the step that made it) for the input that a record calls `name`.

        Raises LaidError for a name that steps of this kind do not have.
        """
        wildcards = dict(step.wildcards)
        if name.startswith("annotations"):
            split = name.removeprefix("annotations").removeprefix("_") or "train2017"
            return self.coco / "annotations" / f"instances_{split}.json", None
        if name == "questions":
            where = "long.json" if self._long(step) else "train.json"
            if "size" in wildcards:
                where = f"test/visual_haystack_{wildcards['size']}.json"
            return self.root / "haystacks" / where, None
        if name == "images":
            return (self.coco, self.images(self.inputs_of(step, "questions")[0])), None
        if name in ("model", "student", "teacher"):
            member = self.config["models"]["teacher"] if name == "teacher" else wildcards["student"]
            given = self.config["models"]["checkpoints"].get(member)
            if given:
                return (Path(given) if Path(given).is_dir() else f"hub:{given}"), None
            return self.root / "models" / member, self.member(member)
        if name.startswith("run_seed") and name[8:].isdigit():
            run = self.run(wildcards["student"], wildcards["method"], int(name[8:]))
            return run.record.parent / "model", run
        if name == "teacher_cache":
            cache = self.teacher_cache(self._long(step))
            return cache.record, cache
        raise LaidError(f"{step.record}: names an input {name!r} that a {step.name} step does not have")

    def images(self, questions: Path) -> list[str]:
        """The image paths that a question file names, sorted."""
        if questions not in self._questions:
            self._questions[questions] = read_questions(questions)
        return sorted({p for q in self._questions[questions] for p in (*q.needles, *q.distractors)})

    def record(self, step: Step) -> dict[str, Any]:
        """The provenance record of a step. Raises LaidError where it is missing or broken."""
        content = read_json(step.record)
        found = content.get("provenance") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not isinstance(found.get("data"), dict):
            raise LaidError(f"{step.record}: holds no provenance; make it again")
        return found

    # -------------------------------------------------------------- what is wrong

    def problems(self, step: Step) -> list[str]:
        """Why the result of `step` cannot stand as it is, nearest cause first; empty if it can."""
        if step not in self._found:
            self._found[step] = list(self._problems(step))
        return self._found[step]

    def _problems(self, step: Step) -> Iterator[str]:
        try:
            record = self.record(step)
        except LaidError as error:
            yield str(error)
            return
        yield from changed_settings(
            record.get("settings", {}), slice_for(step.name, self.config, **dict(step.wildcards))
        )
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


def changed_settings(recorded: Any, present: Any, path: str = "") -> Iterator[str]:
    """One line per value that differs between two nested mappings, by dotted key."""
    if isinstance(recorded, dict) and isinstance(present, dict):
        for key in sorted(recorded.keys() | present.keys()):
            inner = f"{path}.{key}" if path else key
            yield from changed_settings(recorded.get(key), present.get(key), inner)
    elif recorded != present:
        yield f"{path} is {present!r} now, was {recorded!r}"
