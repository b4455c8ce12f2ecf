"""`laid verify`: check every cell against its inputs, or rebuild one and compare bytes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laid.audit.lineage import Lineage, Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument

    config_argument(parser)
    parser.add_argument("cells", nargs="*", type=Path, metavar="CELL", help="cells to check (default: all)")
    parser.add_argument(
        "--rebuild", type=Path, metavar="CELL", help="build one cell anew in a temporary folder"
    )
    parser.add_argument(
        "--device", default="auto", help="of --rebuild: cpu, cuda ...; auto takes a GPU if any"
    )


def run(args: argparse.Namespace) -> int:
    from laid.audit.lineage import Lineage
    from laid.errors import LaidError
    from laid.settings import load

    if args.rebuild and args.cells:
        raise LaidError(f"{args.cells[0]}: give cells to check, or one cell to --rebuild, not both")
    lineage = Lineage(load(args.config))
    if args.rebuild:
        step = locate(lineage, args.rebuild)
        if reason := absent(lineage, step):
            raise LaidError(f"{step.record}: {reason}")
        return rebuild(lineage, step, args.device)
    steps = [locate(lineage, path) for path in args.cells] or list(all_cells(lineage))
    found = {step: judge(lineage, step) for step in steps}
    for (state, reasons), group in grouped(found):
        for reason in reasons:
            print(f"{state}: {name_of(group)}: {reason}")
    counts = {state: sum(s == state for s, _ in found.values()) for state in STATES}
    print(
        f"{len(found)} cells below {lineage.root / 'cells'}: "
        + ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "sound")
    )
    if counts["sound"] == len(found):
        return 0
    base = Path("config.yaml")
    if len(args.config) == 1 and base.is_file() and not base.samefile(args.config[0]):
        alone = args.config[0]
        print(f"{alone} was read alone; over {base}, as Snakemake reads it: --config {base} {alone}")
    return 1


STATES = ("sound", "stale", "tampered", "missing")


def locate(lineage: Lineage, path: Path) -> Step:
    """The step of a cell given by its path. Raises LaidError for a path that cannot be a cell's."""
    from laid.errors import LaidError

    parts = path.parts
    if len(parts) < 3 or path.suffix != ".json" or not path.stem.isdigit():
        raise LaidError(
            f"{path}: not a cell; expected {lineage.root / 'cells'}/<student>/<method>/<size>.json"
        )
    step = lineage.cell(parts[-3], parts[-2], int(path.stem))
    if path.resolve() != step.record.resolve():
        raise LaidError(
            f"{path}: not a cell of this configuration, whose cells lie below {lineage.root / 'cells'}"
        )
    return step


def absent(lineage: Lineage, step: Step) -> str | None:
    """Of a cell that is not there: how to make it, or why nothing makes it. None for one that is there."""
    if step.record.is_file():
        return None
    wildcards, models = dict(step.wildcards), lineage.config["models"]
    for what, name, known in (
        ("model", wildcards["student"], [models["teacher"], *models["students"]]),
        ("method", wildcards["method"], list(lineage.config["methods"])),
        ("size", wildcards["size"], sorted(lineage.config["haystacks"]["test"]["sizes"])),
    ):
        if name not in known:
            return f"the configuration has no {what} {name}; it has {', '.join(map(str, known))}"
    return "no such file; `snakemake --cores all` with this path makes it"


def all_cells(lineage: Lineage) -> Iterator[Step]:
    """Every cell that the tables need, then every other one that lies there."""
    from laid.results.needed import needed

    seen = set()
    for key in needed(lineage.config):
        seen.add(lineage.cell(*key).record)
        yield lineage.cell(*key)
    for path in sorted((lineage.root / "cells").glob("*/*/*.json")):
        if path.stem.isdigit() and path not in seen:
            yield lineage.cell(path.parts[-3], path.parts[-2], int(path.stem))


def judge(lineage: Lineage, step: Step) -> tuple[str, tuple[str, ...]]:
    """(state, reasons) of one cell.

    missing: not there. tampered: unreadable, or its numbers do not follow from its answers, or its digest is wrong.
    stale: whole, but the configuration asks for something else now, or an input is not what it was made from.
    """
    from laid.errors import LaidError
    from laid.evaluation.cells import read_cell

    if reason := absent(lineage, step):
        return "missing", (reason,)
    try:
        read_cell(step.record)
    except LaidError as error:
        return "tampered", (str(error).removeprefix(f"{step.record}: "),)
    problems = tuple(dict.fromkeys(lineage.problems(step)))
    return ("stale", problems) if problems else ("sound", ())


def grouped(found: dict[Step, tuple[str, tuple[str, ...]]]) -> list[tuple[tuple, list[Step]]]:
    """Cells of one student and method that share their state and reasons, together."""
    groups: dict[tuple, list[Step]] = {}
    for step, verdict in found.items():
        groups.setdefault((*verdict, step.record.parent), []).append(step)
    return [((state, reasons), steps) for (state, reasons, _), steps in groups.items()]


def name_of(steps: list[Step]) -> str:
    """One path for several sizes: .../laid/{5,10}.json."""
    folder = steps[0].record.parent
    sizes = [step.record.stem for step in steps]
    return str(folder / (f"{{{','.join(sizes)}}}.json" if len(sizes) > 1 else f"{sizes[0]}.json"))


def rebuild(lineage: Lineage, step: Step, device: str = "auto") -> int:
    """Build one cell from its inputs alone in a temporary folder and compare bytes with the one that is there.

    Raises LaidError for a cell that is not there or whose record is broken, and for inputs that are missing.
    """
    import tempfile

    from laid.commands.shared import deterministic, pick_device
    from laid.errors import LaidError
    from laid.evaluation.evaluate import evaluate_cells
    from laid.io import read_json

    wildcards = dict(step.wildcards)
    record = lineage.record(step)
    names = [name for name in record["data"] if name.startswith("run_seed")]
    runs = [lineage.inputs_of(step, name)[0].parent for name in sorted(names, key=lambda n: int(n[8:]))]
    model, _ = lineage.inputs_of(step, "model")
    questions, _ = lineage.inputs_of(step, "questions")
    deterministic(lineage.config["resources"]["evaluate"]["threads"])
    with tempfile.TemporaryDirectory(prefix="laid-verify-") as folder:
        out = Path(folder) / wildcards["student"] / wildcards["method"]
        evaluate_cells(
            lineage.config, wildcards["student"], wildcards["method"], str(model).removeprefix("hub:"), runs,
            lineage.coco, questions.parent, [wildcards["size"]], out, pick_device(device),
        )  # fmt: skip
        anew = out / step.record.name
        if anew.read_bytes() == step.record.read_bytes():
            print(f"{step.record}: rebuilt, identical byte for byte")
            return 0
        lines = list(differences(read_json(step.record), read_json(anew)))
    if not lines:
        raise LaidError(f"{step.record}: the same content, but not as laid writes it: edited by hand?")
    for line in lines:
        print(f"{step.record}: {line}")
    same = all(line.startswith(("provenance.code", "provenance.libraries", "digest")) for line in lines)
    print(
        f"{step.record}: " + ("the same answers, made by other software" if same else "NOT the same result")
    )
    return 0 if same else 1


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
