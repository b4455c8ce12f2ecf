"""`laid push`: a distilled student to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.errors import LaidError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="result of `laid distill`")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub; a new one is private")
    parser.add_argument(
        "--merge",
        metavar="STUDENT",
        help="send a whole checkpoint: the adapter merged into the student it was trained from (a folder or a hub id)",
    )
    parser.add_argument(
        "--yes", action="store_true", help="send; without it, files and card are shown and nothing is sent"
    )


def run(args: argparse.Namespace) -> int:
    import tempfile

    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from laid.hub import files_of, send

    try:
        validate_repo_id(args.repo)
        if "/" not in args.repo:
            raise HFValidationError(f"{args.repo!r} has no owner")
    except HFValidationError as error:
        raise LaidError(f"{args.repo}: expected OWNER/NAME: {error}") from None
    with tempfile.TemporaryDirectory() as beside:
        files = files_of(args.folder, args.repo, Path(beside), args.merge)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if args.yes:
            print(f"{send(files, args.repo)}: {len(files)} files, {sum(sizes.values()) / 1e6:.1f} MB")
            return 0
        print(files["README.md"].read_text(encoding="utf-8"))
        for name, size in sizes.items():
            print(f"{size:>15,}  {name}")
        print(f"{sum(sizes.values()):>15,}  bytes for {args.repo}; nothing was sent: --yes sends")
        if "adapter_config.json" in files:
            print(
                "an adapter: who loads it needs the student it was trained from; --merge sends a whole checkpoint"
            )
    return 0
