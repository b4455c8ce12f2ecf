import html.parser
import json
import re

import chromium
import numpy as np
import pytest

import synthetic
from laid.cli import main
from laid.errors import LaidError
from laid.evaluation.cells import write_cell
from laid.io import write_json
from laid.results import report

SIZES = [1, 20, 150]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small scale with cells, a run record, figures, claims and the page, all made by the verbs."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "config.yaml").write_text(
        f"scale: test\nresults: {folder}\nmodels: {{teacher: big, students: [mid, tiny]}}\n"
        f"haystacks: {{test: {{sizes: {SIZES}}}}}\n"
        "tables: {methods: [base, sft, laid], ablations: [base, laid]}\n"
        "methods: {sft: {}, laid: {distance: {strength: 4.0}}}\n"
    )
    root = folder / "test"
    rng = np.random.default_rng(0)
    for student, method, reach in (
        ("big", "base", 900), ("mid", "base", 40), ("mid", "sft", 60), ("mid", "laid", 400),
        ("tiny", "base", 20), ("tiny", "sft", 30), ("tiny", "laid", 200),
    ):  # fmt: skip
        for size in SIZES:
            right = (rng.random((1, 40)) < 1 / (1 + size / reach)).astype(int)
            data = {"model": "a" * 64, "questions": "b" * 64, "annotations_val2017": "c" * 64}
            if method not in ("base",):
                data["run_seed0"] = "e" * 64
            provenance = {**synthetic.PROVENANCE, "data": data, "settings": {"note": "</script><b>bold</b>"}}
            cell = synthetic.cell(student, method, size, right, provenance=provenance)
            write_cell(root / "cells/test" / student / method / f"{size}.json", cell)
    write_json(root / "runs" / "mid" / "laid" / "seed0" / "run.json", {"config": "f" * 64, "steps": 1500})
    flags = ["--config", str(folder / "config.yaml")]
    for verb in ("figures", "claims", "report"):
        assert main([verb, *flags]) == 0
    return root


@pytest.fixture(scope="module")
def page(root):
    return (root / "report.html").read_text()


