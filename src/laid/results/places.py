"""Where the verbs about results find and put things, unless told otherwise; and writing only what has changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from laid.io import atomic_path


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """--config, --cells and --out; the last two default to places below <results>/<scale>."""
    parser.add_argument(
        "--config", nargs="+", type=Path, default=[Path("config.yaml")], help="base file, then overlays"
    )
    parser.add_argument(
        "--cells",
        type=Path,
        help="folder of cells, <student>/<method>/<size>.json (default <results>/<scale>/cells)",
    )
    parser.add_argument("--out", type=Path, help=f"where to write (default <results>/<scale>/{out})")


def root_of(config: dict[str, Any]) -> Path:
    """<results>/<scale> of a configuration."""
    return Path(config["results"]) / config["scale"]


def update(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically, unless it holds this content already: an unchanged file keeps its time stamp.

    So a verb run by hand after the workflow leaves the workflow with nothing to do.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return
    with atomic_path(path) as beside:
        beside.write_bytes(data)
