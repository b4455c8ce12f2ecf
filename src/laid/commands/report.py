"""`laid report`: one results page that opens offline in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.commands.shared import read_results, results_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results_arguments(parser, "report.html")
    parser.add_argument(
        "--figures",
        type=Path,
        help="folder of `laid figures` (default: <results>/<scale>/figures, where it exists)",
    )
    parser.add_argument(
        "--claims",
        type=Path,
        help="claims.json of `laid claims` (default: <results>/<scale>/claims, where it exists)",
    )


def run(args: argparse.Namespace) -> None:
    from laid.commands.tables import shortcuts_line
    from laid.io import alone, update
    from laid.results import report

    results, beside, root = read_results(args)
    figures, claims = args.figures, args.claims
    if figures is None and (beside / "figures" / "captions.json").is_file():
        figures = beside / "figures"
    if claims is None and (beside / "claims" / "claims.json").is_file():
        claims = beside / "claims" / "claims.json"
    page = report.build(
        results, figures, claims, beside, shortcuts_line(beside / "haystacks" / "shortcuts.json")
    )
    out = args.out or root / "report.html"
    with alone(out):
        update(out, page)
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB, opens in any browser, needs no network")
