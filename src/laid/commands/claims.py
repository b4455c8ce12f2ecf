"""`laid claims`: the paper's claims held against its printed tables and against the cells of a scale."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.commands.shared import output, read_results, results_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results_arguments(parser, "claims")
    parser.add_argument(
        "--ledger", type=Path, default=Path("claims.yaml"), help="the list of claims and their tests"
    )


def run(args: argparse.Namespace) -> None:
    from laid.io import dumps, update
    from laid.results import claims
    from laid.results.published import Published
    from laid.results.render import show

    results, beside, root = read_results(args)
    found = claims.assess(claims.read_ledger(args.ledger), [Published(), results], beside)
    with output(args.out or root / "claims") as out:
        update(out / "claims.json", dumps(found) + "\n")
        update(out / "claims.md", claims.markdown(found))
    show([claims.summary(found)], footnote=f"Figures behind each verdict: {out / 'claims.md'}")
