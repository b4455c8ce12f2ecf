"""`laid haystacks`: build the questions from COCO labels, with what shortcuts would score beside them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[Path("config.yaml")],
        metavar="FILE",
        help="base, then overlays",
    )
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO root: annotations/, train2017/, val2017/"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="folder for train.json, validation/, test/, shortcuts.*")
    target.add_argument("--long", type=Path, help="file for the long haystacks (haystacks.long) alone")


def run(args: argparse.Namespace) -> int:
    from laid import config
    from laid.data.haystacks import build_haystacks, build_long
    from laid.data.shortcuts import markdown

    settings = config.load(args.config)
    if args.long is not None:
        questions = build_long(settings, args.coco, args.long)
        print(f"{args.long}: {len(questions)} long haystacks, {sum(q.size for q in questions)} images in all")
        return 0
    scores = build_haystacks(settings, args.coco, args.out)
    if settings["data"]["source"] == "download":  # now it is known which images are needed
        from laid.data.download import CocoDownload
        from laid.data.questions import read_questions

        named = {
            p for name in scores for q in read_questions(args.out / name) for p in q.needles + q.distractors
        }
        CocoDownload(args.coco, **settings["data"]["download"]).images(named)
    print(markdown(scores))
    return 0
