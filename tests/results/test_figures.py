import csv
import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

import synthetic
from laid.errors import LaidError
from laid.results import figures, plotting, training_figures
from laid.results.answers import Results
from laid.results.names import SHIPPED, Names, method_names

SIZES = [1, 2, 10, 50, 100, 150]


@pytest.fixture(scope="module")
def grid():
    rng = np.random.default_rng(0)
    settings = synthetic.config(
        methods=["base", "sft", "kd", "laid"], ablations=["base", "laid"], sizes=SIZES
    )
    cells = {}
    for student in ("32B", "7B", "3B"):
        for method in ["base"] if student == "32B" else settings.tables.methods:
            seeds = 1 if method == "base" else 2
            for size in SIZES:
                right = (rng.random((seeds, 60)) < 1 / (1 + size / 100)).astype(int)
                cells[student, method, size] = synthetic.cell(student, method, size, right)
    results = Results(cells, settings, "cells")
    results.given = cells
    return results


@pytest.fixture(scope="module")
def drawings(grid):
    return {drawing.name: drawing for drawing in figures.build(grid)}


def test_all_figures_are_written_as_svg_png_and_csv_with_the_same_bytes_twice(grid, drawings, tmp_path):
    assert list(drawings) == ["figure1", "methods", "figure3", "needle_position"]
    with plotting.style():  # two of the four: drawing takes time
        again = {d.name: d for d in (figures.figure1(grid), figures.figure3(grid))}
    for drawing in drawings.values():
        first = [path.read_bytes() for path in plotting.save(drawing, tmp_path / "a")]
        if drawing.name in again:
            assert first == [p.read_bytes() for p in plotting.save(again[drawing.name], tmp_path / "b")]
        ElementTree.fromstring(first[0])
        assert b"<dc:date>" not in first[0] and b"http" not in first[0].split(b"<defs>", 1)[1]
        with Image.open(tmp_path / "a" / f"{drawing.name}.png") as image:
            assert image.width >= 1000


def test_no_letter_is_smaller_than_8_points_at_the_printed_width(drawings):
    for drawing in drawings.values():
        assert drawing.figure.get_figwidth() <= plotting.PAGE
        texts = [t for t in drawing.figure.findobj(Text) if t.get_text() and t.get_visible()]
        assert texts and min(t.get_fontsize() for t in texts) >= 8


def test_the_csv_holds_what_the_cells_hold(grid, drawings):
    for name in ("figure1", "methods", "figure3"):
        for row in drawings[name].data.to_dict("records"):
            cell = grid.given[row["student"], row["method"], int(row["images"])]
            assert float(row["accuracy"]) == pytest.approx(cell["accuracy"], abs=1e-6)
            assert [float(row["low"]), float(row["high"])] == pytest.approx(cell["interval"], abs=1e-6)
    sizes = set(drawings["figure3"].data["images"])
    assert sizes == {1, 10, 50, 100}  # as the paper draws it: no 2, no 150


def test_every_point_says_its_value_on_hover(grid, drawings, tmp_path):
    svg = plotting.save(drawings["figure1"], tmp_path)[0].read_text()
    titles = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")]
    cell = grid.given["7B", "base", 50]
    low, high = cell["interval"]
    wanted = f"7B, 50 images: {100 * cell['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"
    assert wanted in titles and len(titles) == 3 * len(SIZES)


def test_needle_positions_are_counted_as_by_hand(grid, drawings):
    cell = grid.given["7B", "kd", 10]
    wanted = {}
    for answer in cell["answers"]:
        fifth = next(f for f in range(5) if answer["needles"][0] < 10 * (f + 1) / 5)
        right, n = wanted.get(fifth, (0, 0))
        wanted[fifth] = (right + (answer["answer"] == answer["label"]), n + 1)
    data = drawings["needle_position"].data
    part = data[(data["student"] == "7B") & (data["method"] == "kd") & (data["images"] == 10)]
    found = {row.fifth - 1: (float(row.accuracy), row.answers) for row in part.itertuples()}
    assert found == {f: (pytest.approx(right / n, abs=1e-6), n) for f, (right, n) in wanted.items()}


def test_needle_positions_need_single_needles(grid):
    cells = {}
    for key, cell in grid.given.items():
        cells[key] = {**cell, "answers": [{**a, "needles": [0, 0]} for a in cell["answers"]]}
    assert figures.needle_position(Results(cells, grid.settings, "cells")) is None


def test_methods_differ_without_colour():
    looks = plotting.METHOD_LOOKS
    assert set(looks) == set(SHIPPED)
    for one, other in itertools.combinations(looks.values(), 2):
        assert one.marker != other.marker
    for one, other in itertools.combinations((looks["base"], looks["kd"], looks["laid"]), 2):
        assert one.hatch != other.hatch


