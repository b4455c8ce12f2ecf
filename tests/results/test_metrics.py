"""metrics.json and curves.csv against the cells they are made from."""

import csv
import io
import json

import synthetic
from laid.results import tables
from laid.results.answers import Results
from laid.results.needed import needed


def grid(tmp_path):
    """Accuracies that differ everywhere, in hundredths: 100 questions a cell."""
    config = synthetic.config()
    curves = {}
    for k, (student, method, size) in enumerate(needed(config)):
        curves.setdefault((student, method), {})[size] = (37 * k % 101) / 100
    return Results(synthetic.grid_of(curves, 100), config, tmp_path)


def test_every_number_is_a_cells(tmp_path):
    cells = grid(tmp_path)
    tables.write_metrics(cells, tmp_path / "out")
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/curves.csv").read_text())))
    drawn = {(row["model"], int(row["images"])): float(row["accuracy"]) for row in rows}
    assert len(drawn) == len(rows)
    seen = 0
    for (student, method, size), part in cells.answers.groupby(["student", "method", "size"]):
        seen += 1
        expected = round(100 * sum(part["answer"] == part["label"]) / len(part), 2)
        assert found[student][method]["accuracy"][str(size)] == expected
        assert abs(drawn[f"{student} {method}", size] - expected) < 0.006
    assert seen == len(rows) == len(cells.models) * len(cells.sizes)


def test_windows_are_numbers_or_bounds(tmp_path):
    found = tables.metrics(grid(tmp_path))
    windows = [entry["window"] for methods in found.values() for entry in methods.values()]
    assert all(isinstance(w, (int, float)) or w.startswith(("<", ">=")) for w in windows)


def test_unchanged_files_keep_their_time(tmp_path):
    cells = grid(tmp_path)
    tables.write_metrics(cells, tmp_path)
    before = [(tmp_path / name).stat().st_mtime_ns for name in ("metrics.json", "curves.csv")]
    tables.write_metrics(cells, tmp_path)
    assert before == [(tmp_path / name).stat().st_mtime_ns for name in ("metrics.json", "curves.csv")]
