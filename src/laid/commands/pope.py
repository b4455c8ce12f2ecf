"""`laid pope`: POPE's object questions about single images: build them, put them to a model, print the table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laid.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, model_arguments

    parser.epilog = "Every step takes --config FILE [FILE ...]; `laid pope STEP --help` tells the rest."
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    make = steps.add_parser("questions", help="build the three question files from the val2017 labels")
    config_argument(make)
    make.add_argument("--coco", type=Path, required=True, help="COCO root: annotations/, val2017/")
    make.add_argument("--out", type=Path, required=True, help="folder for coco_pope_<strategy>.json")
    ask = steps.add_parser("evaluate", help="put the questions to one model, into cells")
    config_argument(ask)
    model_arguments(ask)
    ask.add_argument(
        "--questions",
        type=Path,
        required=True,
        help="folder of coco_pope_<strategy>.json, ours or POPE's own",
    )
    ask.add_argument(
        "--out", type=Path, required=True, help="folder for cells, <strategy>/<student>/<method>/1.json"
    )
    show = steps.add_parser("table", help="build pope.csv and pope.md from cells and print them")
    config_argument(show)
    show.add_argument("--cells", type=Path, help="folder of cells (default <results>/<scale>/pope/cells)")
    show.add_argument("--out", type=Path, help="where to write (default <results>/<scale>/pope)")


def run(args: argparse.Namespace) -> int:
    from laid.settings import load

    settings = load(args.config)
    {"questions": _questions, "evaluate": _evaluate, "table": _table}[args.step](args, settings)
    return 0


def _questions(args: argparse.Namespace, settings: Settings) -> None:
    from laid.data.pope import build_pope

    found = build_pope(settings, args.coco, args.out)
    images = {q.needles[0] for questions in found.values() for q in questions}
    counts = ", ".join(f"{len(questions)} {strategy}" for strategy, questions in found.items())
    print(f"{args.out}: {counts} questions about {len(images)} images")


def _evaluate(args: argparse.Namespace, settings: Settings) -> None:
    import pandas as pd

    from laid.commands.shared import deterministic, pick_device
    from laid.data.pope import STRATEGIES, pope_file, read_pope
    from laid.evaluation.evaluate import QuestionSet, measure
    from laid.evaluation.scoring import pope_answer
    from laid.results.pope import scores

    deterministic(args.threads)
    files = {strategy: pope_file(args.questions, strategy) for strategy in STRATEGIES}
    sets = [
        QuestionSet(
            file, read_pope(file, args.coco), args.out / strategy / args.student_name / args.method / "1.json"
        )
        for strategy, file in files.items()
    ]
    cells = measure(
        settings, args.student_name, args.method, args.model, args.runs, args.coco, sets,
        pick_device(args.device), args.features, pope_answer,
    )  # fmt: skip
    for strategy, cell in zip(STRATEGIES, cells, strict=True):
        found = scores(pd.DataFrame(cell["answers"]))
        f1 = "-" if found["f1"] is None else f"{100 * found['f1']:.1f}"
        print(
            f"{args.student_name} {args.method}: {strategy}: accuracy {100 * found['accuracy']:.1f}, F1 {f1},"
            f" yes {100 * found['yes_ratio']:.1f} %, {cell['n']} answers"
        )


def _table(args: argparse.Namespace, settings: Settings) -> None:
    from laid.commands.shared import root_of
    from laid.results import pope
    from laid.results.names import method_names
    from laid.results.render import show, write

    root = root_of(settings) / "pope"
    found = pope.read_pope_answers(args.cells or root / "cells")
    models = settings.models
    built = pope.table(found, models.teacher, models.students, method_names(settings))
    write([built], args.out or root)
    show([built])
