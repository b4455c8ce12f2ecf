"""`laid why`: distance in positions and dilution by more keys, taken apart for one student under several methods."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.analyse import add_arguments as same

    same(parser)


def run(args: argparse.Namespace) -> int:
    import time

    from laid import provenance
    from laid.analysis.why import measure
    from laid.commands.shared import deterministic, pick_device, runs_by_method
    from laid.io import alone, write_json
    from laid.settings import load

    start = time.perf_counter()
    settings = load(args.config)
    deterministic(args.threads)
    found = measure(
        settings, args.student_name, args.model, runs_by_method(settings, args.methods, args.runs), args.coco,
        args.questions, pick_device(args.device),
    )  # fmt: skip
    with alone(args.out):
        write_json(args.out, found, indent=None)
        write_json(Path(args.out).with_name(f"{args.out.stem}.cost.json"), provenance.cost(start))
    for method, conditions in found["methods"].items():
        for condition, by_size in conditions.items():
            line = ", ".join(
                f"{size}: {100 * sum(part['right']) / len(part['right']):.1f}"
                for size, part in by_size.items()
            )
            print(f"{args.student_name} {method} {condition}: accuracy (%) at {line}")
    return 0
