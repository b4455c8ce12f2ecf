"""`laid distill`: distil one student from one teacher on any conversations with images, without the workflow."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments, seed

    config_argument(parser)
    parser.add_argument("--teacher", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--student", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="conversations with images: JSON, JSON Lines, Parquet or a dataset's folder (docs/reference/files.md)",
    )
    parser.add_argument(
        "--images",
        "--coco",
        dest="coco",
        type=Path,
        help="folder that image paths start from (default: found at or above the data)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for model/ (with README.md), log.jsonl and distill.json (default: <student>-<method>)",
    )
    parser.add_argument(
        "--method", default="laid", help="a trained method of the configuration (default laid)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of data order, gaps and adapters")
    parser.add_argument(
        "--eval", type=Path, help="held-out conversations, answered before and after, for the model card"
    )
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from laid.commands.shared import deterministic, pick_device
    from laid.io import alone, require_place
    from laid.models.loading import name_of
    from laid.settings import load
    from laid.standalone import distill, finished, image_root, known_needles, summary
    from laid.training.recipe import FILES, Run

    settings = load(args.config)
    out = args.out or Path(f"{name_of(args.student)}-{args.method}")
    deterministic(args.threads)
    run = Run(
        settings, args.method, args.seed, name_of(args.student), args.student, image_root(args.data, args.coco), args.data,
        out, teacher=args.teacher,
    )  # fmt: skip
    require_place(out, *FILES)
    run = known_needles(run)
    with alone(out) as waited:
        record = (finished(run, args.eval) if waited else None) or distill(
            run, args.eval, pick_device(args.device)
        )
    print(f"{summary(record)}\n{out / 'model'}: the student, with its card in README.md")
    return 0
