"""Which cells the tables need. The workflow asks this whenever it is parsed, so it imports next to nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from laid.settings.tune import tuned_students, variants

if TYPE_CHECKING:
    from laid.settings import Settings

Key = tuple[str, str, int]  # (student, method, size)


def needed(settings: Settings) -> Iterator[Key]:
    """(student, method, size) of every cell that Tables 1 to 3 read, each once."""
    tables, seen = settings.tables, set()
    blocks = [(settings.models.teacher, ["base"])]
    blocks += [(student, tables.methods) for student in settings.models.students]
    blocks.append((table3_student(settings), tables.ablations))
    for student, methods in blocks:
        for method in methods:
            for size in sorted(settings.haystacks.test.sizes):
                if (student, method, size) not in seen:
                    seen.add((student, method, size))
                    yield student, method, size


def needed_by_tune(settings: Settings) -> Iterator[Key]:
    """(student, method, size) of every validation cell that the table of tuning reads, base first."""
    for student in tuned_students(settings):
        for method in ["base", *variants(settings.tune.methods)]:
            for size in sorted(settings.haystacks.validation.sizes):
                yield student, method, size


def needed_beyond(settings: Settings) -> Iterator[Key]:
    """The same of the suite `beyond`: the rows of Table 1 at the sizes of beyond.sizes, where beyond.table asks for them."""
    blocks = [(settings.models.teacher, ["base"])]
    blocks += [(student, settings.tables.methods) for student in settings.models.students]
    for student, methods in blocks if settings.beyond.table else ():
        for method in methods:
            for size in sorted(settings.beyond.sizes):
                yield student, method, size


def table3_student(settings: Settings) -> str:
    """The student of Table 3."""
    return settings.models.students[0 if settings.tables.table3_student == "first" else -1]


def missing_cells(folder: Path, missing: Sequence[Key]) -> str:
    """One line that names the first missing cell, counts the rest, and gives the command."""
    student, method, size = missing[0]
    path = folder / student / method / f"{size}.json"
    more = f" (and {len(missing) - 1} more cells)" if len(missing) > 1 else ""
    return f"{path}: no such cell{more}; make it with: snakemake --cores all {path}"
