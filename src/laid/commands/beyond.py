"""`laid beyond`: figures and words on what lies beyond the paper: why windows shrink, and where they end."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.commands.shared import output, results_arguments, root_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results_arguments(parser, "beyond")
    parser.add_argument("--why", type=Path, help="folder of `laid why` (default: <out>/why)")
    parser.add_argument("--docs", type=Path, help="write the text to this file as well")


def run(args: argparse.Namespace) -> None:
    from laid.errors import LaidError
    from laid.evaluation.cells import load_cells
    from laid.io import update
    from laid.results import beyond, plotting
    from laid.results.names import method_names
    from laid.settings import load

    settings = load(args.config)
    root, names = root_of(settings), method_names(settings)
    out = args.out or root / "beyond"
    records = beyond.load_why(args.why or out / "why")
    cells = args.cells or root / "cells"
    far, near = (
        load_cells(cells / suite) if (cells / suite).is_dir() else {} for suite in ("beyond", "test")
    )
    far = {key: cell for key, cell in far.items() if key[1] in settings.beyond.methods}
    if not records and not far:
        raise LaidError(
            f"{out}: neither records of `laid why` nor cells; `snakemake --cores all beyond` makes them"
        )
    teacher, students = settings.models.teacher, settings.models.students
    drawings = beyond.build(records, near, far, teacher, students, names)
    text = beyond.report(records, far, teacher, students, settings.tables.short_max, names)
    with output(out / "figures") as figures:
        for drawing in drawings:
            plotting.save(drawing, figures)
        plotting.write_captions(drawings, figures)
        for path in [out / "why.md", *([args.docs] if args.docs else [])]:
            update(path, text)
    print(text)
