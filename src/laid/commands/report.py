"""`laid report`: one results page that opens offline in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.results import places


def add_arguments(parser: argparse.ArgumentParser) -> None:
    places.add_arguments(parser, "report.html")
    parser.add_argument(
        "--figures", type=Path, help="folder of `laid figures` (default: <results>/<scale>/figures if there)"
    )
    parser.add_argument(
        "--claims", type=Path, help="claims.json of `laid claims` (default: beside, if there)"
    )


def run(args: argparse.Namespace) -> None:
    from laid.commands.tables import shortcuts_line
    from laid.evaluation.cells import load_cells
    from laid.results import report, tables
    from laid.settings import load

    settings = load(args.config)
    cells = args.cells or places.root_of(settings) / "cells"
    root = cells.parent
    figures = args.figures or _if_there(root / "figures" / "captions.json", root / "figures")
    claims = args.claims or _if_there(root / "claims" / "claims.json")
    grid = tables.Grid(load_cells(cells), settings, cells)
    page = report.build(grid, figures, claims, root, shortcuts_line(root / "haystacks" / "shortcuts.json"))
    out = args.out or places.root_of(settings) / "report.html"
    places.update(out, page)
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB, opens in any browser, needs no network")


def _if_there(path: Path, value: Path | None = None) -> Path | None:
    return (value or path) if path.is_file() else None
