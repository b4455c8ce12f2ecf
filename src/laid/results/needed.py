"""Which cells the tables need. The workflow asks this whenever it is parsed, so it imports next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from laid.errors import LaidError


def table3_students(config: dict[str, Any]) -> list[str]:
    """Students of Table 3. Raises LaidError for a name that is no student."""
    chosen = config["tables"]["table3_students"]
    students = list(config["models"]["students"])
    if chosen is None:
        return students[:1]
    for name in chosen:
        if name not in students:
            raise LaidError(
                f"tables.table3_students: {name!r} is not a student; students: {', '.join(students)}"
            )
    return list(chosen)


def needed(config: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(student, method, size) of every cell that the tables read, each once."""
    settings, seen = config["tables"], set()
    for key in ("methods", "ablations"):
        if settings[key][0] != "base":
            raise LaidError(
                f"tables.{key}: starts with {settings[key][0]!r}; base must come first, gains are against it"
            )
    blocks = [(config["models"]["teacher"], ["base"])]
    blocks += [(student, settings["methods"]) for student in config["models"]["students"]]
    blocks += [(student, settings["ablations"]) for student in table3_students(config)]
    for student, methods in blocks:
        for method in methods:
            for size in sorted(config["haystacks"]["test"]["sizes"]):
                if (student, method, size) not in seen:
                    seen.add((student, method, size))
                    yield student, method, size
