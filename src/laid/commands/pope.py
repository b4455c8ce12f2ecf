"""`laid pope`: POPE's object questions about single images: build them, print the table. `laid evaluate` asks them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laid.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument

    parser.epilog = "Every step takes --config FILE [FILE ...]; `laid pope STEP --help` tells the rest."
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    make = steps.add_parser("questions", help="build the three question files from the val2017 labels")
    config_argument(make)
    make.add_argument("--coco", type=Path, required=True, help="COCO root: annotations/, val2017/")
    make.add_argument("--out", type=Path, required=True, help="folder for coco_pope_<strategy>.json")
    show = steps.add_parser("table", help="build pope.csv and pope.md from cells and print them")
    config_argument(show)
    show.add_argument("--cells", type=Path, help="folder of cells (default <results>/<scale>/cells)")
    show.add_argument("--out", type=Path, help="where to write (default <results>/<scale>/pope)")


def run(args: argparse.Namespace) -> int:
    from laid.settings import load

    settings = load(args.config)
    {"questions": _questions, "table": _table}[args.step](args, settings)
    return 0


def _questions(args: argparse.Namespace, settings: Settings) -> None:
    from laid.data.pope import build_pope
    from laid.io import alone

    with alone(args.out):
        found = build_pope(settings, args.coco, args.out)
    images = {q.needles[0] for questions in found.values() for q in questions}
    counts = ", ".join(f"{len(questions)} {strategy}" for strategy, questions in found.items())
    print(f"{args.out}: {counts} questions about {len(images)} images")


def _table(args: argparse.Namespace, settings: Settings) -> None:
    from laid.commands.shared import output, root_of
    from laid.results import pope
    from laid.results.names import method_names
    from laid.results.render import show, write

    root = root_of(settings)
    found = pope.read_pope_answers(args.cells or root / "cells")
    models = settings.models
    built = pope.table(found, models.teacher, models.students, method_names(settings))
    with output(args.out or root / "pope") as out:
        write([built], out)
    show([built])
