"""Rebuild one cell from its inputs alone, and say what differs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laid.audit.lineage import Lineage, Step
from laid.errors import LaidError
from laid.evaluation.evaluate import evaluate_cells
from laid.evaluation.sets import read_set
from laid.io import read_json


def rebuild(lineage: Lineage, step: Step, device: str = "cpu") -> tuple[bool, list[str]]:
    """Build one cell from its inputs alone in a temporary folder and compare bytes with the one that is there.

    Returns whether the result is the same, and what to say of it. Raises LaidError for a cell that is not there or whose record is broken, and for inputs that are missing.
    """
    wildcards = dict(step.wildcards)
    record = lineage.record(step)
    if served := record.get("endpoint"):
        raise LaidError(
            f"{step.record}: answered by a server: ask {served['url']} again with laid evaluate --endpoint"
        )
    names = [name for name in record["data"] if name.startswith("run_seed")]
    runs = [lineage.inputs_of(step, name)[0].parent for name in sorted(names, key=lambda n: int(n[8:]))]
    model, _ = lineage.inputs_of(step, "model")
    questions, _ = lineage.inputs_of(step, "questions")
    with tempfile.TemporaryDirectory(prefix="laid-verify-") as folder:
        out = Path(folder) / wildcards["student"] / wildcards["method"]
        evaluate_cells(
            lineage.config, wildcards["student"], wildcards["method"], str(model).removeprefix("hub:"), runs,
            lineage.coco, [read_set(questions, lineage.coco, wildcards["size"])], out, device,
        )  # fmt: skip
        rebuilt = out / step.record.name
        if rebuilt.read_bytes() == step.record.read_bytes():
            return True, ["rebuilt, identical byte for byte"]
        lines = list(differences(read_json(step.record), read_json(rebuilt)))
    if not lines:
        raise LaidError(f"{step.record}: the same content, but not as laid writes it: edited by hand?")
    same = all(line.startswith(("provenance.code", "provenance.libraries", "digest")) for line in lines)
    return same, [*lines, "the same answers, made by other software" if same else "NOT the same result"]


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """One line per value that differs; lists of answers are summed up."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif path == "answers" and isinstance(old, list) and isinstance(new, list):
        other = sum(a != b for a, b in zip(old, new, strict=False)) + abs(len(old) - len(new))
        if other:
            yield f"{other} of {len(new)} answers differ"
    elif old != new:
        yield f"{path} was {old!r}, is {new!r} rebuilt"
