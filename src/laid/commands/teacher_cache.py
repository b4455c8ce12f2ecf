"""`laid teacher-cache`: run the teacher once over the training questions."""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments, features_argument

    config_argument(parser)
    parser.add_argument("--teacher", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO folder that the questions' image paths start from"
    )
    parser.add_argument(
        "--questions", type=Path, required=True, help="training questions or any conversations with images"
    )
    parser.add_argument("--out", type=Path, help="folder for the cache")
    parser.add_argument("--size", action="store_true", help="only tell how large the cache would be")
    features_argument(parser)
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from laid import provenance
    from laid.commands.shared import deterministic, features_folder, pick_devices
    from laid.errors import LaidError
    from laid.io import alone, require_place, write_json
    from laid.models import parallel
    from laid.settings import load
    from laid.training.recipe import read_lessons
    from laid.training.teacher_cache import FILES, build_cache, cache_size

    start = time.perf_counter()
    settings = load(args.config)
    if args.size:
        print(cache_size(settings, args.teacher, args.coco, args.questions))
        return 0
    if args.out is None:
        raise LaidError("give --out, a folder for the cache, or --size to learn how large it would be")
    deterministic(args.threads)
    require_place(args.out, *FILES)
    read_lessons(args.questions, settings)  # the teacher's pass may take hours
    device = pick_devices(args, args.teacher, settings.training.dtype)
    with alone(args.out) if parallel.first() else nullcontext():
        index = build_cache(
            settings, args.teacher, args.coco, args.questions, args.out, device,
            features_folder=features_folder(args, settings),
        )  # fmt: skip
        if not parallel.first():
            return 0
        write_json(args.out / "cost.json", provenance.cost(start))
    print(
        f"teacher cache: {len(index['lengths'])} questions in {len(index['shards'])} shards,"
        f" layers {index['layers']}"
    )
    return 0
