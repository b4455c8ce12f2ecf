"""The chain from image files to one number, as a tree of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laid.audit.lineage import Lineage, Step
from laid.data.coco import load_coco
from laid.errors import LaidError
from laid.evaluation.cells import read_cell
from laid.evaluation.scoring import is_right
from laid.io import read_json

Tree = tuple[str, list["Tree"]]


def chain_of_cell(lineage: Lineage, step: Step) -> Tree:
    """The cell, what it was made from, what that was made from, down to the images."""
    cell = read_cell(step.record)
    low, high = (100 * bound for bound in cell["interval"])
    right = sum(map(is_right, cell["answers"]))
    head = (
        f"{step.record}: {100 * cell['accuracy']:.2f} % [{low:.1f}, {high:.1f}] ({cell['interval_method']})\n"
        f"{right} of {cell['n']} answers right: {cell['questions']} questions of {cell['size']} images,"
        f" seed{'s' if len(cell['seeds']) > 1 else ''} {', '.join(map(str, cell['seeds']))}"
        + ("" if cell["tokens_mean"] is None else f", {cell['tokens_mean']:.0f} tokens a prompt")
    )
    return _step_tree(lineage, step, head)


def _step_tree(lineage: Lineage, step: Step, head: str) -> Tree:
    try:
        record = lineage.record(step)
    except LaidError as error:
        return (f"{head}\n{error}", [])
    body = f"{head}\nmade by `laid {step.name.replace('_', '-')}`, {_software(record)}"
    branches = []
    if served := record.get("endpoint"):
        unknown = ", ".join(served["unknown"])
        branches.append((f"model: {served['model']} at {served['url']}; not known: {unknown}", []))
    for name, recorded in record["data"].items():
        value, maker = lineage.inputs_of(step, name)
        text = f"{name}: {_describe(lineage, name, value)}, sha256 {recorded[:12]}"
        branches.append(_step_tree(lineage, maker, f"{text}\n{_about(maker)}") if maker else (text, []))
    settings = sorted(_flat(record.get("settings", {})))
    if settings:
        branches.append((f"settings, sha256 {record['config'][:12]}: " + ", ".join(settings), []))
    return body, branches


def _software(record: dict[str, Any]) -> str:
    code, libraries = record["code"], record["libraries"]
    commit = str(code.get("commit") or "no commit")[:12] + (" with changes" if code.get("dirty") else "")
    versions = ", ".join(f"{name} {libraries.get(name)}" for name in ("torch", "transformers"))
    return f"laid {code.get('version')} ({commit}), {versions}"


def _describe(lineage: Lineage, name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value[1])} image files below {value[0]}"
    try:
        if name == "questions":
            asked = lineage.questions(value)
            yes = sum(q.answer == "yes" for q in asked)
            return f"{value}: {len(asked)} questions, {yes} of them yes"
        if name.startswith("annotations"):
            split = Path(value).stem.removeprefix("instances_")
            return f"{value}: {len(load_coco(lineage.coco, split).images)} images"
    except LaidError as error:
        return str(error)
    return str(value)


def _about(step: Step) -> str:
    """What a record says of its step besides provenance."""
    try:
        content = read_json(step.record)
    except LaidError as error:
        return str(error)
    if not isinstance(content, dict):
        return f"{step.record}: expected a mapping"
    plain = {k: v for k, v in content.items() if isinstance(v, (int, float, str)) and k != "format"}
    final = content.get("final")
    if isinstance(final, dict) and "loss" in final:
        plain["final loss"] = final["loss"]
    return ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in plain.items()
    )


def _flat(values: Any, path: str = "") -> list[str]:
    if isinstance(values, dict) and values:
        return [line for k, v in values.items() for line in _flat(v, f"{path}.{k}" if path else k)]
    return [] if values == {} or values is None else [f"{path}={values}"]  # None: off, or another key decides


def lines(tree: Tree, first: str = "", rest: str = "") -> list[str]:
    """A tree as indented lines."""
    head, branches = tree
    bar = "│ " if branches else "  "
    out = [(first if i == 0 else rest + bar) + line for i, line in enumerate(head.split("\n"))]
    for i, branch in enumerate(branches):
        last = i == len(branches) - 1
        out += lines(branch, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))
    return out
