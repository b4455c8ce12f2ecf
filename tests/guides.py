"""The commands that the documents show, and those of one page as a shell reads them, one after the other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# No program is found, so bash hands the words of each command, expanded, to this function.
SHELL = "command_not_found_handle() { printf '%s\\0' \"$@\"; printf '\\0'; }\n"


def blocks(page: str | Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of a document; `page` is a path below the repository."""
    return FENCED.findall((ROOT / page).read_text(encoding="utf-8"))


def split(block: str) -> list[str]:
    """The commands of a block: comments off, continued lines joined, several on a line apart, blanks made one."""
    lines = (line.split(" # ")[0].split("  #")[0] for line in block.replace("\\\n", " ").splitlines())
    parts = (part for line in lines if line[:1] != "#" for part in re.split(r";|&&|\|", line))
    return [" ".join(part.split()) for part in parts if part.strip()]


def shell_commands(page: str | Path) -> list[str]:
    """Every command of the blocks without a language, which hold nothing else."""
    return [command for language, text in blocks(page) if not language for command in split(text)]


def walk(page: str | Path, left_out=(), stand_ins: Mapping[str, str] | None = None) -> Iterator[list[str]]:
    """The words of each command of a page, each block read by bash in the current folder when its turn comes: a pattern
    finds the files that the commands before it made, and a loop is run.

    An overlay that the page shows is written to mine.yaml at its place. left_out: commands, as `split` gives them, that
    are not read. stand_ins: text of the page -> what stands in for it.
    """
    for language, text in blocks(page):
        if not language:
            text = SHELL + "\n".join(":" if command in left_out else command for command in split(text))
        for old, new in (stand_ins or {}).items():
            text = text.replace(old, new)
        if language == "yaml" and text.startswith("scale:"):
            Path("mine.yaml").write_text(text, encoding="utf-8")
        if not language:
            read = subprocess.run(
                [shutil.which("bash"), "-euc", text],
                env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert read.returncode == 0 and not read.stderr, f"{page}: {read.stderr}"
            yield from (words.split("\0") for words in read.stdout.split("\0\0")[:-1])
