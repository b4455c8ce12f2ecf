"""`laid train`: post-train a student.

In one process as it is; in several, started by Accelerate, whose file says how they share the student:

    accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 4 -m laid train ...
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path

from laid.errors import LaidError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments, features_argument, seed

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "several processes, one for each GPU (configs/accelerate/: one_gpu, ddp, fsdp2, zero3, several_machines):\n"
        "  accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 4 -m laid train ..."
    )
    config_argument(parser)
    parser.add_argument(
        "--method", required=True, help="a trained method of the configuration: sft, kd, laid ..."
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of data order, gaps and adapters")
    parser.add_argument("--student-name", required=True, help="name of the student (models.students)")
    parser.add_argument("--student", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--teacher-cache", type=Path, help="folder of `laid teacher-cache`; SFT needs none")
    parser.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        help="instead: a teacher that answers in every step and keeps nothing on disk",
    )
    parser.add_argument(
        "--teacher-device",
        metavar="DEVICE[,DEVICE ...]",
        help="device of --teacher: one for all processes of this machine, or one for each (default: the student's)",
    )
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO folder that the questions' image paths start from"
    )
    parser.add_argument(
        "--questions", type=Path, required=True, help="training questions or any conversations with images"
    )
    parser.add_argument(
        "--validation",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="held-out questions or conversations, asked as training goes (training.validation says how often)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, log.jsonl and run.json")
    features_argument(parser)
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
    from laid.commands.shared import deterministic, features_folder, pick_device
    from laid.io import alone
    from laid.training.engine import launched, start
    from laid.training.recipe import Run, made, train

    deterministic(max(1, args.threads // launched()))
    try:
        training = Run(
            settings, args.method, args.seed, args.student_name, args.student, args.coco, args.questions, args.out,
            args.teacher_cache, args.teacher, own_device(args.teacher_device), features_folder(args, settings),
            tuple(args.validation),
        )  # fmt: skip
        engine = start(settings.training, pick_device(args.device), training.logs)
        with alone(args.out) if engine.main else nullcontext() as waited:
            # Whoever was waited for may have made this very run: a cluster's job whose Snakemake was killed, for one.
            record = engine.agree(lambda: made(training) if waited else None)
            if record:
                engine.accelerator.print(
                    f"{args.out}: was made meanwhile, from the same inputs; nothing left to do"
                )
            record = record or train(training, engine)
    except LaidError:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # what stops all processes is the main one's to say
        raise
    found = record.get("best")
    told = f"; best validation {found['validation_accuracy']:.1%} at step {found['step']}" if found else ""
    engine.accelerator.print(f"{training}: {record['steps']} steps, loss {record['final']['loss']:.4f}{told}")
    return 0
