"""Three training seeds through every verb that prints: what is said of them is right everywhere."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import synthetic
from laid.cli import main
from laid.evaluation.cells import read_cell, write_cell
from laid.io import write_json

SIZES = [1, 20, 150]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base, yarn (one answer each), sft whose seeds agree, laid whose seeds lie far apart."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "config.yaml").write_text(
        f"scale: test\nseeds: 3\nresults: {folder}\nmodels: {{teacher: big, students: [tiny]}}\n"
        f"haystacks: {{test: {{sizes: {SIZES}}}}}\n"
        "methods: {sft: {}, laid: {}}\ntables: {methods: [base, yarn, sft, laid], ablations: [base, laid]}\n"
    )
    for student, method, shares in (
        ("big", "base", [0.9]), ("tiny", "base", [0.5]), ("tiny", "yarn", [0.8]),
        ("tiny", "sft", [0.8, 0.8, 0.8]), ("tiny", "laid", [0.5, 0.7, 1.0]),
    ):  # fmt: skip
        cells = folder / "test/cells/test" / student / method
        for k, size in enumerate(SIZES):
            luck = np.random.default_rng([7, k]).permutation(100)  # the same questions are hard for all
            right = np.stack([(luck < 100 * share).astype(int) for share in shares])
            write_cell(cells / f"{size}.json", synthetic.cell(student, method, size, right))
        hardware = {"cores": 2, "cpu": "Test", "memory_bytes": 2**33, "gpus": []}
        write_json(cells / "cost.json", {"hardware": hardware})
    for verb in ("tables", "figures", "claims", "report"):
        assert main([verb, "--config", str(folder / "config.yaml")]) == 0
    return folder / "test"


def test_accuracy_is_the_mean_and_its_interval_is_students(root):
    cell = read_cell(root / "cells/test/tiny/laid/20.json")
    assert cell["seeds"] == [0, 1, 2] and cell["accuracy"] == pytest.approx((0.5 + 0.7 + 1) / 3)
    # Nearly all of the error is the seeds'; what the questions add makes it a little wider, and 1 is the end.
    low, high = scipy.stats.t.interval(0.95, 2, 0.73333, scipy.stats.sem([0.5, 0.7, 1.0]))
    assert high > 1 and cell["interval"][1] == 1
    assert low - 0.06 < cell["interval"][0] < low


def test_stars_stand_for_the_seeds_that_agree_and_not_for_those_that_do_not(root):
    rows = [
        line for line in (root / "tables/table1.md").read_text().splitlines() if line.startswith("| tiny")
    ]
    starred = {line.split("|")[2].strip(): line.count("\\*") for line in rows}
    # All three sizes and both gains for what gains 30 points with every seed, or with one answer a question.
    assert starred == {"base": 0, "YaRN": 5, "SFT": 5, "LAid": 0}


def test_every_text_says_three_seeds(root):
    for name in ("table1", "table2", "table3", "tests", "windows", "window_ratios", "window_tokens"):
        text = (root / f"tables/{name}.md").read_text()
        assert "3 training seeds per trained method" in text and "One training seed" not in text, name
    note = "paired bootstrap over questions and seeds (McNemar's exact test on the same questions where neither was trained)"
    assert note in (root / "tables/table1.md").read_text()
    page = (root / "report.html").read_text()
    captions = json.loads((root / "figures/captions.json").read_text())
    of_cells = [
        c["caption"] for c in captions if c["name"] in ("figure1", "methods", "figure3", "needle_position")
    ]
    assert len(of_cells) == 4 and all("3 training seeds per trained method" in text for text in of_cells)
    assert "300 (100 questions, seeds 0, 1, 2)" in page and "1 training seed" not in page


def test_a_claim_about_a_trained_model_knows_that_seeds_differ(root):
    claims = {
        c["id"]: c["results"]["test"] for c in json.loads((root / "claims/claims.json").read_text())["claims"]
    }
    # 23 points above base in the mean, in both windows, but one seed of three is no better: open.
    assert claims["both_windows_laid"]["verdict"] == "undecided"
    assert [s["value"] > 0 for s in claims["both_windows_laid"]["statements"]] == [True, True]
    assert claims["shrinkage"]["verdict"] == "undecided"  # accuracy is level here


def test_the_windows_of_several_seeds_are_those_of_the_mean_curve(root):
    with open(root / "tables/windows.csv") as handle:
        rows = {(r["method"], r["threshold"]): r for r in csv.DictReader(handle) if r["student"] == "tiny"}
    assert rows["laid", "0.7"]["images_low"] == "150.0000" and rows["laid", "0.8"]["images_high"] == "1.0000"
    assert rows["laid", "0.7"]["ci_low"] == "0.0000"  # a seed that starts at 0.5 is among them


def test_the_readme_names_command_commit_and_machine(root, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools/readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "docs/img").mkdir(parents=True)
    for name in ("README.md", "docs/results.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "README", tmp_path / "README.md")
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "docs/results.md")
    (root / "figures/distance_schedule.png").touch()  # drawn where the configuration has a distance schedule
    assert tool.main(root) == 0
    text = (tmp_path / "docs/results.md").read_text()
    made = "Made by `snakemake --cores all --config seeds=3` at commit `000000000000`, on 2 cores of Test, 8 GiB, no GPU;"
    assert made in text and (tmp_path / "docs/img/figure1.png").stat().st_size > 1000
    section = re.search("<!-- laid:results -->(.*?)<!-- /laid:results -->", text, re.DOTALL)[1]
    assert section.count("3 training seeds per trained method") == 3 and "1 training seed" not in section
    assert "| scale test |" in re.search("<!-- laid:claims -->(.*?)<!-- /laid:claims -->", text, re.DOTALL)[1]
    # The README's row of LAid: the mean over 1 and 20 images, and 150 alone, each (0.5 + 0.7 + 1) / 3.
    assert "| tiny | LAid | 73.3 | 73.3 | &lt; 1 (unknown) |" in (tmp_path / "README.md").read_text()
    assert tool.main(tmp_path / "none") == 2
