"""The chain behind a cell, from images to number, as the results page shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laid.evaluation.scoring import is_right
from laid.io import dumps, read_json, sha256_json
from laid.results.tables import METHOD_NAMES, Grid

_RECORDS = ("laid.json", "pretrain.json", "run.json")
_LARGEST = 100_000  # bytes: a record is a small file; a larger one is something else


def chain_data(grid: Grid, root: Path) -> dict[str, Any]:
    """{"cells": "<student>/<method>/<size>" -> facts, chain, command; "records": hash -> text, each held once}."""
    records: dict[str, str] = {}
    cells = {}
    for student, method in grid.models:
        for size in grid.sizes:
            key = f"{student}/{method}/{size}"
            cell = grid.cell(student, method, size)
            cells[key] = {
                "title": _title(cell),
                "facts": _facts(cell),
                "chain": _chain(cell, root, records),
                "command": f"snakemake --cores all {grid.folder / student / method / f'{size}.json'}",
            }
    return {"cells": cells, "records": records}


def _title(cell: dict[str, Any]) -> str:
    images = f"{cell['size']} image{'s' if cell['size'] > 1 else ''}"
    return f"{cell['student']}, {METHOD_NAMES.get(cell['method'], cell['method'])}, {images}"


def _facts(cell: dict[str, Any]) -> list[list[str]]:
    low, high = cell["interval"]
    shares = {}
    for label in ("yes", "no"):
        of_label = [is_right(a) for a in cell["answers"] if a["label"] == label]
        shares[label] = f"{100 * sum(of_label) / len(of_label):.1f} %" if of_label else "none asked"
    return [
        [
            "Accuracy",
            f"{100 * cell['accuracy']:.2f} % [{100 * low:.2f}, {100 * high:.2f}], {cell['interval_method']}",
        ],
        ["Right where yes is right", shares["yes"]],
        ["Right where no is right", shares["no"]],
        [
            "Answers",
            f"{cell['n']} ({cell['questions']} questions, seeds {', '.join(map(str, cell['seeds']))})",
        ],
        ["Compliance", f"{100 * cell['compliance']:.1f} %"],
        [
            "Prompt",
            f"{cell['tokens_mean']:.1f} tokens, {cell['positions_mean']:.1f} M-RoPE positions on average",
        ],
    ]


def _chain(cell: dict[str, Any], root: Path, records: dict[str, str]) -> list[dict[str, Any]]:
    """Steps from the data to the number; a step names hashes and, by reference, its settings."""
    provenance = cell["provenance"]
    data = dict(provenance["data"])
    steps: list[dict[str, Any]] = []

    def step(what: str, names: list[str], record: Any = None) -> None:
        entry: dict[str, Any] = {"what": what, "hashes": [[name, data.pop(name)] for name in names]}
        if record is not None:
            text = dumps(record)
            reference = sha256_json(record)[:12]
            records[reference] = text
            entry["details"] = reference
        if entry["hashes"] or record is not None:
            steps.append(entry)

    step("Images and their labels", [n for n in data if n.startswith("annotations") or n == "images"])
    step("Questions", [n for n in data if "question" in n or "haystack" in n])
    step(
        f"Checkpoint of {cell['student']}", [n for n in data if n == "model" or n.startswith("models/")],
        _record(root / "models" / cell["student"]),
    )  # fmt: skip
    for name in [n for n in data if n.startswith("run")]:
        seed = name.removeprefix("run_")
        step(
            f"Trained with {cell['method']}, {seed}",
            [name],
            _record(root / "runs" / cell["student"] / cell["method"] / seed),
        )
    step("Other inputs", list(data))
    data["settings"] = provenance["config"]
    step("Evaluation", ["settings"], provenance.get("settings"))
    code = provenance["code"]
    data["commit"] = f"{code.get('commit')}{' (with changes)' if code.get('dirty') else ''}"
    step(
        f"Code, laid {code.get('version')}", ["commit"], {"libraries": provenance["libraries"], "code": code}
    )
    return steps


def _record(folder: Path) -> Any:
    """What a run or checkpoint says of itself, or None."""
    for name in _RECORDS:
        path = folder / name
        if path.is_file() and path.stat().st_size <= _LARGEST:
            return read_json(path)
    return None
