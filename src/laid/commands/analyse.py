"""`laid analyse`: what the attention heads of a student do under several methods, for Figure 4 and the spectra."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments

    config_argument(parser)
    parser.add_argument(
        "--student-name", required=True, help="name of the model in figures (or the teacher's)"
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument(
        "--methods", nargs="+", default=["base"], metavar="METHOD", help="methods of the configuration"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="*",
        default=[],
        metavar="DIR",
        help="run folders <method>/seed<k> of the trained methods; the first of each is used",
    )
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO folder that the questions' image paths start from"
    )
    parser.add_argument(
        "--questions", type=Path, required=True, help="folder of visual_haystack_<size>.json files"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import time

    from laid import provenance
    from laid.analysis.attention import analyse
    from laid.commands.shared import deterministic, pick_device, runs_by_method
    from laid.io import alone, write_json
    from laid.settings import load

    start = time.perf_counter()
    settings = load(args.config)
    deterministic(args.threads)
    found = analyse(
        settings, args.student_name, args.model, runs_by_method(settings, args.methods, args.runs), args.coco,
        args.questions, pick_device(args.device),
    )  # fmt: skip
    with alone(args.out):
        write_json(args.out, found, indent=None)
        write_json(args.out.with_name(f"{args.out.stem}.cost.json"), provenance.cost(start))
    for method, entry in found["methods"].items():
        part = entry["spectrum"]
        low, high = part["interval"]
        print(
            f"{args.student_name} {method}: {part['share']:.3f} [{low:.3f}, {high:.3f}] of the attention energy lies at"
            f" wavelengths of {part['cut']:.0f} positions and more"
        )
    return 0
