"""`laid evaluate`: measure one model under one method at several haystack sizes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, count, model_arguments

    config_argument(parser)
    model_arguments(parser)
    parser.add_argument(
        "--questions",
        type=Path,
        required=True,
        help="folder of visual_haystack_<size>.json files, ours or official, or one such file",
    )
    parser.add_argument(
        "--sizes", type=count, nargs="+", default=[], help="haystack sizes, in images; one file says its own"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for <size>.json cells and the cost")
    parser.add_argument("--cost", default="cost.json", help="name of the file in --out for time and memory")


def run(args: argparse.Namespace) -> int:
    from laid.commands.shared import deterministic, pick_device
    from laid.evaluation.evaluate import evaluate_cells
    from laid.evaluation.scoring import official_bootstrap
    from laid.settings import load

    settings = load(args.config)
    deterministic(args.threads)
    cells = evaluate_cells(
        settings, args.student_name, args.method, args.model, args.runs, args.coco, args.questions, args.sizes,
        args.out, pick_device(args.device), args.features, args.cost,
    )  # fmt: skip
    for cell in cells:
        low, high = (100 * bound for bound in cell["interval"])
        official = official_bootstrap(cell["answers"])
        print(
            f"{args.student_name} {args.method}: {cell['size']} images:"
            f" {100 * cell['accuracy']:.1f} % ({low:.1f} to {high:.1f}),"
            f" {cell['n']} answers, {cell['tokens_mean']:.0f} tokens, {cell['positions_mean']:.0f} positions;"
            " as the official runner:"
            + ",".join(
                f" {name} {100 * mean:.2f}% ± {100 * std:.2f}%" for name, (mean, std) in official.items()
            )
        )
    return 0
