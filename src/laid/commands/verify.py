"""`laid verify`: check every cell against its inputs, or rebuild one and compare bytes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument

    config_argument(parser)
    parser.add_argument("cells", nargs="*", type=Path, metavar="CELL", help="cells to check (default: all)")
    parser.add_argument(
        "--rebuild",
        type=Path,
        metavar="CELL",
        help="build one cell again in a temporary folder and compare the bytes",
    )
    parser.add_argument(
        "--device", default="auto", help="for --rebuild: cpu, cuda ...; auto: a GPU where there is one"
    )


def run(args: argparse.Namespace) -> int:
    from laid.audit.lineage import Lineage
    from laid.audit.verify import STATES, all_cells, grouped, judge, locate, name_of
    from laid.errors import LaidError
    from laid.settings import load

    if args.rebuild and args.cells:
        raise LaidError(f"{args.cells[0]}: give cells to check, or one cell to --rebuild, not both")
    lineage = Lineage(load(args.config))
    if args.rebuild:
        return _rebuild(lineage, args.rebuild, args.device)
    steps = [locate(lineage, path) for path in args.cells] or list(all_cells(lineage))
    found = {step: judge(lineage, step) for step in steps}
    for (state, reasons), group in grouped(found):
        for reason in reasons:
            print(f"{state}: {name_of(group)}: {reason}")
    counts = {state: sum(s == state for s, _ in found.values()) for state in STATES}
    print(
        f"{len(found)} cells below {lineage.root / 'cells'}: "
        + ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "sound")
    )
    if counts["sound"] == len(found):
        return 0
    base = Path("config.yaml")
    if len(args.config) == 1 and base.is_file() and not base.samefile(args.config[0]):
        alone = args.config[0]
        print(f"{alone} was read alone; over {base}, as Snakemake reads it: --config {base} {alone}")
    return 1


def _rebuild(lineage, cell: Path, device: str) -> int:
    from laid.audit.rebuild import rebuild
    from laid.audit.verify import there
    from laid.commands.shared import deterministic, pick_device

    step = there(lineage, cell)
    deterministic(lineage.config.resources.evaluate.threads)
    same, said = rebuild(lineage, step, pick_device(device))
    for line in said:
        print(f"{step.record}: {line}")
    return 0 if same else 1
