"""`laid figures`: figures from cells and training logs, as SVG, PNG and CSV; their main numbers are printed."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="+", type=Path, default=[Path("config.yaml")], help="base file, then overlays"
    )
    parser.add_argument(
        "--cells", type=Path, required=True, help="folder of cells, <student>/<method>/<size>.json"
    )
    parser.add_argument("--runs", type=Path, help="folder of runs, for the training curves from their logs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")


def run(args: argparse.Namespace) -> None:
    from laid import config
    from laid.errors import LaidError
    from laid.results import curves, figures, plotting, tables
    from laid.results.cells import load_cells
    from laid.results.terminal import show

    grid = tables.Grid(load_cells(args.cells), config.load(args.config), args.cells)
    drawings = figures.build(grid)
    if args.runs is not None:
        if not args.runs.is_dir():
            raise LaidError(f"{args.runs}: no such folder of runs; leave --runs out, or train first")
        drawings += curves.build(curves.load_logs(args.runs))
    written = [path for drawing in drawings for path in plotting.save(drawing, args.out)]
    plotting.write_captions(drawings, args.out)
    names = ", ".join(path.stem for path in written if path.suffix == ".svg")
    show(figures.summary(grid), footnote=f"{args.out}: {names} (each .svg, .png, .csv)")
