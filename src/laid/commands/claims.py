"""`laid claims`: the paper's claims held against its printed tables and against the cells of a scale."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.results import places


def add_arguments(parser: argparse.ArgumentParser) -> None:
    places.add_arguments(parser, "claims")
    parser.add_argument("--ledger", type=Path, default=Path("claims.yaml"), help="the ledger of claims")


def run(args: argparse.Namespace) -> None:
    from laid.evaluation.cells import load_cells
    from laid.io import dumps
    from laid.results import claims, tables
    from laid.results.sources import CellSource, PublishedSource
    from laid.results.terminal import show
    from laid.settings import load

    settings = load(args.config)
    root = places.root_of(settings)
    cells, out = args.cells or root / "cells", args.out or root / "claims"
    grid = tables.Grid(load_cells(cells), settings, cells)
    sources = [PublishedSource(), CellSource(grid)]
    found = claims.assess(claims.read_ledger(args.ledger), sources, cells.parent)
    places.update(out / "claims.json", dumps(found) + "\n")
    places.update(out / "claims.md", claims.markdown(found))
    show([claims.summary(found)], footnote=f"Figures behind each verdict: {out / 'claims.md'}")
