import csv
import io
import math
import sys

import pandas as pd
import pytest
from rich.console import Console

import synthetic
from laid.errors import LaidError
from laid.evaluation.cells import write_cell
from laid.io import write_json
from laid.results import published, render, tables
from laid.results.answers import Results, answers_frame, save_answers
from laid.results.statistics import mean_relative_gain


@pytest.fixture(scope="module")
def paper():
    """The paper's printed accuracies as cells: two decimals of a percent need 10,000 answers."""
    curves = {**published.curves("table3"), **published.curves("table1")}
    for method in ("laid_wo_kl", "laid_wo_laid"):  # Table 3 has no 150; repeat its 100, which no test reads
        curves["7B", method] = {**curves["7B", method], 150: curves["7B", method][100]}
    return synthetic.grid_of(curves, 10000)


@pytest.fixture(scope="module")
def built(paper):
    return {t.name: t for t in tables.build(Results(paper, synthetic.config(), "cells"))}


def csv_rows(table):
    return list(csv.DictReader(io.StringIO(render.csv_text(table))))


def test_table1_has_the_papers_columns_and_accuracies(built):
    ours, theirs = csv_rows(built["table1"]), published.rows("table1")
    assert list(ours[0]) == list(theirs[0])
    assert len(ours) == len(theirs) == 11
    for row, printed in zip(ours, theirs):
        assert row["params"] == printed["params"]
        assert row["method"] == published.METHODS[printed["method"]]
        for size in ("1", "5", "10", "20", "50", "100", "150"):
            assert row[size] == f"{float(printed[size]):.2f}"


def test_table1_has_the_papers_gains_but_for_the_three_that_it_misprints(built):
    printed = {
        (row["params"], published.METHODS[row["method"]]): (
            float(row["short_gain_pct"]),
            float(row["long_gain_pct"]),
        )
        for row in published.rows("table1")
        if row["short_gain_pct"]
    }
    off = {}
    for row in csv_rows(built["table1"]):
        key = (row["params"], row["method"])
        if row["method"] == "base":
            assert row["short_gain_pct"] == row["long_gain_pct"] == ""
            continue
        for which, value in zip(("short", "long"), printed[key], strict=True):
            ours = float(row[f"{which}_gain_pct"])
            if abs(ours - value) > 0.1:
                off[*key, which] = (value, ours)
    assert len(printed) * 2 == 16
    assert off == {
        ("7B", "yarn", "short"): (-2.5, pytest.approx(-2.35, abs=0.01)),
        ("7B", "sft", "long"): (3.6, pytest.approx(2.82, abs=0.01)),
        ("3B", "sft", "short"): (31.5, pytest.approx(31.78, abs=0.01)),
    }


def test_table3_has_the_papers_columns_and_short_gains_follow_from_its_columns(built):
    ours, theirs = csv_rows(built["table3"]), published.rows("table3")
    assert list(ours[0]) == list(theirs[0])
    assert [r["method"] for r in ours] == ["base", "laid_wo_kl", "laid_wo_laid", "laid"]
    for row, printed in zip(ours[1:], theirs[1:]):
        assert [row[s] for s in ("1", "5", "10", "20", "50")] == [
            f"{float(printed[s]):.2f}" for s in ("1", "5", "10", "20", "50")
        ]
        assert float(row["short_gain_pct"]) == pytest.approx(float(printed["short_gain_pct"]), abs=0.1)
    # Its base row prints Table 1's 150 under 100; the cells hold Table 1's, so the long gain differs, as it must.
    assert theirs[0]["100"] == "47.43" and ours[0]["100"] == "51.08"


def test_gain_by_hand():
    assert mean_relative_gain([0.9, 0.6], [0.6, 0.6]) == pytest.approx(25.0)
    assert mean_relative_gain([0.5], [0.0]) is None
    assert mean_relative_gain([], []) is None


def test_table2_prints_tokens_and_positions(built):
    rows = csv_rows(built["table2"])
    assert list(rows[0]) == ["images", "avg_tokens", "avg_positions"]
    assert rows[0] == {"images": "1", "avg_tokens": "390.00", "avg_positions": "64.00"}
    assert rows[-1] == {"images": "150", "avg_tokens": "52540.00", "avg_positions": "3640.00"}


