"""`laid tokens`: Table 2 for any COCO folder and any published preprocessor, without weights and without opening images."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, count
    from laid.data.coco import SPLITS

    config_argument(parser)
    parser.add_argument(
        "--model",
        required=True,
        help="folder or hub id of the tokenizer and preprocessor files; no weights are read",
    )
    parser.add_argument("--coco", type=Path, required=True, help="COCO root: its annotations/ are read")
    parser.add_argument(
        "--split", choices=SPLITS, default="val2017", help="images of this split (default val2017)"
    )
    parser.add_argument(
        "--sizes", type=count, nargs="+", help="haystack sizes, in images (default haystacks.test.sizes)"
    )
    parser.add_argument("--out", type=Path, help="folder to write tokens.csv and tokens.md to")


def run(args: argparse.Namespace) -> int:
    from laid.commands.shared import output
    from laid.data.coco import load_coco
    from laid.models.processing import Processor
    from laid.results import tokens
    from laid.results.render import show, write
    from laid.settings import load

    haystacks = load(args.config).haystacks
    coco = load_coco(args.coco, args.split)
    sizes = args.sizes or haystacks.test.sizes
    built = tokens.table(tokens.lengths(Processor.load(args.model), coco, haystacks, sizes), coco)
    if args.out is not None:
        with output(args.out) as out:
            write([built], out)
    show([built])
    return 0