EMPTY = {"meta", "br", "path", "use", "image", "rect", "circle"}


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes and ids, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tags(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader.tags


def test_the_page_needs_nothing_outside_itself(page, tags):
    for tag, attributes in tags:
        for name in ("src", "href", "xlink:href", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    style = re.search(r"<style>.*?</style>", page, re.DOTALL)[0]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page


def test_ids_are_unique_and_references_lead_somewhere(page, tags):
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {
        a[name][1:] for _, a in tags for name in ("href", "xlink:href") if a.get(name, "").startswith("#")
    }
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(ids)


def test_every_cell_of_tables_1_and_3_leads_to_its_chain(page, tags, root):
    data = report.read_page_data(page)
    keys = [
        attributes["data-cell"] for tag, attributes in tags if tag == "button" and "data-cell" in attributes
    ]
    assert (
        set(keys) == set(data["cells"]) and len(keys) == 7 * 3 + 2 * 2
    )  # Table 1, and 1 and 20 images of Table 3
    cell = data["cells"]["mid/laid/20"]
    assert cell["title"] == "mid, LAid, 20 images"
    assert cell["command"] == f"snakemake --cores all {root}/cells/test/mid/laid/20.json"
    stored = json.loads((root / "cells/test" / "mid" / "laid" / "20.json").read_text())
    assert f"{100 * stored['accuracy']:.2f} %" in cell["facts"][0][1]
    hashes = {name: value for step in cell["chain"] for name, value in step["hashes"]}
    assert (
        hashes["questions"] == "b" * 64 and hashes["run_seed0"] == "e" * 64 and hashes["settings"] == "c" * 64
    )
    run = next(step for step in cell["chain"] if step["what"] == "Trained with laid, seed0")
    assert json.loads(data["records"][run["details"]])["steps"] == 1500
    evaluation = next(step for step in cell["chain"] if step["what"] == "Evaluation")
    assert (
        "</script>" in data["records"][evaluation["details"]]
    )  # carried whole, yet it did not end the script


def test_right_by_label_adds_up(page):
    data = report.read_page_data(page)
    facts = dict(map(tuple, data["cells"]["tiny/base/150"]["facts"]))
    yes, no = (float(facts[f"Right where {label} is right"].split()[0]) for label in ("yes", "no"))
    assert (yes + no) / 2 == pytest.approx(float(facts["Accuracy"].split()[0]), abs=0.1)


def test_figures_keep_their_order_and_captions(page):
    titles = re.findall(r'<h3 id="figure-(\w+)">', page)
    assert titles == ["figure1", "methods", "figure3", "needle_position", "distance_schedule"]
    assert page.count("<figcaption>") == 5 and "<metadata>" not in page


def test_the_same_inputs_give_the_same_bytes_and_an_unchanged_page_keeps_its_time(root, page):
    before = (root / "report.html").stat().st_mtime_ns
    assert main(["report", "--config", str(root.parent / "config.yaml")]) == 0
    assert (root / "report.html").stat().st_mtime_ns == before


def test_missing_or_foreign_inputs_are_one_clear_line(root, tmp_path, capsys):
    config = ["--config", str(root.parent / "config.yaml"), "--out", str(tmp_path / "report.html")]
    write_json(tmp_path / "claims.json", {"format": "other"})
    assert main(["report", *config, "--claims", str(tmp_path / "claims.json")]) == 2
    assert "not a file of `laid claims`" in capsys.readouterr().err
    write_json(tmp_path / "captions.json", [{"name": "figure9", "title": "t", "caption": "c"}])
    assert main(["report", *config, "--figures", str(tmp_path)]) == 2
    assert "figure9.svg: named in captions.json, but not there" in capsys.readouterr().err
    write_json(tmp_path / "captions.json", [{"name": "../figure9", "title": "t", "caption": "c"}])
    assert main(["report", *config, "--figures", str(tmp_path)]) == 2
    assert "leaves its folder" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(LaidError, match="carries no cells"):
        report.read_page_data("<html></html>")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    opened = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_in_a_browser(root, browser, width):
    browser.open(root / "report.html", width)
    assert browser.run("innerWidth") == width
    # A phone's page would grow beyond the screen with its widest element; nothing may stick out but inside a scroller.
    assert browser.run("document.documentElement.scrollWidth") == width
    wide = (
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && "
        "e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert browser.run(wide) == []
    column = "[...document.querySelector('#table1 + .scroll tbody').rows].map((r) => parseFloat(r.cells[4].textContent))"
    click = "document.querySelector('#table1 + .scroll table').tHead.rows[0].cells[4].click()"
    printed = browser.run(column)
    orders = [browser.run(f"{click}, {column}") for _ in range(3)]
    assert orders == [sorted(printed, reverse=True), sorted(printed), printed] and printed != sorted(printed)
    browser.run("document.querySelector('button[data-cell=\"mid/laid/150\"]').click()")
    shown = browser.run("document.getElementById('chain').open && document.getElementById('chain').innerText")
    assert "mid, LAid, 150 images" in shown and "e" * 64 in shown
    assert (
        browser.run("document.querySelectorAll('#chain-body b').length") == 0
    )  # a record is shown, never run
    box = browser.run(
        "(({left, right}) => [left, right])(document.getElementById('chain').getBoundingClientRect())"
    )
    assert 0 <= box[0] and box[1] <= width
    browser.run("document.getElementById('chain').close()")
    tap = (
        "(() => { const tip = document.querySelector('svg .tip'); tip.dispatchEvent(new MouseEvent('click', "
        "{bubbles: true, clientX: innerWidth - 2, clientY: 90})); const b = document.getElementById('bubble'); "
        "return [b.textContent, tip.querySelector('title').textContent, b.getBoundingClientRect().right]; })()"
    )
    bubble, title, right = browser.run(tap)
    assert (
        bubble == title and re.fullmatch(r"big, 1 images: [\d.]+ \[[\d., ]+\] %", bubble) and right <= width
    )


def test_nothing_is_loaded_and_nothing_complains(root, browser):
    browser.open(root / "report.html", 1280)
    assert browser.complaints() == []
    assert all(url.startswith(("file://", "data:")) for url in browser.requests())
    assert sum(url.startswith("file://") for url in set(browser.requests())) == 1  # the page itself