def test_best_and_second_best_are_marked_within_each_student(built):
    table = built["table1"]
    column = table.header.index("20")
    marks = [(row[0].text, row[1].text, row[column].mark) for row in table.rows if row[column].mark]
    assert marks == [
        ("7B", "SFT", "best"),
        ("7B", "LAid", "second"),
        ("3B", "SFT", "best"),
        ("3B", "LAid", "second"),
    ]
    text = render.markdown(table)
    assert "**84.73**\\* [84.0, 85.4]" in text and "_74.09_\\*" in text
    lines = render.plain(table).splitlines()
    assert lines[2].split()[:3] == ["Model", "Method", "1"] and "84.73*\u00b9" in lines[9]
    assert lines[2].index("150") + 3 == lines[4].index("60.65") + 5  # right-aligned under its column


def test_equal_values_share_their_mark():
    cells = synthetic.grid_of(
        {
            (s, m): {1: a, 50: a}
            for s in ("32B", "7B", "3B")
            for m, a in (("base", 0.5), ("laid", 0.75), ("sft", 0.75))
        },
        4,
    )
    settings = synthetic.config(methods=["base", "laid", "sft"], ablations=["base", "laid"], sizes=[1, 50])
    table = tables.table1(Results(cells, settings, "cells"))
    assert [row[2].mark for row in table.rows] == ["", *(["second", "best", "best"] * 2)]


def test_a_method_of_ones_own_is_a_row_by_its_label_or_its_name():
    mine = {"mine": {"extends": "laid", "label": "Mine"}, "plain": {"extends": "mine"}}
    names = ["base", "laid", "mine", "plain"]
    settings = synthetic.config(methods=names, ablations=["base"], sizes=[1, 50], more={"methods": mine})
    curves = {(s, m): {1: 0.75, 50: 0.5} for s in ("7B", "3B") for m in names}
    cells = synthetic.grid_of({("32B", "base"): {1: 1.0, 50: 1.0}, **curves}, 4)
    table = tables.table1(Results(cells, settings, "cells"))
    assert [row[1].text for row in table.rows] == ["base", *(["base", "LAid", "Mine", "plain"] * 2)]
    assert list(table.data["method"]) == ["base", *(names * 2)]


def test_windows_are_read_off_the_curve(built):
    window = {(row[0].text, row[1].text): row[-1].text for row in built["table1"].rows}
    # 7B base: 80.22 at 1, 68.45 at 5: 5 ** ((80.22 - 80) / (80.22 - 68.45)) = 1.03 images.
    assert window["7B", "base"] == "1.03"
    # 7B LAid: 80.46 at 10, 74.09 at 20: 10 * 2 ** (0.46 / 6.37) = 10.5 images, 10.2 times base's.
    assert window["7B", "LAid"] == "10.5 (10.2x)"
    assert window["7B", "SelfExtend"].startswith("< 1")


def test_columns_follow_the_configuration():
    cells = synthetic.grid_of({(s, "base"): {1: 1.0, 2: 1.0, 7: 0.5} for s in ("32B", "7B", "3B")}, 4)
    settings = synthetic.config(methods=["base"], ablations=["base"], sizes=[7, 2, 1])
    built = tables.build(Results(cells, settings, "cells"))
    assert [str(name) for name in built[0].data] == [
        "params",
        "method",
        "1",
        "7",
        "short_gain_pct",
        "long_gain_pct",
    ]
    assert built[1].data["images"].tolist() == [1, 7]
    with pytest.raises(LaidError, match="leaves none"):
        tables.build(Results(cells, settings.changed({"tables": {"omit": [1, 2, 7]}}), "cells"))


def test_a_missing_cell_names_its_file_and_the_command(paper, tmp_path):
    some = {key: cell for key, cell in paper.items() if key not in (("7B", "laid", 50), ("3B", "sft", 1))}
    with pytest.raises(LaidError) as error:
        Results(some, synthetic.config(), tmp_path / "cells")
    path = tmp_path / "cells" / "7B" / "laid" / "50.json"
    assert str(error.value).startswith(f"{path}: no such cell (and 1 more cells)")
    assert str(error.value).endswith(f"snakemake --cores all {path}")


@pytest.mark.parametrize("keys", [{"methods": ["laid", "base"]}, {"table3_student": "9B"}])
def test_wrong_settings_are_one_clear_line(paper, keys):
    with pytest.raises(LaidError, match=r"^configuration: tables\.[^\n]*$"):
        Results(paper, synthetic.config(**keys), "cells")


def test_files_are_written_whole_and_the_same_twice(built, tmp_path):
    paths = render.write(list(built.values()), tmp_path)
    assert [p.name for p in paths] == [f"table{i}.{s}" for i in (1, 2, 3) for s in ("csv", "md")]
    before = [p.read_bytes() for p in paths]
    render.write(list(built.values()), tmp_path)
    assert [p.read_bytes() for p in paths] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)


