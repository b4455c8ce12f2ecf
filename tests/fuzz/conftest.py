"""The sound files that are broken, and the table of what came out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from harness import COUNTS

SETTINGS = {
    "scale": "fuzz",
    "haystacks": {
        "train": {"questions": 4, "min_size": 2, "max_size": 3},
        "validation": {"questions": 2, "sizes": [1]},
        "test": {"questions": 4, "sizes": [2]},
    },
    "beyond": {"sizes": [3], "table": False},
}


class Outside:
    """A folder with a small COCO, a configuration that names it, and questions about its images."""

    def __init__(self, folder: Path):
        from laid.cli import main
        from laid.toy.render import render

        self.folder, self.coco, self.config = folder, folder / "coco", folder / "fuzz.yaml"
        render(self.coco, train=24, val=12, seed=2, canvas=28)
        self.settings = SETTINGS | {"data": {"source": "local", "root": str(self.coco)}}
        self.config.write_text(yaml.safe_dump(self.settings))
        words = ["--config", str(self.config), "--coco", str(self.coco), "--out", str(folder / "questions")]
        assert main(["haystacks", *words]) == 0
        self.questions = json.loads((folder / "questions/test/visual_haystack_2.json").read_text())


@pytest.fixture(scope="session")
def outside(tmp_path_factory) -> Outside:
    return Outside(tmp_path_factory.mktemp("outside"))


@pytest.fixture(autouse=True)
def counted(record_property):
    """What the runs of a test came to, for the table."""
    before = Counter(COUNTS)
    yield
    record_property("fuzz", [[*key, runs] for key, runs in (COUNTS - before).items()])


def pytest_terminal_summary(terminalreporter):
    runs: Counter[tuple[str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, found in (
                getattr(report, "user_properties", ()) if getattr(report, "when", "") == "teardown" else ()
            ):
                for kind, what, count in found if name == "fuzz" else ():
                    runs[kind, what] += count
    if runs:
        terminalreporter.section("files as nobody meant them")
        terminalreporter.write_line(f"{'':40} {'runs':>7} {'read':>7} {'refused':>7}")
        for kind in sorted({kind for kind, _ in runs}):
            read, refused = runs[kind, "read"], runs[kind, "refused"]
            terminalreporter.write_line(f"{kind:40} {read + refused:7} {read:7} {refused:7}")
