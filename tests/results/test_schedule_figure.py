"""The drawn numbers are the schedule's."""

import csv

import pytest

from laid.results import plotting
from laid.results.training_figures import distance_schedule
from laid.settings import TrainedMethod

DISTANCE = {"strength": 4.0}
GAPS = {"reach": 500, "end": 0.5}


def method(**values):
    return TrainedMethod.model_validate(values)


def test_figure_is_written_with_the_numbers_of_both_schedules(tmp_path):
    """Each from the first method that has it."""
    drawing = distance_schedule([TrainedMethod(), method(distance=DISTANCE), method(gaps=GAPS)], span=100)
    paths = plotting.save(drawing, tmp_path)
    assert all(path.stat().st_size > 500 for path in paths)
    rows = list(csv.DictReader((tmp_path / "distance_schedule.csv").open()))
    assert {r["y"] for r in rows if r["panel"] == "weight" and r["progress"] == "0"} == {"1.0000"}
    end = [float(r["y"]) for r in rows if r["panel"] == "weight" and r["progress"] == "1"]
    assert end[-1] / end[0] == pytest.approx(5, rel=1e-3)
    assert sum(end) / len(end) == pytest.approx(1, abs=1e-3)
    # gaps grow by their own clock, not by that of the weights
    spans = {r["x"]: float(r["y"]) for r in rows if r["panel"] == "reach"}
    assert [spans[x] for x in ("0.00", "0.25", "0.50", "1.00")] == [100, 300, 500, 500]


def test_no_figure_of_a_method_without_distance():
    plain = method(distance={**DISTANCE, "strength": 0.0}, gaps={**GAPS, "reach": 0})
    assert distance_schedule([plain], 100) is None