def test_the_answers_can_be_taken_away(paper, tmp_path, monkeypatch):
    some = {key: cell for key, cell in paper.items() if key[2] == 1 and key[0] == "32B"}
    frame = answers_frame(some, "test")
    save_answers(frame, tmp_path / "answers.csv")
    read = pd.read_csv(tmp_path / "answers.csv", dtype={"question": str})
    assert len(read) == 10000 and read["correct"].mean() == pytest.approx(0.8379)
    assert list(read) == [
        "suite", "scale", "student", "params", "role", "method", "size", "tokens_mean", "positions_mean", "seed", "question",
        "label", "answer", "correct", "p_yes", "needles",
    ]  # fmt: skip
    assert ((read["answer"] == read["label"]) == read["correct"]).all() and set(read["suite"]) == {"test"}
    with pytest.raises(LaidError, match="answers are written as .parquet or .csv"):
        save_answers(frame, tmp_path / "answers.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LaidError, match="Parquet needs pyarrow"):
        save_answers(frame, tmp_path / "answers.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]


def test_answers_as_parquet(paper, tmp_path):
    pytest.importorskip("pyarrow")
    frame = answers_frame({key: cell for key, cell in paper.items() if key[2] == 5 and key[0] == "32B"})
    save_answers(frame, tmp_path / "answers.parquet")
    read = pd.read_parquet(tmp_path / "answers.parquet")
    assert read["needles"].map(list).tolist() == frame["needles"].tolist()
    assert read["correct"].tolist() == frame["correct"].tolist()


def test_the_verb_prints_and_writes(tmp_path, capsys):
    from laid.cli import main

    (tmp_path / "config.yaml").write_text(
        "models: {teacher: big, students: [s]}\n"
        "haystacks: {test: {sizes: [1, 50]}}\n"
        "methods: {laid: {}}\ntables: {methods: [base, laid], ablations: [base, laid]}\n"
    )
    curves = {
        ("big", "base"): {1: 1.0, 50: 1.0},
        ("s", "base"): {1: 1.0, 50: 0.5},
        ("s", "laid"): {1: 1.0, 50: 0.75},
    }
    for (student, method, size), cell in synthetic.grid_of(curves, 8).items():
        write_cell(tmp_path / "cells/test" / student / method / f"{size}.json", cell)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--cells", str(tmp_path / "cells")]
    assert main(["tables", *arguments, "--out", str(tmp_path / "tables")]) == 0
    printed = capsys.readouterr().out
    assert "Table 1." in printed and "+50.00" in printed and "\x1b" not in printed
    assert (tmp_path / "tables" / "table1.csv").read_text() == (
        "params,method,1,50,short_gain_pct,long_gain_pct\n"
        "big,base,100.00,100.00,,\ns,base,100.00,50.00,,\ns,laid,100.00,75.00,0.00,50.00\n"
    )
    assert "shortcut" not in printed
    scores = {
        name: {"accuracy": {"always_yes": 0.5, "target_anywhere": accuracy}, "sizes": [1, size]}
        for name, accuracy, size in (
            ("train.json", 0.9, 20),
            ("test/visual_haystack_1.json", 1.0, 1),
            ("test/visual_haystack_2.json", 0.61, 2),
            ("test/visual_haystack_50.json", 0.5, 50),
        )
    }
    write_json(tmp_path / "haystacks" / "shortcuts.json", {"format": "laid-shortcuts/1", "files": scores})
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "tables").iterdir()}
    assert (
        main(
            [
                "tables",
                *arguments,
                "--out",
                str(tmp_path / "tables"),
                "--all",
                "--answers",
                str(tmp_path / "a.csv"),
            ]
        )
        == 0
    )
    assert len(pd.read_csv(tmp_path / "a.csv")) == 3 * 2 * 8
    printed = capsys.readouterr().out
    assert (
        "(%): always yes 50.0; target in any image 50.0 to 61.0." in printed
        and "Effective windows in tokens" in printed
    )
    # Nothing changed, so nothing was written: the workflow has nothing to do afterwards.
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "tables").iterdir()} == before
    (tmp_path / "cells/test" / "s" / "laid" / "50.json").unlink()
    assert main(["tables", *arguments, "--out", str(tmp_path / "tables")]) == 2
    assert "s/laid/50.json: no such cell; make it with: snakemake" in capsys.readouterr().err


