"""`laid alignability`: how much of a student's queries and keys mixtures of a teacher's heads can reach (equation 7)."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments

    config_argument(parser)
    parser.add_argument("--teacher", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--student", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--student-name", help="its name in the record (default: the checkpoint's)")
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO folder that the questions' image paths start from"
    )
    parser.add_argument("--questions", type=Path, required=True, help="questions, VHs JSON")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder for <student name>.json, and table and figure beside it",
    )  # fmt: skip
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import time

    from laid import provenance
    from laid.analysis.alignability import measure
    from laid.commands.shared import deterministic, pick_device
    from laid.errors import LaidError
    from laid.io import alone, path_problem, update, write_json
    from laid.results import alignability, plotting
    from laid.results.render import markdown, show
    from laid.settings import load

    start = time.perf_counter()
    settings = load(args.config)
    deterministic(args.threads)
    name = args.student_name or Path(args.student).resolve().name
    if problem := "has a /" if "/" in name else path_problem(f"{name}.json"):
        raise LaidError(f"--student-name {name}: {problem}: files in --out are named by it")
    found = measure(
        settings, name, args.student, args.teacher, args.coco, args.questions, pick_device(args.device)
    )
    table, figure = alignability.table(found), alignability.figure({name: found}, name)
    with alone(args.out / f"{name}.json"):
        write_json(args.out / f"{name}.json", found, indent=None)
        write_json(args.out / f"{name}.cost.json", provenance.cost(start))
        update(args.out / f"{name}.md", markdown(table))
        plotting.save(figure, args.out)
    show([table])
    return 0
