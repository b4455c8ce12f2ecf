"""`laid tables`: Tables 1, 2 and 3 from cells, written as CSV and Markdown and printed."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="+", type=Path, default=[Path("config.yaml")], help="base file, then overlays"
    )
    parser.add_argument(
        "--cells",
        type=Path,
        help="folder of cells, <student>/<method>/<size>.json (default: <results>/<scale>/cells)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for table1, table2, table3 (.csv and .md); without it they are printed only",
    )


def run(args: argparse.Namespace) -> None:
    from laid import config
    from laid.results import tables
    from laid.results.cells import load_cells
    from laid.results.terminal import show

    settings = config.load(args.config)
    cells = args.cells or Path(settings["results"]) / settings["scale"] / "cells"
    built = tables.build(tables.Grid(load_cells(cells), settings, cells))
    if args.out:
        tables.write(built, args.out)
    show(built, footnote=shortcuts_line(cells.parent / "haystacks" / "shortcuts.json"))


def shortcuts_line(path: Path) -> str | None:
    """What answering by shortcut would score on the test questions, or None without `path` beside the cells."""
    from laid.data.shortcuts import SHORTCUTS
    from laid.io import read_json

    if not path.is_file():
        return None
    tests = [scores["accuracy"] for name, scores in read_json(path).items() if name.startswith("test/")]
    parts = []
    for key, (title, _) in SHORTCUTS.items():
        found = sorted(100 * accuracy[key] for accuracy in tests if key in accuracy)
        if found:
            spread = f"{found[0]:.1f}" if found[0] == found[-1] else f"{found[0]:.1f} to {found[-1]:.1f}"
            parts.append(f"{title} {spread}")
    return f"Answering by shortcut would score (%): {'; '.join(parts)}." if parts else None
