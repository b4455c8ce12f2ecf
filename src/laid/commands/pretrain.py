"""`laid pretrain`: train one member of the small-scale family from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, threads_argument

    config_argument(parser)
    parser.add_argument("--member", required=True, help="member of the family (family.members)")
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO root: annotations/, train2017/, val2017/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    threads_argument(parser)


def run(args: argparse.Namespace) -> int:
    from laid.commands.shared import deterministic
    from laid.io import alone, require_place
    from laid.settings import load
    from laid.toy.pretrain import FILES, make_member

    settings = load(args.config)
    deterministic(args.threads)
    require_place(args.out, *FILES)
    with alone(args.out):
        record = make_member(settings, args.member, args.coco, args.out)
    print(
        f"{args.member}: {record['parameters']:,} parameters, window {record['window']},"
        f" vision error {record['vision_error']:.4f}"
    )
    return 0
