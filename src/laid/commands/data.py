"""`laid data`: make the COCO data (rendered, downloaded, from an export), or check a local folder."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from laid.commands.shared import config_argument

if TYPE_CHECKING:
    from laid.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="COCO folder to make; with data.source local, a link to data.root",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="question files, ours or official: check every image that they name (data.source download: fetch it)",
    )
    parser.add_argument(
        "--all-images",
        action="store_true",
        help="with data.source download: fetch every image of both splits",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="JSON",
        help="lay out an annotation tool's COCO export instead, with --images",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="the folder of the images of --export")


def run(args: argparse.Namespace) -> int:
    from laid.io import alone
    from laid.settings import load

    settings = load(args.config)
    if args.export is not None:
        with alone(args.out):
            return _from_export(args)
    # The images of haystacks and of POPE may be asked for at the same time.
    with alone(args.out) if settings.data.source != "local" else nullcontext():
        return _make(args, settings)


def _from_export(args: argparse.Namespace) -> int:
    from laid.data.coco import SPLITS, check_images, load_both
    from laid.data.export import lay_out
    from laid.errors import LaidError

    if args.images is None:
        raise LaidError("--export names images: give the folder that they lie in with --images")
    counts = lay_out(args.export, args.images, args.out)
    splits = load_both(args.out)
    for coco in splits:
        check_images(coco)
    told = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    print(f"{args.out}: {told} images, {len(splits[0].categories)} categories")
    return 0


def _make(args: argparse.Namespace, everything: Settings) -> int:
    from laid import provenance
    from laid.data.coco import SPLITS, check_images, load_coco, load_labels
    from laid.data.pope import is_pope, read_pope
    from laid.data.questions import read_questions
    from laid.errors import LaidError
    from laid.io import write_json

    settings = everything.data
    out: Path = args.out
    source = None
    if settings.source == "download":
        from laid.data.download import CocoDownload

        source = CocoDownload(out, **settings.download.model_dump())
        source.annotations()  # first: POPE's own files are read by them
    named: dict[str, Path] = {}  # image -> the first question file that names it
    for file in args.questions:
        for question in read_pope(file, out) if is_pope(file) else read_questions(file):
            named |= {path: named.get(path, file) for path in question.needles + question.distractors}
    if source is not None:
        source.images(sorted(named))
        if args.all_images:
            source.all_images()
    elif settings.source == "rendered" and not named:
        from laid.toy.render import render

        render(out, **settings.rendered.model_dump())
    elif settings.source == "local":
        root = Path(settings.root).absolute()
        for split in SPLITS:
            load_coco(root, split, check="sizes")
        if not (out.exists() and out.samefile(root)):
            if out.exists() and not out.is_symlink():
                if not out.is_dir() or any(out.iterdir()):
                    raise LaidError(
                        f"{out}: exists and is not a link, so it is not replaced by one to {root}: remove it"
                    )
                out.rmdir()
            out.parent.mkdir(parents=True, exist_ok=True)
            fresh = out.with_name(f".{out.name}.link-{os.getpid()}")  # several jobs look for images at once
            os.symlink(root, fresh, target_is_directory=True)
            os.replace(fresh, out)
    if named:
        splits = [load_coco(out, split) for split in SPLITS]
        unknown = [path for path in sorted(named) if not any(path in coco.images for coco in splits)]
        if unknown:
            raise LaidError(
                f"{named[unknown[0]]}: {len(unknown)} images of the questions are not annotated in {out}, first {unknown[0]}"
            )
        for coco in splits:
            check_images(coco, paths=[path for path in sorted(named) if path in coco.images])
    if settings.source != "local":  # the user's own folder stays as it is
        write_json(out / "laid.json", {"provenance": provenance.collect("data", everything, {})})
    labels, categories = load_labels(out)
    objects = sum(map(len, labels.values())) / max(1, len(labels))
    counts = ", ".join(f"{sum(p.startswith(s) for p in labels)} {s}" for s in SPLITS)
    print(f"{out}: {counts} images, {len(categories)} categories, {objects:.2f} categories per image")
    return 0
