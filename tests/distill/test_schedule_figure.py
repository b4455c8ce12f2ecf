"""The drawn numbers are the schedule's."""

import csv

import pytest

from laid.distill.schedule import DistanceSchedule
from laid.distill.schedule_figure import draw_schedule
from laid.results import plotting


def test_figure_is_written_with_the_numbers_of_the_schedule(tmp_path):
    drawing = draw_schedule(DistanceSchedule(strength=4, start=0.5), short=100, long=500)
    paths = plotting.save(drawing, tmp_path)
    assert all(path.stat().st_size > 500 for path in paths)
    rows = list(csv.DictReader((tmp_path / "distance_schedule.csv").open()))
    assert {r["y"] for r in rows if r["panel"] == "weight" and r["progress"] in ("0", "0.25", "0.5")} == {
        "1.0000"
    }
    end = [float(r["y"]) for r in rows if r["panel"] == "weight" and r["progress"] == "1"]
    assert end[-1] / end[0] == pytest.approx(5, rel=1e-3)
    assert sum(end) / len(end) == pytest.approx(1, abs=1e-3)
    spans = {r["x"]: float(r["y"]) for r in rows if r["panel"] == "reach"}
    assert (spans["0.50"], spans["0.75"], spans["1.00"]) == (100, 300, 500)
