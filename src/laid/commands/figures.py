"""`laid figures`: figures from cells and training logs, as SVG, PNG and CSV."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from laid.commands.shared import output, read_results, results_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results_arguments(parser, "figures")
    parser.add_argument(
        "--runs", type=Path, help="folder of runs, for training curves (default: runs/ beside the cells)"
    )


def run(args: argparse.Namespace) -> None:
    from laid.errors import LaidError
    from laid.results import alignability, figures, heads, plotting, training_figures
    from laid.results.names import LAID

    results, beside, root = read_results(args)
    names, students = results.names, results.students
    if args.runs is not None and not args.runs.is_dir():
        raise LaidError(f"{args.runs}: no such folder of runs; leave --runs out, or train first")
    runs = args.runs or beside / "runs"
    drawings = figures.build(results)
    drawings += training_figures.build(training_figures.load_logs(runs), names)
    drawings += heads.build(heads.load(beside / "analysis"), results.teacher, students, names)
    reached = alignability.load(beside / "alignability")
    if shown := {student: reached[student] for student in students if student in reached}:
        drawings.append(alignability.figure(shown))
    settings = results.settings
    drawings += [
        training_figures.learned(training_figures.load_learned(runs, students, method), method, names[method])
        for method in LAID
    ]
    trained = [size for size in results.sizes if size <= settings.haystacks.train.max_size]
    if trained:
        span = results.cell(results.teacher, "base", trained[-1]).positions_mean
    if trained and not math.isnan(span):  # a served teacher's positions are not known
        shown = [settings.methods[method] for method in LAID if method in settings.methods]
        drawings.append(training_figures.distance_schedule(shown, span))
    drawings = [drawing for drawing in drawings if drawing]
    with output(args.out or root / "figures") as out:
        for drawing in drawings:
            plotting.save(drawing, out)
        plotting.write_captions(drawings, out)
    written = ", ".join(drawing.name for drawing in drawings)
    print(f"{out}: {written} (each .svg, .png, .csv)")
