"""`laid tables`: Tables 1, 2 and 3 from cells, with tests and effective windows, as CSV and Markdown, and printed."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.commands.shared import output, read_results, results_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    results_arguments(parser, "tables")
    parser.add_argument("--all", action="store_true", help="print paired tests and effective windows too")
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="also write all answers as one table, .csv or .parquet"
    )


def run(args: argparse.Namespace) -> None:
    from laid.results import tables
    from laid.results.answers import save_answers
    from laid.results.render import show, write

    results, beside, root = read_results(args)
    if args.answers:
        save_answers(results.answers, args.answers)
    built, statistics = tables.build(results), tables.build_statistics(results)
    with output(args.out or root / "tables") as out:
        write([*built, *statistics], out)
        tables.write_metrics(results, out)
    footnote = shortcuts_line(beside / "haystacks" / "shortcuts.json")
    show([*built, *statistics] if args.all else built, footnote)


def shortcuts_line(path: Path) -> str | None:
    """What answering by shortcut would score on the test questions, or None without `path` beside the cells."""
    from laid.data.shortcuts import SHORTCUTS
    from laid.errors import LaidError
    from laid.io import read_json

    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != "laid-shortcuts/1":
        raise LaidError(f"{path}: not the shortcut scores of `laid haystacks`; make the haystacks again")
    # With one image, "target in any image" is no shortcut but the task.
    tests = [
        scores["accuracy"]
        for name, scores in content["files"].items()
        if name.startswith("test/") and scores["sizes"][1] > 1
    ]
    parts = []
    for key, (title, _) in SHORTCUTS.items():
        found = sorted(100 * accuracy[key] for accuracy in tests if key in accuracy)
        if found:
            spread = f"{found[0]:.1f}" if found[0] == found[-1] else f"{found[0]:.1f} to {found[-1]:.1f}"
            parts.append(f"{title} {spread}")
    return f"Answering by shortcut would score, from 2 images on (%): {'; '.join(parts)}." if parts else None
