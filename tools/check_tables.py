"""Check that Tables 1 and 3 are complete and numeric, and that each accuracy is the one its cell holds.

    python tools/check_tables.py --config config.yaml [OVERLAY ...]

Reads the CSV files as a stranger would and recounts the answers in the cells; used by .ci/run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

from laid.settings import load


def check(name: str, root: Path, rows_expected: list[tuple[str, str]], sizes: list[int]) -> int:
    """Check one table; returns the number of cells looked at. Raises SystemExit with one line."""
    path = root / "tables" / f"{name}.csv"
    with open(path, newline="", encoding="utf-8") as handle:
        header, *rows = list(csv.reader(handle))
    expected = ["params", "method", *map(str, sizes), "short_gain_pct", "long_gain_pct"]
    if header != expected:
        raise SystemExit(f"{path}: columns {header}, expected {expected}")
    if [row[1] for row in rows] != [method for _, method in rows_expected]:
        raise SystemExit(f"{path}: rows {[row[1] for row in rows]}, expected {rows_expected}")
    for row, (student, method) in zip(rows, rows_expected, strict=True):
        values = dict(zip(header, row, strict=True))
        for size in sizes:
            cell = json.loads((root / "cells" / "test" / student / method / f"{size}.json").read_text())
            right = sum(a["answer"] in (a["label"], "both") for a in cell["answers"])
            accuracy = 100 * right / len(cell["answers"])
            shown = float(values[str(size)])
            if not math.isfinite(shown) or abs(shown - accuracy) > 0.0051:
                raise SystemExit(
                    f"{path}: {student} {method} {size}: {shown}, the cell's answers give {accuracy}"
                )
        for gain in ("short_gain_pct", "long_gain_pct"):
            if method == "base":
                if values[gain]:
                    raise SystemExit(f"{path}: {student} base has a {gain} of {values[gain]}")
            elif not math.isfinite(float(values[gain])):
                raise SystemExit(f"{path}: {student} {method}: {gain} is {values[gain]}")
    return len(rows) * len(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("config.yaml")])
    config = load(parser.parse_args().config)
    root = Path(config.results) / config.scale
    tables, students = config.tables, config.models.students
    sizes = sorted(config.haystacks.test.sizes)
    first = [(config.models.teacher, "base")]
    first += [(student, method) for student in students for method in tables.methods]
    third = [(students[0 if tables.table3_student == "first" else -1], m) for m in tables.ablations]
    looked = check("table1", root, first, [s for s in sizes if s not in tables.omit])
    looked += check("table3", root, third, [s for s in sizes if s not in tables.table3_omit])
    print(
        f"Tables 1 and 3 are complete and numeric: {looked} accuracies agree with the answers in their cells."
    )


if __name__ == "__main__":
    main()
