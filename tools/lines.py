"""Update the line numbers of links from documents into the source: [`name`](../src/laid/file.py#L12).

    python tools/lines.py          rewrites docs/ and README.md

A link goes to the line that defines the name, or else to the line nearest to the old number that holds it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[`([^`]+)`\]\(([^)#\s]+)#L(\d+)\)")


def holds(name: str, line: str) -> bool:
    """Whether a line of source holds the last part of a dotted name, as a word."""
    last = name.removesuffix("()").split(".")[-1]
    return re.search(rf"(?<!\w){re.escape(last)}(?!\w)", line) is not None


def line_of(name: str, lines: list[str], old: int) -> int | None:
    """The line, from 1, that a link to `name` leads to; None where no line holds it."""
    last = re.escape(name.removesuffix("()").split(".")[-1])
    found = [at for at, line in enumerate(lines, 1) if holds(name, line)]
    defined = [at for at in found if re.match(rf"\s*(?:def |class |rule )?{last}\s*[(:=\[]", lines[at - 1])]
    return min(defined or found, key=lambda at: abs(at - old), default=None)


def renumber(document: Path) -> list[str]:
    """Rewrite a document's links; returns those whose name is no longer in the file."""
    lost = []

    def fresh(link: re.Match[str]) -> str:
        name, path, old = link.groups()
        file = document.parent / path
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        line = line_of(name, lines, int(old))
        if line is None:
            lost.append(f"{document.relative_to(ROOT)}: {path} does not hold {name}")
        return f"[`{name}`]({path}#L{line or old})"

    text = document.read_text(encoding="utf-8")
    if (changed := LINK.sub(fresh, text)) != text:
        document.write_text(changed, encoding="utf-8")
    return lost


def main() -> int:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    lost = [line for document in documents for line in renumber(document)]
    print("\n".join(lost), end="\n" if lost else "", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
