"""`laid features`: show a vision tower every image of some question files once, for all jobs that follow."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments, features_argument

    config_argument(parser)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO folder that the questions' image paths start from"
    )
    parser.add_argument("--questions", type=Path, nargs="+", required=True, metavar="FILE")
    features_argument(parser)
    parser.add_argument("--out", type=Path, help="file that says what was done")
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import time

    import torch

    from laid import provenance
    from laid.commands.shared import deterministic, features_folder, pick_device
    from laid.data.questions import read_questions
    from laid.errors import LaidError
    from laid.io import safe_join, write_json
    from laid.models.decoder import vision_tower
    from laid.models.features import ImageFeatures
    from laid.models.loading import load_model
    from laid.models.processing import Processor
    from laid.settings import load

    start = time.perf_counter()
    settings = load(args.config)
    folder = features_folder(args, settings)
    if folder is None:
        raise LaidError("give --features, a folder to keep them in, or set evaluation.keep_features")
    deterministic(args.threads)
    asked = [question for file in args.questions for question in read_questions(file)]
    images = sorted({path for q in asked for path in (*q.needles, *q.distractors)})
    # The language model, many times as large, stays where it is.
    model = load_model(args.model, getattr(torch, settings.evaluation.dtype), settings.evaluation.attention)
    vision_tower(model).to(pick_device(args.device))
    features = ImageFeatures(
        model, Processor.load(args.model), lambda path: safe_join(args.coco, path), store=folder
    )
    features.fill_store(images)
    print(f"features: {len(images)} images, {features.computed} of them computed now")
    if args.out is not None:
        write_json(
            args.out, {"images": len(images), "computed": features.computed, "cost": provenance.cost(start)}
        )
    return 0
