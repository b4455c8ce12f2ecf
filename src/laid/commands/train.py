"""`laid train`: post-train a student."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments, features_argument, seed

    config_argument(parser)
    parser.add_argument(
        "--method", required=True, help="a trained method (methods in the configuration): sft, kd, laid ..."
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of data order, gaps and adapters")
    parser.add_argument("--student-name", required=True, help="name of the student (models.students)")
    parser.add_argument("--student", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--teacher-cache", type=Path, help="folder of `laid teacher-cache`; SFT needs none")
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO root that the questions' paths start from"
    )
    parser.add_argument("--questions", type=Path, required=True, help="training questions, VHs JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, log.jsonl and run.json")
    features_argument(parser)
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from laid import config
    from laid.commands.shared import deterministic, pick_device
    from laid.distill.trainer import Trainer
    from laid.io import alone

    settings = config.load(args.config)
    deterministic(args.threads)
    with alone(args.out):
        trainer = Trainer(
            settings, args.method, args.seed, args.student_name, args.student, args.teacher_cache, args.coco,
            args.questions, args.out, pick_device(args.device), args.features,
        )  # fmt: skip
        record = trainer.train()
    print(
        f"{args.student_name} {args.method} seed {args.seed}: {record['steps']} steps,"
        f" loss {record['final']['loss']:.4f}"
    )
    return 0
