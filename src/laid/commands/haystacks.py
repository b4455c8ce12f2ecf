"""`laid haystacks`: build the questions from COCO labels, with what shortcuts would score beside them."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.commands.shared import config_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser)
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO root: annotations/, train2017/, val2017/"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder for train.json, validation/, test/, shortcuts.*")
    target.add_argument("--beyond", type=Path, help="folder for the haystacks of beyond.sizes alone")


def run(args: argparse.Namespace) -> int:
    from laid import provenance
    from laid.data.haystacks import build_beyond, build_haystacks
    from laid.data.shortcuts import markdown
    from laid.io import alone, write_json
    from laid.settings import load

    settings = load(args.config)
    splits = ("train2017", "val2017")
    labels = {
        f"annotations_{split}": args.coco / "annotations" / f"instances_{split}.json" for split in splits
    }
    if args.beyond is not None:
        with alone(args.beyond):
            questions = build_beyond(settings, args.coco, args.beyond)
        sizes = sorted({question.size for question in questions})
        print(f"{args.beyond}: {len(questions)} haystacks of {', '.join(map(str, sizes))} images")
        return 0
    with alone(args.out):
        scores = build_haystacks(settings, args.coco, args.out)
        write_json(args.out / "laid.json", {"provenance": provenance.collect("haystacks", settings, labels)})
    print(markdown(scores))
    return 0
