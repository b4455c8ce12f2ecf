import csv
import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import synthetic
from laid.errors import LaidError
from laid.results import curves, figures, learned, plotting, tables

SIZES = [1, 2, 10, 50, 100, 150]


@pytest.fixture(scope="module")
def grid():
    rng = np.random.default_rng(0)
    settings = synthetic.config(methods=["base", "sft", "kd", "laid"], ablations=["base", "laid"])
    settings["haystacks"]["test"]["sizes"] = SIZES
    cells = {}
    for student in ("32B", "7B", "3B"):
        for method in ["base"] if student == "32B" else settings["tables"]["methods"]:
            seeds = 1 if method == "base" else 2
            for size in SIZES:
                right = (rng.random((seeds, 60)) < 1 / (1 + size / 100)).astype(int)
                cells[student, method, size] = synthetic.cell(student, method, size, right)
    return tables.Grid(cells, settings, "cells")


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
        header, *rows = drawings[name].csv
        for row in (dict(zip(header, values, strict=True)) for values in rows):
            cell = grid.cell(row["student"], row["method"], int(row["images"]))
            assert float(row["accuracy"]) == pytest.approx(cell["accuracy"], abs=1e-6)
            assert [float(row["low"]), float(row["high"])] == pytest.approx(cell["interval"], abs=1e-6)
    sizes = {row[2] for row in drawings["figure3"].csv[1:]}
    assert sizes == {"1", "10", "50", "100"}  # as the paper draws it: no 2, no 150


def test_every_point_says_its_value_on_hover(grid, drawings, tmp_path):
    svg = plotting.save(drawings["figure1"], tmp_path)[0].read_text()
    titles = [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")]
    cell = grid.cell("7B", "base", 50)
    low, high = cell["interval"]
    wanted = f"7B, 50 images: {100 * cell['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"
    assert wanted in titles and len(titles) == 3 * len(SIZES)


def test_needle_positions_are_counted_as_by_hand(grid, drawings):
    cell = grid.cell("7B", "kd", 10)
    wanted = {}
    for answer in cell["answers"]:
        fifth = next(f for f in range(5) if answer["needles"][0] < 10 * (f + 1) / 5)
        right, n = wanted.get(fifth, (0, 0))
        wanted[fifth] = (right + (answer["answer"] == answer["label"]), n + 1)
    found = {
        int(row[3]) - 1: (float(row[5]), int(row[4]))
        for row in drawings["needle_position"].csv[1:]
        if row[:3] == ["7B", "kd", "10"]
    }
    assert found == {f: (pytest.approx(right / n, abs=1e-6), n) for f, (right, n) in wanted.items()}


def test_needle_positions_need_single_needles(grid):
    cells = {}
    for key, cell in grid.cells.items():
        cells[key] = {**cell, "answers": [{**a, "needles": [0, 0]} for a in cell["answers"]]}
    assert figures.needle_position(tables.Grid(cells, grid.config, "cells")) is None


def test_methods_differ_without_colour():
    looks = plotting.METHOD_LOOKS
    assert set(looks) == set(tables.METHOD_NAMES)
    for one, other in itertools.combinations(looks.values(), 2):
        assert one.marker != other.marker
    for one, other in itertools.combinations((looks["base"], looks["kd"], looks["laid"]), 2):
        assert one.hatch != other.hatch


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
    lines.insert(5, {"note": "a remark"})
    lines.append({"step": 300, "loss": 7.0})  # resumed: the later line of a step counts
    write_log(tmp_path, "small", "laid", 0, lines)
    write_log(tmp_path, "small", "sft", 0, [{"step": 1, "loss": 0.5}])
    (tmp_path / "small" / "sft" / "seed0" / "model").mkdir()
    logs = curves.load_logs(tmp_path)
    assert [(log.student, log.method, log.seed) for log in logs] == [
        ("small", "laid", 0),
        ("small", "sft", 0),
    ]
    assert logs[0].values["loss"][:2].tolist() == [1.0, 0.5] and logs[0].values["loss"][-1] == 7.0
    assert np.isnan(logs[0].values["lr"][-1]) and logs[0].values["gain.mean"][8] == 1.0
    training, schedules = curves.build(logs)
    with open(plotting.save(training, tmp_path / "out")[2]) as handle:
        rows = list(csv.DictReader(handle))
    assert {row["part"] for row in rows} == {"loss", "loss_kl"}
    assert {row[3] for row in schedules.csv[1:]} == {"lr", "gain.mean"}
    texts = [
        t for d in (training, schedules) for t in d.figure.findobj(Text) if t.get_text() and t.get_visible()
    ]
    assert min(t.get_fontsize() for t in texts) >= 8


def test_stretches_keep_the_mean():
    steps = np.arange(1, 401)
    values = np.where(steps % 2, np.nan, steps.astype(float))
    xs, ys = curves.stretches(steps, values, points=10)
    assert len(xs) == 10 and np.allclose(xs, ys) and ys.mean() == pytest.approx(np.nanmean(values))


def test_a_broken_log_is_one_clear_line(tmp_path):
    path = write_log(tmp_path, "small", "laid", 0, [{"step": 1, "loss": 1.0}])
    path.write_text(path.read_text() + '{"step": 2, "lo')
    with pytest.raises(LaidError, match=r"log.jsonl: line 2 is not valid JSON"):
        curves.load_logs(tmp_path)


def test_learned_gains_and_weights_are_drawn_as_they_are(tmp_path):
    rng = np.random.default_rng(1)
    log_gain, w = rng.standard_normal((3, 2, 8)) / 5, rng.random((2, 4))
    path = tmp_path / "small" / "laid" / "seed0" / "learned.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"gain.log_gain": log_gain.tolist(), "alignment.2-2.w": w.tolist(), "gain.exponent": []})
    )
    (drawing,) = learned.build(learned.load(tmp_path, ["medium", "small"]))
    values = {(row[1], int(row[2]), int(row[3])): float(row[4]) for row in drawing.csv[1:]}
    assert len(values) == 6 * 8 + 8
    assert values["gain", 3, 5] == pytest.approx(np.exp(log_gain[1, 1, 5]), rel=1e-5)
    assert values["mixture", 1, 2] == pytest.approx(w[1, 2], rel=1e-5)
    texts = [t for t in drawing.figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= 8
    path.write_text("[1]")
    with pytest.raises(LaidError, match="arrays of numbers"):
        learned.load(tmp_path, ["small"])
    assert learned.build({}) == learned.build({"small": {}}) == []


def test_no_logs_no_figures(tmp_path):
    assert curves.build(curves.load_logs(tmp_path)) == []
