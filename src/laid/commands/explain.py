"""`laid explain CELL`: the chain from image files to one number."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument

    config_argument(parser)
    parser.add_argument(
        "cell",
        type=Path,
        metavar="CELL",
        help="<results>/<scale>/cells/<suite>/<student>/<method>/<size>.json",
    )


def run(args: argparse.Namespace) -> int:
    from laid.audit.explain import chain_of_cell, lines
    from laid.audit.lineage import Lineage
    from laid.audit.verify import judge, there
    from laid.settings import load

    lineage = Lineage(load(args.config))
    step = there(lineage, args.cell)
    print("\n".join(lines(chain_of_cell(lineage, step))))
    state, reasons = judge(lineage, step)
    print(f"\n{state}" + "".join(f"\n  {reason}" for reason in reasons))
    return 0
