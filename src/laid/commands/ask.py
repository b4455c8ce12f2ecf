"""`laid ask`: ask one checkpoint about the images of a folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments

    config_argument(parser)
    parser.add_argument(
        "question", help='for example "Is there a dog?"; yes-or-no questions are asked as the benchmark asks'
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="FOLDER", help="its images, in the order of their names"
    )
    parser.add_argument(
        "--show",
        type=Path,
        metavar="PNG",
        help="draw which images each head looks at as the question is read",
    )
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from laid.analysis.ask import ask, images_in
    from laid.commands.shared import checkpoint_argument, deterministic, pick_device
    from laid.io import require_place
    from laid.methods.registry import load_with_method
    from laid.settings import load

    images = images_in(args.images)
    if args.show:
        require_place(args.show, file=True)
    checkpoint_argument(args.model)
    deterministic(args.threads)
    loaded = load_with_method(load(args.config), "base", args.model, None, pick_device(args.device))
    answer = ask(loaded, images, args.question)
    sure = "" if answer.yes is None else f"; yes among yes and no {answer.yes:.3f}"
    print(f"{answer.text}\nprobability {answer.probability:.3f}{sure}; {len(images)} images")
    if args.show:
        from laid.results.looking import show

        show(answer, images, args.question, args.show)
        best = int(answer.shares.max((0, 1)).argmax())
        layer, head, share, word = answer.head_of(best)
        print(
            f"{args.show}: image {best + 1}, {images[best].name}, gets {100 * share:.1f} % of layer {layer} head {head} at {word!r}"
        )
    return 0
