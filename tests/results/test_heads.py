"""Figure 4 and the spectra on attention that was constructed, so that the answer is known."""

import numpy as np
import pytest
import scipy.stats
from matplotlib.text import Text

from laid.errors import LaidError
from laid.io import write_json
from laid.results import heads, plotting
from laid.results.names import SHIPPED, Names

SIZES = [1, 2, 5, 10, 20, 50, 100, 150]
ROWS = ["anchor", "target", "last"]
NAMES = Names(SHIPPED)


def softmax_share(logit, images):
    """The needle's share where its key scores `logit` and every other image's key 0, one key an image."""
    scores = np.zeros(images)
    scores[images // 2] = logit
    weights = np.exp(scores)
    return weights[images // 2] / weights.sum()


def record(name, methods, frequencies=8, cut=100.0):
    """A record of `laid analyse`; methods[name][layer][head] is (row, share over sizes), even elsewhere and else."""
    even = np.array([[1 / size] * len(ROWS) for size in SIZES])
    found = {}
    for method, layers in methods.items():
        share = np.repeat(
            np.repeat(even[:, None, None], len(layers), axis=1), len(layers[0]), axis=2
        )  # (sizes, layers, heads, rows)
        for layer, line in enumerate(layers):
            for head, entry in enumerate(line):
                if entry is not None:
                    share[:, layer, head, ROWS.index(entry[0])] = [entry[1](size) for size in SIZES]
        c = np.zeros((len(layers), len(layers[0]), frequencies), dtype=complex)
        c[..., 1], c[..., 5] = 3, 4j  # energies 9 and 16 of 25
        found[method] = {
            "needles": {"share": share.tolist(), "uniform": even.tolist()},
            "spectrum": {
                "wavelengths": [4.0 * 2**f for f in range(frequencies)],
                "real": c.real.tolist(),
                "imaginary": c.imag.tolist(),
                "share": 0.64,
                "interval": [0.6, 0.7],
                "cut": cut,
                "size": 100,
            },
        }
    layers = next(iter(methods.values()))
    return {
        "format": heads.FORMAT, "student": name, "sizes": SIZES, "rows": ROWS, "layers": len(layers),
        "heads": len(layers[0]), "questions": {"5": 20}, "methods": found,
    }  # fmt: skip


def loud(size):
    return softmax_share(np.log(2000), size)


def quiet(size):
    return softmax_share(np.log(9), size)


def test_constructed_heads_get_their_kind_and_their_row():
    # One key scores so high that 149 others take next to nothing from it; one that they drown; one like all others.
    made = record("T", {"base": [[("target", loud), ("anchor", quiet), None]]})
    curves = heads.head_curves(made, "base")
    assert list(curves["kind"]) == ["global", "local", "other"]
    assert list(curves["row"])[:2] == ["target", "anchor"]
    heads_found = curves.to_dict("records")
    for curve, wanted in zip(heads_found, (loud, quiet, lambda size: 1 / size), strict=True):
        assert curve["images"] == SIZES[1:]  # one image has no haystack
        share = [wanted(size) for size in SIZES[1:]]
        assert curve["share"] == pytest.approx(share)
        fit = scipy.stats.linregress(np.log(SIZES[1:]), np.log(share))
        assert curve["slope"] == pytest.approx(fit.slope)
        assert curve["lift"] == pytest.approx(scipy.stats.gmean(np.array(share) * SIZES[1:]))
    assert heads_found[2]["lift"] == pytest.approx(1) and heads_found[2]["slope"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("power", "kind"),
    [(0.3, "global"), (0, "global"), (-0.249, "global"), (-0.251, "local"), (-0.6, "local")],
)
def test_the_slope_parts_global_from_local(power, kind):
    made = record("T", {"base": [[("last", lambda size: 0.9 * size**power)]]})
    (curve,) = heads.head_curves(made, "base").to_dict("records")
    assert curve["slope"] == pytest.approx(power) and curve["kind"] == kind


@pytest.mark.parametrize(("times", "kind"), [(2.001, "local"), (1.999, "other")])
def test_a_needle_head_sees_twice_an_even_share(times, kind):
    made = record("T", {"base": [[("last", lambda size: times / size)]]})
    (curve,) = heads.head_curves(made, "base").to_dict("records")
    assert curve["kind"] == kind


@pytest.fixture(scope="module")
def records():
    eight = [
        ("last", lambda size, i=i: 0.5 + i / 100) for i in range(8)
    ]  # all global, the last ones strongest
    return {
        "T": record("T", {"base": [eight, [None] * 8]}),
        "S": record(
            "S", {"laid": [[("last", loud), None]], "base": [[("last", quiet), None]]}
        ),  # in any order
    }


@pytest.fixture(scope="module")
def drawings(records):
    return {d.name: d for d in heads.build(records, "T", ["S", "not analysed"], NAMES)}


def test_figure_4_draws_the_strongest_heads_before_and_after_and_its_data_hold_all(drawings):
    figure4 = drawings["figure4"]
    assert len(figure4.data) == (16 + 2 + 2) * len(SIZES[1:])
    teacher, student = figure4.figure.axes
    named = [line.get_label() for line in teacher.lines if not line.get_label().startswith("_")]
    assert named == ["0.5 global", "0.6 global", "0.7 global"]
    lines = {line.get_label(): line for line in student.lines}
    before, after = lines["0.0 local"], lines["0.0 global, LAid"]
    assert before.get_color() == after.get_color()  # the same head
    assert before.get_markerfacecolor() == "white" != after.get_markerfacecolor()
    assert after.get_ydata() == pytest.approx([100 * loud(size) for size in SIZES[1:]])


def test_the_spectrum_is_that_of_the_coefficients(drawings, records):
    energy = heads.mean_spectrum(records["S"]["methods"]["laid"]["spectrum"])
    assert energy == pytest.approx([0, 9 / 25, 0, 0, 0, 16 / 25, 0, 0])
    left = drawings["spectrum"].figure.axes[0]
    curve = next(line for line in left.lines if line.get_label() == "LAid")
    assert curve.get_ydata() == pytest.approx([0, 36, 36, 36, 36, 100, 100, 100])
    labels = left.get_legend_handles_labels()[1]
    assert labels == ["teacher", "base", "LAid"]


def test_scores_over_distance_are_the_series(drawings):
    rows = drawings["distance"].data.to_dict("records")
    near = [r for r in rows if r["student"] == "S" and r["method"] == "laid" and float(r["difference"]) <= 3]
    assert near
    for row in near:  # bins of one difference each
        d = float(row["difference"])
        wanted = 3 * np.cos(2 * np.pi * d / 8) - 4 * np.sin(2 * np.pi * d / 128)
        assert float(row["score"]) == pytest.approx(wanted, abs=1e-5)


def test_no_letter_is_smaller_than_8_points(drawings):
    for drawing in drawings.values():
        drawing.figure.canvas.draw()
        texts = [t for t in drawing.figure.findobj(Text) if t.get_text() and t.get_visible()]
        assert min(t.get_fontsize() for t in texts) >= plotting.FONT
        # Mathematics sets what is raised or lowered smaller than the rest.
        assert not [t.get_text() for t in texts if "$" in t.get_text()]


def test_records_are_found_by_their_format_and_place(tmp_path, records):
    write_json(tmp_path / "T.json", records["T"])
    write_json(tmp_path / "T.cost.json", {"seconds": 1})
    write_json(tmp_path / "other.json", {"format": "other"})
    assert list(heads.load(tmp_path)) == ["T"]
    write_json(tmp_path / "S.json", records["T"])
    with pytest.raises(LaidError, match="S.json: holds the record of 'T'"):
        heads.load(tmp_path)


def test_without_the_teacher_or_a_student_nothing_is_drawn(records):
    assert heads.build({"S": records["S"]}, "T", ["S"], NAMES) == []
    assert heads.build({"T": records["T"]}, "T", ["S"], NAMES) == []
