"""Files, modules, tests and lines of source that the documents name are there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "bench/GPU.md"]
FILE = re.compile(
    r"(?<![\w/.])((?:src/laid|tests|tools|bench|configs|slurm|workflow|envs)/[\w/.-]+\.\w+)(?:::(\w+))?"
)
MODULE = re.compile(r"`laid((?:\.\w+)+)`")


def tool(name: str):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_of(dotted: str) -> bool:
    """Whether `.package.module.name` is a module of laid, or a name that one defines."""
    place, parts = ROOT / "src/laid", dotted.strip(".").split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if not parts:
        return True
    file = place / f"{parts[0]}.py"
    if file.is_file():
        parts.pop(0)
    else:
        file = place / "__init__.py"
    text = file.read_text(encoding="utf-8")
    return all(re.search(rf"^\s*(?:def |class )?{part}\b", text, re.MULTILINE) for part in parts)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_modules_and_tests_exist(document):
    text = document.read_text(encoding="utf-8")
    named = [found for found in FILE.findall(text) if not found[0].endswith("/mine.yaml")]  # the reader's own
    missing = [name for name, _ in named if not (ROOT / name).exists()]
    for name, test in named:
        if test and name not in missing and f"def {test}(" not in (ROOT / name).read_text(encoding="utf-8"):
            missing.append(f"{name}::{test}")
    missing += [f"laid{name}" for name in MODULE.findall(text) if name != ".json" and not source_of(name)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_lines_show_what_they_name(document):
    """[`name`](file#L12): line 12 of the file holds the name; `python tools/lines.py` updates the numbers."""
    stale = []
    for name, path, line in tool("lines").LINK.findall(document.read_text(encoding="utf-8")):
        lines = (document.parent / path).read_text(encoding="utf-8").splitlines()
        if int(line) > len(lines) or not tool("lines").holds(name, lines[int(line) - 1]):
            stale.append(f"{path}#L{line}: {name}")
    assert not stale, "python tools/lines.py updates the numbers"
