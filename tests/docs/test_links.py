"""Links of the documents lead somewhere, anchors included, and so do the documents that code and settings name."""

import importlib.util
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "bench").glob("*.md")),
]
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ +(.+)$", FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    broken = []
    for target in LINK.findall(FENCED.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):  # the web, a mail address
            continue
        path, _, anchor = unquote(target).partition("#")
        there = (document.parent / path).resolve() if path else document
        found = there.exists() and there.is_relative_to(ROOT)
        if not found or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_the_index_lists_every_document():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target).resolve() for target in LINK.findall(index)}
    assert not {path for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md"} - linked


def test_documents_that_code_names_exist():
    """`docs/...` in comments, messages, settings and tests; a path behind `git show` belongs to that commit."""
    asked = ["git", "grep", "-n", "--untracked", "-E", r"docs/[a-z_/]+\.(md|png)"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    missing = []
    for line in found:
        for before, name in re.findall(r"(^|.)\b(docs/[a-z_/]+\.(?:md|png))", line.split(":", 2)[2]):
            if before not in (":", "/") and not (ROOT / name).is_file():
                missing.append(line)
    assert not missing


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_readme_s_table_follows_from_the_results():
    """tools/readme.py draws it from docs/results.md; neither is edited by hand."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools/readme.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shown = tool.between(tool.README.read_text(encoding="utf-8"), "results")[0]
    assert shown.strip() == tool.short(tool.RESULTS.read_text(encoding="utf-8")).strip()
