"""`laid evaluate`: measure one model under one method on question files: haystacks of several sizes, or POPE's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laid.evaluation.sets import QuestionSet
    from laid.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, count, model_arguments

    config_argument(parser)
    model_arguments(parser)
    parser.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        action="append",
        required=True,
        metavar="PATH",
        help="question files, ours or official (haystacks or POPE's), one a size; or a folder of"
        " visual_haystack_<size>.json and --sizes",
    )
    parser.add_argument(
        "--sizes", type=count, nargs="+", default=[], help="haystack sizes to read from a folder"
    )
    parser.add_argument(
        "--out",
        dest="outs",
        type=Path,
        action="append",
        required=True,
        help="folder for <size>.json cells; further --questions with an --out each are asked in the same process",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask a server of OpenAI's protocol (http://localhost:8000/v1), where --model is the model's name; a key is read from"
        " OPENAI_API_KEY",
    )
    parser.add_argument(
        "--concurrent", type=count, default=8, help="questions under way at a time at an endpoint (default 8)"
    )
    parser.add_argument("--cost", type=Path, help="file for time and memory (default: cost.json in --out)")


def run(args: argparse.Namespace) -> int:
    from laid.errors import LaidError
    from laid.evaluation.sets import question_sets
    from laid.io import require_place
    from laid.settings import load

    settings = load(args.config)
    if len(args.questions) != len(args.outs):
        raise LaidError(
            f"{len(args.questions)} times --questions, {len(args.outs)} times --out: give an --out for each"
        )
    if args.cost is not None and len(args.outs) > 1:
        raise LaidError(
            f"--cost is one file, --out is given {len(args.outs)} times: leave it out, each has its cost.json"
        )
    suites = [question_sets(files, args.sizes, args.coco) for files in args.questions]
    for out in args.outs:
        require_place(out)
    if args.cost is not None:
        require_place(args.cost, file=True)
    for sets, out in zip(suites, args.outs, strict=True):
        cells = (_served if args.endpoint else _local)(args, settings, sets, out)
        for part, cell in zip(sets, cells):  # of several processes, the first has cells
            low, high = (100 * bound for bound in cell["interval"])
            print(
                f"{args.student_name} {args.method}: {cell['size']} images:"
                f" {100 * cell['accuracy']:.1f} % ({low:.1f} to {high:.1f}),"
                f" {cell['n']} answers, {_number(cell['tokens_mean'])} tokens, {_number(cell['positions_mean'])} positions;"
                f" {benchmark(part, cell)}"
            )
    return 0


# Jobs that share a folder of cells have a file each for what they cost: that is what they wait for.
def _local(args: argparse.Namespace, settings: Settings, sets: list[QuestionSet], out: Path) -> list[dict]:
    from contextlib import nullcontext

    from laid.commands.shared import deterministic, features_folder, pick_devices
    from laid.evaluation.evaluate import evaluate_cells
    from laid.io import alone
    from laid.models import parallel

    deterministic(args.threads)
    device = pick_devices(args, args.model, settings.evaluation.dtype)
    with alone(args.cost or out) if parallel.first() else nullcontext():
        return evaluate_cells(
            settings, args.student_name, args.method, args.model, args.runs, args.coco, sets, out,
            device, features_folder(args, settings), args.cost,
        )  # fmt: skip


def _served(args: argparse.Namespace, settings: Settings, sets: list[QuestionSet], out: Path) -> list[dict]:
    from laid.errors import LaidError
    from laid.evaluation.endpoint import evaluate_endpoint
    from laid.io import alone

    if args.runs or args.features:
        raise LaidError("--endpoint takes neither --runs nor --features: the server has its model")
    with alone(args.cost or out):
        return evaluate_endpoint(
            settings, args.student_name, args.method, args.endpoint, args.model, args.coco, sets, out,
            args.concurrent, args.cost,
        )  # fmt: skip


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"


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
