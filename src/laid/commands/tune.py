"""`laid tune`: which settings each method gets, from the cells of all that were tried, as CSV and Markdown, and printed."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import results_arguments

    results_arguments(parser, "tune")


def run(args: argparse.Namespace) -> None:
    from laid.commands.shared import output, root_of
    from laid.evaluation.cells import load_cells
    from laid.io import update
    from laid.results import tune
    from laid.results.render import csv_text, markdown, show
    from laid.settings import load

    settings = load(args.config)
    root = root_of(settings)
    cells = (args.cells or root / "cells") / "validation"
    results = tune.read(load_cells(cells, " tune --configfile configs/tune.yaml"), settings, cells)
    frame = tune.scores(results)
    table, chosen = tune.tune_table(results, frame), tune.chosen_yaml(frame, settings)
    with output(args.out or root / "tune") as out:
        update(out / "tune.csv", csv_text(table))
        update(out / "tune.md", f"{markdown(table)}\nChosen:\n\n```yaml\n{chosen}```\n")
    found = tune.differences(frame, settings)
    say = (
        "The configuration differs from what is chosen:" if found else "The configuration has what is chosen."
    )
    show([table], "\n".join([chosen, say, *(f"  {line}" for line in found)]))
