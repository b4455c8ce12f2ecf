"""`laid sweep`: which part of the method does what, from the sweep's cells, as CSV and Markdown, and printed."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument

    config_argument(parser)
    parser.add_argument("--cells", type=Path, help="folder of cells (default <results>/<scale>/cells)")
    parser.add_argument("--out", type=Path, help="where to write (default <results>/<scale>/sweep)")


def run(args: argparse.Namespace) -> None:
    from laid.commands.shared import output, root_of
    from laid.evaluation.cells import load_cells
    from laid.results import sweep
    from laid.results.render import show, write
    from laid.settings import load

    settings = load(args.config)
    root = root_of(settings)
    cells = (args.cells or root / "cells") / "validation"
    table = sweep.sweep_table(
        sweep.read(load_cells(cells, " sweep --configfile configs/sweep.yaml"), settings, cells)
    )
    with output(args.out or root / "sweep") as out:
        write([table], out)
    show([table])
