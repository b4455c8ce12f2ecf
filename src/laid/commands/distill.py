"""`laid distill`: distil one student from one teacher on any conversations with images, without the workflow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from laid.errors import LaidError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, count, device_arguments, seed

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
    parser.add_argument(
        "--validate-every",
        type=count,
        metavar="N",
        help="ask the first 100 conversations of --eval every N steps, and export the best student by them",
    )
    parser.add_argument(
        "--patience",
        type=count,
        metavar="K",
        help="with --validate-every: stop after K validations in a row without a better one",
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
    if (args.validate_every and not args.eval) or (args.patience and not args.validate_every):
        raise LaidError(
            "--validate-every asks the conversations of --eval, and --patience counts validations: give those too"
        )
    validation: dict[str, Any] | None = None
    if args.validate_every:
        validation = {"every": args.validate_every, "patience": args.patience, "export": "best"}
    # The configuration's own is the workflow's: it names haystacks.
    settings = settings.changed({"training": {"validation": validation}})
    run = Run(
        settings, args.method, args.seed, name_of(args.student), args.student, image_root(args.data, args.coco), args.data,
        out, teacher=args.teacher, validation=(args.eval,) if validation else (),
    )  # fmt: skip
    require_place(out, *FILES)
    run = known_needles(run)
    with alone(out) as waited:
        record = (finished(run, args.eval) if waited else None) or distill(
            run, args.eval, pick_device(args.device)
        )
    print(f"{summary(record)}\n{out / 'model'}: the student, with its card in README.md")
    return 0
