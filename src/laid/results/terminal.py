"""Tables on standard output: rich in a terminal, aligned text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from laid.results.render import Table, plain


def show(tables: Sequence[Table], footnote: str | None = None) -> None:
    """Print the tables, then a footnote."""
    if sys.stdout.isatty():
        from rich.console import Console

        from laid.results.render import rich_table

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
