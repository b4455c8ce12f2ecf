"""`laid figures`: figures from cells and training logs, as SVG, PNG and CSV; their main numbers are printed."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.results import places


def add_arguments(parser: argparse.ArgumentParser) -> None:
    places.add_arguments(parser, "figures")
    parser.add_argument(
        "--runs", type=Path, help="folder of runs, for training curves (default: beside the cells, if there)"
    )


def run(args: argparse.Namespace) -> None:
    from laid.errors import LaidError
    from laid.evaluation.cells import load_cells
    from laid.results import curves, figures, heads, learned, plotting, tables
    from laid.results.schedule_figure import draw_schedule
    from laid.results.terminal import show
    from laid.settings import load

    settings = load(args.config)
    root = places.root_of(settings)
    cells, out = args.cells or root / "cells", args.out or root / "figures"
    grid = tables.Grid(load_cells(cells), settings, cells)
    drawings = figures.build(grid)
    if args.runs is not None and not args.runs.is_dir():
        raise LaidError(f"{args.runs}: no such folder of runs; leave --runs out, or train first")
    runs = args.runs or cells.parent / "runs"
    drawings += curves.build(curves.load_logs(runs))
    drawings += learned.build(learned.load(runs, grid.students))
    drawings += heads.build(heads.load(cells.parent / "analysis"), grid.teacher, grid.students)
    shown = [size for size in grid.sizes if size <= settings["haystacks"]["train"]["max_size"]]
    if shown:
        span = grid.cell(grid.teacher, "base", shown[-1])["positions_mean"]
        schedule = draw_schedule(settings["methods"]["laid"], span)
        drawings += [schedule] if schedule else []
    written = [path for drawing in drawings for path in plotting.save(drawing, out)]
    plotting.write_captions(drawings, out)
    names = ", ".join(path.stem for path in written if path.suffix == ".svg")
    show(figures.summary(grid), footnote=f"{out}: {names} (each .svg, .png, .csv)")
