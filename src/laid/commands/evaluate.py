"""`laid evaluate`: measure one model under one method on question files: haystacks of several sizes, or POPE's."""

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
        nargs="+",
        required=True,
        metavar="PATH",
        help="question files, ours or official (haystacks or POPE's), one a size; or a folder of"
        " visual_haystack_<size>.json and --sizes",
    )
    parser.add_argument(
        "--sizes", type=count, nargs="+", default=[], help="haystack sizes to read from a folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for <size>.json cells")
    parser.add_argument("--cost", type=Path, help="file for time and memory (default: cost.json in --out)")


def run(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from laid.commands.shared import deterministic, features_folder, pick_devices
    from laid.evaluation.evaluate import evaluate_cells
    from laid.evaluation.sets import question_sets
    from laid.io import alone, require_place
    from laid.models import parallel
    from laid.settings import load

    settings = load(args.config)
    deterministic(args.threads)
    sets = question_sets(args.questions, args.sizes, args.coco)
    if args.cost is not None:
        require_place(args.cost, file=True)
    device = pick_devices(args, args.model, settings.evaluation.dtype)
    # Jobs that share a folder of cells have a file each for what they cost.
    with alone(args.cost or args.out) if parallel.first() else nullcontext():
        cells = evaluate_cells(
            settings, args.student_name, args.method, args.model, args.runs, args.coco, sets, args.out,
            device, features_folder(args, settings), args.cost,
        )  # fmt: skip
    for part, cell in zip(sets, cells):  # of several processes, the first has cells
        low, high = (100 * bound for bound in cell["interval"])
        print(
            f"{args.student_name} {args.method}: {cell['size']} images:"
            f" {100 * cell['accuracy']:.1f} % ({low:.1f} to {high:.1f}),"
            f" {cell['n']} answers, {cell['tokens_mean']:.0f} tokens, {cell['positions_mean']:.0f} positions;"
            f" {benchmark(part, cell)}"
        )
    return 0


def benchmark(part, cell: dict) -> str:
    """The figures that the benchmark's own runner prints."""
    from laid.evaluation.scoring import official_bootstrap, pope_answer

    if part.spoken is pope_answer:
        import pandas as pd

        from laid.results.pope import scores

        found = scores(pd.DataFrame(cell["answers"]))
        f1 = "-" if found["f1"] is None else f"{100 * found['f1']:.1f}"
        return f"as POPE's: F1 {f1}, yes {100 * found['yes_ratio']:.1f} %"
    official = official_bootstrap(cell["answers"])
    return "as the official runner:" + ",".join(
        f" {name} {100 * mean:.2f}% ± {100 * std:.2f}%" for name, (mean, std) in official.items()
    )
