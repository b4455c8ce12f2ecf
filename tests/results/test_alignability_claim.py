"""Table, figure and claim of `laid alignability` from records whose numbers are known."""

import pytest
from matplotlib.text import Text

from laid.io import write_json
from laid.results import alignability, claim_tests, plotting
from laid.results.answers import Curves
from laid.results.claim_tests import NOT, NOT_MEASURED, SUPPORTED, UNDECIDED
from laid.results.render import markdown


class Models(Curves):
    """As much of a source as the test reads."""

    teacher, students = "T", ["M", "S"]


def part(share, spread=0.01):
    return {"share": share, "interval": [share - spread, share + spread], "heads": [share]}


def record(name, real, spread=0.01, defined=True):
    """Three pairs of layers; equation 7 explains real[side][pair], the others a little more each."""
    pairs = []
    for at, (layer, teacher_layer, same_depth) in enumerate([(0, 0, True), (0, 3, False), (1, 3, True)]):
        sides = {
            side: {
                "constant": part(0.7),
                "real": part(real[side][at], spread) if defined else None,
                "complex": part(real[side][at] + 0.05) if defined else None,
                "linear": part(real[side][at] + 0.1),
            }
            for side in ("queries", "keys")
        }
        pairs.append({"layer": layer, "teacher_layer": teacher_layer, "same_depth": same_depth, **sides})
    return {
        "format": alignability.FORMAT, "student": name, "layers": 2, "teacher_layers": 4, "ridge": 1e-6,
        "questions": {"fitted": 120, "held_out": 119}, "pairs": pairs,
        "tokens": {"fitted": {"queries": 4000, "keys": 1200}, "held_out": {"queries": 1, "keys": 1}},
    }  # fmt: skip


LOW = {"queries": [0.02, -0.0001, 0.01], "keys": [0.0, 0.01, 0.03]}
HIGH = {"queries": [0.6, 0.3, 0.1], "keys": [0.2, 0.1, 0.8]}


def test_the_table_shows_every_pair_in_percent():
    lines = markdown(alignability.table(record("S", LOW))).splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == 6
    assert (
        rows[0]
        == "| 0 : 0 | queries | 70.0 [69.0, 71.0] | 2.0 [1.0, 3.0] | 7.0 [6.0, 8.0] | 12.0 [11.0, 13.0] |"
    )
    assert rows[2].startswith("| 0 : 3 | queries | 70.0 [69.0, 71.0] | 0.0 [-1.0, 1.0] |")  # not "-0.0"
    notes = "\n".join(lines)
    assert (
        "119 held-out questions" in notes
        and "4,000 queries, 1,200 keys" in notes
        and "not defined" not in notes
    )
    other = markdown(alignability.table(record("S", LOW, defined=False)))
    assert (
        "| 0 : 0 | keys | 70.0 [69.0, 71.0] | - | - | 10.0 [9.0, 11.0] |" in other and "not defined" in other
    )


def test_the_figure_draws_three_shares_over_layers_and_its_data_hold_the_constant():
    records = {"M": record("M", HIGH), "S": record("S", LOW, defined=False)}
    drawing = alignability.figure(records)
    assert drawing.name == "alignability"
    above, beside, below, _ = drawing.figure.axes
    lines = {line.get_label(): line for line in above.lines}
    assert list(lines["equation 7"].get_xdata()) == [0, 1]  # the named pair is drawn beside the line
    assert lines["equation 7"].get_ydata() == pytest.approx([60, 10])
    assert lines["any linear map"].get_ydata() == pytest.approx([70, 20])
    assert {line.get_label(): line for line in below.lines}[
        "complex per frequency"
    ].get_ydata() == pytest.approx([25, 85])
    hollow = [line for line in above.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in hollow] == pytest.approx([30, 35, 40])
    assert [n for n in beside.get_legend_handles_labels()[1]] == ["any linear map"]
    data = drawing.data
    assert len(data) == 3 * 2 * (4 + 2)
    assert set(data[data.mixture == "constant"].share) == {"0.700000"}
    drawing.figure.canvas.draw()
    texts = [t for t in drawing.figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= plotting.FONT


@pytest.mark.parametrize(
    ("small", "spread", "verdict"),
    [(HIGH, 0.01, SUPPORTED), (LOW, 0.01, NOT), (HIGH, 0.15, UNDECIDED)],
)
def test_the_claim_asks_the_best_layer_of_every_student(tmp_path, small, spread, verdict):
    write_json(tmp_path / "alignability/M.json", record("M", HIGH))
    write_json(tmp_path / "alignability/S.json", record("S", small, spread))
    outcome = claim_tests.alignable(Models(), 50, tmp_path)
    assert outcome.verdict == verdict
    assert [s.value for s in outcome.statements[:2]] == pytest.approx([60, 80])
    assert outcome.statements[1].what == "M keys explained by equation 7, layer 1"
    assert [s.value for s in outcome.statements[2:]] == pytest.approx(
        [100 * max(small["queries"]), 100 * max(small["keys"])]
    )
    assert outcome.remarks[1] == (
        "M keys, last layer to last layer, as in the paper: equation 7 80.0 %, complex per frequency 85.0 %,"
        " any linear map 90.0 %"
    )


def test_the_claim_without_a_record_or_without_heads_of_one_width(tmp_path):
    assert claim_tests.alignable(Models(), 50, tmp_path).verdict == NOT_MEASURED
    assert claim_tests.alignable(Models(), 50, None).verdict == NOT_MEASURED
    write_json(tmp_path / "alignability/S.json", record("S", LOW, defined=False))
    outcome = claim_tests.alignable(Models(), 50, tmp_path)
    assert outcome.verdict == NOT_MEASURED
    assert outcome.remarks[0].endswith("as in the paper: any linear map 11.0 %")
