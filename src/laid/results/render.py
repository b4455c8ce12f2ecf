"""One table, four faces: CSV, Markdown, HTML, and text on a terminal or in a pipe."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laid.io import update

if TYPE_CHECKING:
    import pandas as pd

BEST, SECOND = "best", "second"


@dataclass(frozen=True)
class Entry:
    """One printed value: the text, what follows it (an interval; not in a terminal), stars, and its rank."""

    text: str
    detail: str = ""
    stars: str = ""
    mark: str = ""
    cell: str = ""  # <student>/<method>/<size> of the cell it stands for


@dataclass
class Table:
    """What a reader sees, `rows` below `header`, and in `data` the plain numbers of the CSV file.

    Without data, the CSV file holds the rows as they are printed.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[Entry]]
    notes: list[str] = field(default_factory=list)
    breaks: set[int] = field(default_factory=set)  # rows before which a new block begins
    names: int = 2  # leading columns that hold names, set to the left
    legend: str = ""  # what `detail` is; not in a terminal
    data: pd.DataFrame | None = None

    def explained(self) -> list[str]:
        """The notes with the legend among them."""
        return [*self.notes[:1], *([self.legend] if self.legend else []), *self.notes[1:]]

    @property
    def marked(self) -> bool:
        return any(entry.mark for row in self.rows for entry in row)


def write(tables: Sequence[Table], out: str | Path) -> list[Path]:
    """Write each table as <name>.csv and <name>.md below `out`, where they changed; returns the paths."""
    paths = []
    for table in tables:
        for suffix, text in (("csv", csv_text(table)), ("md", markdown(table))):
            paths.append(Path(out) / f"{table.name}.{suffix}")
            update(paths[-1], text)
    return paths


def show(tables: Sequence[Table], footnote: str | None = None) -> None:
    """Print the tables, then a footnote: rich in a terminal, aligned text in a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        for table in tables:
            console.print(rich_table(table, console.width))
        if footnote:
            console.print(footnote, highlight=False, markup=False)
        return
    # A pipe in a locale without raised figures gets a question mark, not a traceback.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    print("\n".join(plain(table) for table in tables))
    if footnote:
        print(footnote)


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """As 67.0 or 67.0 [61.5, 72.1]; value and interval are fractions."""
    text = f"{100 * value:z.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:z.1f}, {100 * interval[1]:z.1f}]"


def points(values: Sequence[float], stars: str = "") -> Entry:
    """A difference with its interval, (value, low, high) as fractions: +3.1 [+1.0, +5.2]."""
    value, low, high = (f"{100 * v:+.1f}" for v in values)
    return Entry(value, f"[{low}, {high}]", stars)


def listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) if sizes else "none"


# ------------------------------------------------------------------ files


def csv_text(table: Table) -> str:
    """The table's data as CSV with Unix line ends."""
    data = table.data
    if data is None:
        import pandas as pd

        rows = [[f"{e.text} {e.detail}".strip() for e in row] for row in table.rows]
        data = pd.DataFrame(rows, columns=table.header)
    return data.to_csv(index=False, lineterminator="\n")


def markdown(table: Table) -> str:
    """GitHub Markdown: best bold, second best italic, intervals in brackets."""
    rows = [[_markdown_entry(entry) for entry in row] for row in table.rows]
    notes = [f"- {note}" for note in table.explained()]
    return "\n".join([f"## {table.title}", "", *pipes(table.header, rows, table.names), "", *notes]) + "\n"


def pipes(header: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """The lines of a GitHub table whose first `names` columns are set to the left, the others to the right."""
    rule = "|" + "|".join("---" if i < names else "--:" for i in range(len(header))) + "|"
    head, *body = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return [head, rule, *body]


def _markdown_entry(entry: Entry) -> str:
    text = entry.text.replace("|", "\\|").replace("<", "&lt;")
    quotes = {BEST: "**", SECOND: "_"}.get(entry.mark, "")
    # An escaped star stays a star beside the ones that mean bold.
    stars = entry.stars.replace("*", "\\*")
    detail = f" {entry.detail}" if entry.detail else ""
    return f"{quotes}{text}{quotes}{stars}{detail}" if text else ""


def table_html(table: Table) -> str:
    """A sortable table of the results page; entries with a cell become buttons that open its chain."""
    head = "".join(
        f'<th scope="col"{_name_class(table, i)}>{html.escape(t)}</th>' for i, t in enumerate(table.header)
    )
    rows = []
    for r, row in enumerate(table.rows):
        cells = "".join(f"<td{_name_class(table, i, row)}>{_html_entry(e)}</td>" for i, e in enumerate(row))
        first = ' class="first"' if r and r in table.breaks else ""
        rows.append(f"<tr{first}>{cells}</tr>")
    notes = [
        *table.explained(),
        *(["Bold: best of its block; underlined: second best."] if table.marked else []),
    ]
    two = ' class="two"' if table.names == 2 else ""
    return (
        f'<h3 id="{table.name}">{html.escape(table.title)}</h3>\n<div class="scroll" tabindex="0" role="region"'
        f' aria-labelledby="{table.name}"><table{two}><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + '\n</tbody></table></div>\n<ul class="notes">'
        + "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        + "</ul>"
    )


def _name_class(table: Table, column: int, row: Sequence[Entry] = ()) -> str:
    if column >= table.names:
        return ""
    # On a phone the first column gives way, and the second shows its text above its own.
    model = f' data-model="{html.escape(row[0].text)}"' if row and table.names == 2 and column == 1 else ""
    return f' class="name"{model}'


def _html_entry(entry: Entry) -> str:
    text = html.escape(entry.text + entry.stars)
    if entry.mark:
        text = f'<span class="{entry.mark}">{text}</span>'
    if entry.cell:
        text = (
            f'<button data-cell="{html.escape(entry.cell)}" title="Show where it comes from">{text}</button>'
        )
    return text + (f'<span class="detail">{html.escape(entry.detail)}</span>' if entry.detail else "")


# ------------------------------------------------------------------ terminals


def plain(table: Table) -> str:
    """Aligned columns for pipes and logs; the best and second best of a block carry a raised 1 and 2."""
    ranks = {BEST: "\u00b9", SECOND: "\u00b2"}
    body = [[e.text + e.stars + ranks.get(e.mark, "") for e in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.header, *body, strict=True)]

    def line(row: list[str]) -> str:
        cells = (
            text.ljust(width) if i < table.names else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [table.title, "", line(table.header), rule]
    for i, row in enumerate(body):
        lines += [rule, line(row)] if i and i in table.breaks else [line(row)]
    lines += ["", *table.notes]
    if table.marked:
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
    if table.marked:
        bold, underlined = ("bold green", "bold green"), ("underlined", "underline")
        notes.append(Text.assemble(bold, " best, ", underlined, " second best"))
    return Group(*parts, *notes, Text(""))


def column_parts(table: Table, width: int) -> list[list[int]]:
    """Columns of the parts that a frame of `width` characters holds; every part begins with the names."""
    # A frame adds three characters a column, and one.
    texts = [table.header, *([e.text + e.stars for e in row] for row in table.rows)]
    widths = [3 + max(map(len, column)) for column in zip(*texts, strict=True)]
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
        named = i < table.names
        out.add_column(table.header[i], justify="left" if named else "right", no_wrap=not named)
    styles = {BEST: "bold green", SECOND: "underline"}
    for i, row in enumerate(table.rows):
        out.add_row(*(Text(row[c].text + row[c].stars, style=styles.get(row[c].mark, "")) for c in columns))
        if i + 1 in table.breaks:
            out.add_section()
    return out
