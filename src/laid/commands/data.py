"""`laid data`: make the COCO data (rendered, downloaded) or check a local folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[Path("config.yaml")],
        metavar="FILE",
        help="base, then overlays",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="COCO root to make; for source local: a link to data.root is put there",
    )


def run(args: argparse.Namespace) -> int:
    from laid import config
    from laid.data.coco import SPLITS, load_coco, load_labels
    from laid.errors import LaidError

    settings = config.load(args.config)["data"]
    out: Path = args.out
    if settings["source"] == "rendered":
        from laid.data.render import render

        render(out, **settings["rendered"])
    elif settings["source"] == "local":
        root = Path(settings["root"]).expanduser().absolute()
        for split in SPLITS:
            load_coco(root, split, check="sizes")
        if not (out.exists() and out.resolve() == root.resolve()):
            if out.is_symlink():
                out.unlink()
            elif out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise LaidError(
                    f"{out}: exists and is not a link, so it is not replaced by one to {root}: remove it"
                )
            elif out.exists():
                out.rmdir()
            out.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(root, out, target_is_directory=True)
    labels, categories = load_labels(out)
    objects = sum(map(len, labels.values())) / max(1, len(labels))
    counts = ", ".join(f"{sum(p.startswith(s) for p in labels)} {s}" for s in SPLITS)
    print(f"{out}: {counts} images, {len(categories)} categories, {objects:.2f} categories per image")
    return 0
