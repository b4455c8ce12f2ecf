"""The answers of a cell that is not finished: kept as they come, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laid.errors import LaidError
from laid.io import dumps, sha256_json


class Kept:
    """The hidden file beside a cell that its answers lie in, one line for each batch of them, until all cells are written.

    key: all that the answers follow from. Each line has a digest of it and of the line, so that answers to other questions, of
    another model or under other settings, a line cut short and one changed by hand are told alike: from there on nothing is used.
    """

    def __init__(self, cell: Path, key: Any) -> None:
        self.file, self.key = cell.with_name(f".{cell.name}.part"), sha256_json(key)
        self.answers: list[dict[str, Any]] = []
        self.strange = False  # whether a whole line was not of this key
        end = 0
        lines = self.file.read_bytes().splitlines(keepends=True) if self.file.is_file() else []
        for line in lines:
            answers = self._read(line)
            if answers is None:
                self.strange = line.endswith(b"\n")
                break
            self.answers += answers
            end += len(line)
        if not end:
            self.remove()
        else:
            os.truncate(self.file, end)

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Keep one batch more. Raises LaidError where there is no room for it."""
        line = dumps({"answers": answers, "digest": self._digest(answers)}, indent=None) + "\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise LaidError(
                f"{self.file}: cannot be written: {error.strerror}: make room and give the same command again, which goes on from here"
            ) from None
        self.answers += answers

    def ids(self, seed: int) -> set[Any]:
        """The questions that a seed has answered."""
        return {answer["id"] for answer in self.answers if answer["seed"] == seed}

    def remove(self) -> None:
        """The cell is written."""
        self.file.unlink(missing_ok=True)

    def _read(self, line: bytes) -> list[dict[str, Any]] | None:
        try:
            found = json.loads(line)
            sound = line.endswith(b"\n") and found["digest"] == self._digest(found["answers"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return found["answers"] if sound else None

    def _digest(self, answers: Any) -> str:
        return sha256_json([self.key, answers])