def test_larger_haystacks_have_a_table_and_windows_go_on_over_them(tmp_path, capsys):
    """LAid is above 0.8 at the largest test size: its window ends where the sizes beyond cross it, base's as before."""
    from laid.cli import main

    (tmp_path / "config.yaml").write_text(
        "models: {teacher: big, students: [s]}\n"
        "haystacks: {test: {sizes: [1, 50]}}\nbeyond: {table: true, sizes: [400, 200]}\n"
        "methods: {laid: {}, laid_wo_kl: {extends: laid}}\n"
        "tables: {methods: [base, laid], ablations: [base, laid_wo_kl, laid]}\n"
    )
    near = {
        ("big", "base"): {1: 1.0, 50: 1.0}, ("s", "base"): {1: 0.9, 50: 0.7}, ("s", "laid"): {1: 1.0, 50: 0.9},
        ("s", "laid_wo_kl"): {1: 1.0, 50: 0.9},
    }  # fmt: skip
    far = {
        ("big", "base"): {200: 0.9, 400: 0.8},
        ("s", "base"): {200: 0.5, 400: 0.5},
        ("s", "laid"): {200: 0.7, 400: 0.5},
    }
    for suite, curves, n in (("test", near, 10), ("beyond", far, 20)):
        for (student, method, size), cell in synthetic.grid_of(curves, n).items():
            write_cell(tmp_path / "cells" / suite / student / method / f"{size}.json", cell)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--cells", str(tmp_path / "cells")]
    assert main(["tables", *arguments, "--out", str(tmp_path / "tables")]) == 0
    assert (tmp_path / "tables/table1_beyond.csv").read_text() == (
        "params,method,200,400,long_gain_pct\nbig,base,90.00,80.00,\ns,base,50.00,50.00,\ns,laid,70.00,50.00,20.00\n"
    )
    text = (tmp_path / "tables/table1_beyond.md").read_text()
    assert "20 questions per cell" in text and "Window" not in text
    rows = csv.DictReader((tmp_path / "tables/windows.csv").open())
    found = {(r["student"], r["method"]): r for r in rows if r["threshold"] == "0.8"}
    ends = {model: (float(r["images_low"]), float(r["images_high"])) for model, r in found.items()}
    assert ends["s", "base"] == pytest.approx((50**0.5, 50**0.5), abs=1e-3)
    assert ends["s", "laid"] == pytest.approx((100, 100), abs=1e-3)  # halfway from 50 to 200, in logs
    assert ends["big", "base"] == (400, math.inf) and ends["s", "laid_wo_kl"] == (50, math.inf)
    assert float(found["s", "laid"]["ratio_low"]) == pytest.approx(100 / 50**0.5, abs=1e-3)
    # Tokens as the teacher reads them: 40 and 350 an image.
    assert float(found["s", "laid"]["tokens_low"]) == pytest.approx(40 + 350 * 100, abs=1)
    assert "in the rows of Table 1 on through 200, 400;" in (tmp_path / "tables/table1.md").read_text()
    capsys.readouterr()
    (tmp_path / "cells/beyond/s/laid/400.json").unlink()
    assert main(["tables", *arguments, "--out", str(tmp_path / "tables")]) == 2
    assert "cells/beyond/s/laid/400.json: no such cell" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 60, 200])
def test_a_narrow_terminal_gets_parts_with_every_number_whole(built, width):
    table = built["table1"]
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(
        render.rich_table(table, width)
    )
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "\u2026" not in out.getvalue()
    shown = [line for line in lines if line.startswith("\u2502")]
    parts = len(render.column_parts(table, width))
    assert len(shown) == parts * len(table.rows) and (parts == 1) == (width == 200)
    for r, row in enumerate(table.rows):
        told = [
            cell.strip()
            for part in range(parts)
            for cell in shown[part * len(table.rows) + r].split("\u2502")[1:-1]
        ]
        names = [entry.text for entry in row[:2]]
        assert [text for text in told if text not in names] == [entry.text + entry.stars for entry in row[2:]]


def test_sft_says_whether_it_trains_an_adapter():
    from laid.results.names import method_names
    from laid.settings import Settings

    plain, adapter = ({"lambda_sft": 1.0}, {"lora": {"rank": 8}})
    assert method_names(Settings.of({"methods": {"sft": plain}}))["sft"] == "SFT"
    assert method_names(Settings.of({"methods": {"sft": adapter}}))["sft"] == "SFT (LoRA)"