def test_a_method_of_ones_own_has_a_name_and_a_look():
    settings = synthetic.config(
        more={"methods": {"mine": {"extends": "laid"}, "other": {"label": "Other (ours)"}}}
    )
    names = method_names(settings)
    assert (
        list(names)[-2:] == ["mine", "other"] and names["mine"] == "mine" and names["other"] == "Other (ours)"
    )
    looks = plotting.method_looks(names)
    assert len({look.marker for look in looks.values()}) == len(looks) == len(names)
    assert names["gone"] == "gone" and looks["gone"].color == plotting.GREY


def write_log(root, student, method, seed, lines):
    path = root / student / method / f"seed{seed}" / "log.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_training_curves_from_logs(tmp_path):
    lines = [
        {"step": s, "loss": 1 / s, "loss_kl": 2 / s, "lr": 0.1, "gain": {"mean": s / 9}}
        for s in range(1, 301)
    ]
    lines[99] |= {"validation_accuracy": 0.5, "validation_accuracy_20": 0.25}
    lines.insert(5, {"note": "a remark"})
    lines.append({"step": 300, "loss": 7.0})  # resumed: the later line of a step counts
    write_log(tmp_path, "small", "laid", 0, lines)
    write_log(tmp_path, "small", "sft", 0, [{"step": 1, "loss": 0.5}])
    (tmp_path / "small" / "sft" / "seed0" / "model").mkdir()
    logs = training_figures.load_logs(tmp_path)
    runs = logs[["student", "method", "seed"]].drop_duplicates()
    assert list(runs.itertuples(index=False, name=None)) == [("small", "laid", 0), ("small", "sft", 0)]
    parts = {part: list(run["value"]) for part, run in logs[logs["method"] == "laid"].groupby("part")}
    assert parts["loss"][:2] == [1.0, 0.5] and parts["loss"][-1] == 7.0
    assert len(parts["lr"]) == 299 and parts["gain.mean"][8] == 1.0
    training, validation, schedules = training_figures.build(logs, Names(SHIPPED))
    (axes,) = (axes for axes in validation.figure.axes if axes.lines)
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn == {"all": ([100], [0.5]), "20 images": ([100], [0.25])}
    with open(plotting.save(training, tmp_path / "out")[2]) as handle:
        rows = list(csv.DictReader(handle))
    assert {row["part"] for row in rows} == {"loss", "loss_kl"}
    assert set(schedules.data["part"]) == {"lr", "gain.mean"}
    texts = [
        t
        for d in (training, validation, schedules)
        for t in d.figure.findobj(Text)
        if t.get_text() and t.get_visible()
    ]
    assert min(t.get_fontsize() for t in texts) >= 8


def test_stretches_keep_the_mean():
    steps = np.arange(2, 401, 2)
    means = training_figures.stretches(pd.DataFrame({"step": steps, "value": steps.astype(float)}), points=10)
    assert len(means) == 10 and np.allclose(means["step"], means["value"])
    assert means["value"].mean() == pytest.approx(steps.mean())


def test_a_broken_log_is_one_clear_line(tmp_path):
    path = write_log(tmp_path, "small", "laid", 0, [{"step": 1, "loss": 1.0}])
    path.write_text(path.read_text() + '{"step": 2, "lo')
    with pytest.raises(LaidError, match=r"log.jsonl: line 2 is not valid JSON"):
        training_figures.load_logs(tmp_path)


def test_learned_gains_and_weights_are_drawn_as_they_are(tmp_path):
    rng = np.random.default_rng(1)
    log_gain, w = rng.standard_normal((3, 2, 8)) / 5, rng.random((2, 4))
    path = tmp_path / "small" / "laid" / "seed0" / "learned.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"gain.log_gain": log_gain.tolist(), "alignment.2-2.w": w.tolist()}))
    found = training_figures.load_learned(tmp_path, ["medium", "small"], "laid")
    drawing = training_figures.learned(found, "laid", "LAid")
    values = {(row.kind, row.row, row.column): float(row.value) for row in drawing.data.itertuples()}
    assert len(values) == 6 * 8 + 8
    assert values["gain", 3, 5] == pytest.approx(np.exp(log_gain[1, 1, 5]), rel=1e-5)
    assert values["mixture", 1, 2] == pytest.approx(w[1, 2], rel=1e-5)
    texts = [t for t in drawing.figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= 8
    path.write_text("[1]")
    with pytest.raises(LaidError, match="arrays of numbers"):
        training_figures.load_learned(tmp_path, ["small"], "laid")
    for nothing in ({}, {"small": {}}):
        assert training_figures.learned(nothing, "laid", "LAid") is None


def test_no_logs_no_figures(tmp_path):
    assert training_figures.build(training_figures.load_logs(tmp_path), Names(SHIPPED)) == []
