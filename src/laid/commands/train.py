"""`laid train`: post-train a student."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from laid.errors import LaidError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, count, device_arguments, features_argument, seed

    config_argument(parser)
    parser.add_argument(
        "--method", required=True, help="a trained method (methods in the configuration): sft, kd, laid ..."
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of data order, gaps and adapters")
    parser.add_argument("--student-name", required=True, help="name of the student (models.students)")
    parser.add_argument("--student", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--teacher-cache", type=Path, help="folder of `laid teacher-cache`; SFT needs none")
    parser.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        help="instead: a teacher that answers as training goes, once per step and epoch, and keeps nothing on disk",
    )
    parser.add_argument(
        "--teacher-device",
        metavar="DEVICE[,DEVICE ...]",
        help="where --teacher computes: one device for all processes of this machine, or one for each; default: with the student",
    )
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO root that the questions' paths start from"
    )
    parser.add_argument("--questions", type=Path, required=True, help="training questions, VHs JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, log.jsonl and run.json")
    features_argument(parser)
    parser.add_argument(
        "--processes",
        type=lambda text: count(text, least=0),
        default=1,
        metavar="N",
        help="processes to start on this machine, one per GPU, laid out as training.parallel says; 0 is 1. Not under"
        " torchrun or `accelerate launch`, which start their own",
    )
    device_arguments(parser)


def own_device(listed: str | None) -> str | None:
    """This process's device of a list with one for all or one for each process of this machine."""
    if listed is None:
        return None
    devices, local = listed.split(","), int(os.environ.get("LOCAL_RANK", "0"))
    there = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if len(devices) not in (1, there):
        raise LaidError(
            f"--teacher-device {listed}: {len(devices)} devices for {there} processes: give one for all, or one for each"
        )
    from laid.commands.shared import pick_device

    return pick_device(devices[local if len(devices) > 1 else 0], "--teacher-device")


def run(args: argparse.Namespace) -> int:
    from laid.settings import load

    settings = load(args.config)
    if args.teacher_device and not args.teacher:
        raise LaidError(
            "--teacher-device says where --teacher computes: give --teacher as well, or leave it out"
        )
    if args.processes > 1 and "WORLD_SIZE" not in os.environ:
        from laid.training.launch import launch

        return launch([sys.executable, "-m", "laid", *sys.argv[1:]], args.processes)

    import torch

    from laid.commands.shared import deterministic, pick_device
    from laid.io import alone
    from laid.training.parallel import join
    from laid.training.trainer import Trainer

    training = settings["training"]
    deterministic(max(1, args.threads // max(1, args.processes)))
    parallel = join(training["parallel"], pick_device(args.device), getattr(torch, training["dtype"]))
    try:
        with alone(args.out) if parallel.main else nullcontext() as waited:
            trainer = Trainer(
                settings, args.method, args.seed, args.student_name, args.student, args.teacher_cache, args.coco,
                args.questions, args.out, features_folder=args.features, parallel=parallel, teacher=args.teacher,
                teacher_device=own_device(args.teacher_device),
            )  # fmt: skip
            # Whoever was waited for may have made this very run: a cluster's job whose Snakemake was killed, for one.
            record = parallel.agree(lambda: trainer.made() if waited else None)
            if record and parallel.main:
                print(f"{args.out}: was made meanwhile, from the same inputs; nothing left to do")
            record = record or trainer.train()
    except LaidError:
        if not parallel.main:
            time.sleep(2)  # what stops all processes is the main one's to say
        raise
    if not parallel.main:
        return 0
    print(
        f"{args.student_name} {args.method} seed {args.seed}: {record['steps']} steps,"
        f" loss {record['final']['loss']:.4f}"
    )
    return 0
