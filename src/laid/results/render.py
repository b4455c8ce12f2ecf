"""One table, three faces: Markdown, aligned plain text, rich in a terminal; and its CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import Any

BEST, SECOND = "best", "second"


@dataclass(frozen=True)
class Entry:
    """One printed value: the text, what follows it (an interval, shown in Markdown only), stars, and its rank."""

    text: str
    detail: str = ""
    stars: str = ""
    mark: str = ""
    cell: str = ""  # <student>/<method>/<size> of the cell it stands for


@dataclass
class Table:
    """A table with its data: `csv` rows (header first) hold plain numbers, `rows` what a reader sees."""

    name: str
    title: str
    header: list[str]
    rows: list[list[Entry]]
    csv: list[list[str]]
    notes: list[str] = field(default_factory=list)
    breaks: set[int] = field(default_factory=set)  # rows before which a new block begins
    names: int = 2  # leading columns that hold names, set to the left
    legend: str = ""  # what `detail` is; with it in Markdown only


def csv_text(table: Table) -> str:
    """The table's data as CSV with Unix line ends."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(table.csv)
    return out.getvalue()


def markdown(table: Table) -> str:
    """GitHub Markdown: best bold, second best italic, intervals in brackets."""
    lines = [f"## {table.title}", ""]
    lines.append("| " + " | ".join(table.header) + " |")
    lines.append("|" + "|".join("---" if i < table.names else "--:" for i in range(len(table.header))) + "|")
    for row in table.rows:
        lines.append("| " + " | ".join(_markdown_entry(entry) for entry in row) + " |")
    notes = [*table.notes[:1], *([table.legend] if table.legend else []), *table.notes[1:]]
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _markdown_entry(entry: Entry) -> str:
    text = entry.text.replace("|", "\\|").replace("<", "&lt;")
    quotes = {BEST: "**", SECOND: "_"}.get(entry.mark, "")
    # An escaped star stays a star beside the ones that mean bold.
    stars = entry.stars.replace("*", "\\*")
    detail = f" {entry.detail}" if entry.detail else ""
    return f"{quotes}{text}{quotes}{stars}{detail}" if text else ""


def plain(table: Table) -> str:
    """Aligned columns for pipes and logs; the best and second best of a block carry a raised 1 and 2."""
    ranks = {BEST: "\u00b9", SECOND: "\u00b2"}
    body = [[e.text + e.stars + ranks.get(e.mark, "") for e in row] for row in table.rows]
    widths = [max(len(row[i]) for row in [table.header, *body]) for i in range(len(table.header))]

    def line(row: list[str]) -> str:
        cells = (
            text.ljust(w) if i < table.names else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [table.title, "", line(table.header), rule]
    for i, row in enumerate(body):
        if i and i in table.breaks:
            lines.append(rule)
        lines.append(line(row))
    lines += ["", *table.notes]
    if any(e.mark for row in table.rows for e in row):
        lines.append("\u00b9 best, \u00b2 second best of its block.")
    return "\n".join(lines) + "\n"


def rich_table(table: Table, width: int) -> Any:
    """The same as a rich renderable `width` characters wide; rich is imported only here.

    A table that is wider stands below itself in parts, each with the names, so that no number is cut.
    """
    from rich.console import Group
    from rich.text import Text

    parts = [_rich_part(table, columns, i == 0) for i, columns in enumerate(column_parts(table, width))]
    notes = [Text(note, style="dim") for note in table.notes]
    if any(e.mark for row in table.rows for e in row):
        notes.append(
            Text.assemble(
                ("bold green", "bold green"), " best, ", ("underlined", "underline"), " second best"
            )
        )
    return Group(*parts, *notes, Text(""))


def column_parts(table: Table, width: int) -> list[list[int]]:
    """Columns of the parts that a frame of `width` characters holds; every part begins with the names."""
    # A frame adds three characters a column, and one.
    widths = [
        3 + max(len(row[i].text + row[i].stars) for row in [[Entry(h) for h in table.header], *table.rows])
        for i in range(len(table.header))
    ]
    names = list(range(table.names))
    parts: list[list[int]] = [[]]
    for i in range(table.names, len(widths)):
        if parts[-1] and 1 + sum(widths[j] for j in [*names, *parts[-1], i]) > width:
            parts.append([])
        parts[-1].append(i)
    return [names + part for part in parts]


def _rich_part(table: Table, columns: list[int], titled: bool) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    title = table.title if titled else None
    out = RichTable(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i in columns:
        # Where even one column does not fit beside the names, they give way.
        out.add_column(
            table.header[i], justify="left" if i < table.names else "right", no_wrap=i >= table.names
        )
    styles = {BEST: "bold green", SECOND: "underline"}
    for i, row in enumerate(table.rows):
        out.add_row(*(Text(row[c].text + row[c].stars, style=styles.get(row[c].mark, "")) for c in columns))
        if i + 1 in table.breaks:
            out.add_section()
    return out
