"""One results page that opens offline: tables, figures, claims, and the chain behind every cell."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laid.errors import LaidError
from laid.io import dumps, read_json, safe_join
from laid.results import tables as table_module
from laid.results.chains import chain_data
from laid.results.claims import verdict_text
from laid.results.render import Entry, Table
from laid.results.tables import Grid

PAGE = Path(__file__).with_name("page")
WIDE = 400  # points: figures wider than this keep a readable width on a phone and scroll


def build(
    grid: Grid, figures: Path | None, claims: Path | None, root: Path, footnote: str | None = None
) -> str:
    """The page as HTML text, without any reference outside itself.

    figures: folder of `laid figures` (captions.json and SVGs); claims: claims.json of `laid claims`; both may be None.
    root: <results>/<scale>, where run and model records lie. Raises LaidError where a given input is missing or broken.
    """
    found = _read_claims(claims) if claims else None
    sections = [("tables", "Tables", _tables(table_module.build(grid), footnote))]
    if found:
        sections.append(("claims", "Claims", _claims(found)))
    if figures:
        sections.append(("figures", "Figures", _figures(figures)))
    statistics = table_module.build_statistics(grid)
    sections.append(("statistics", "Tests and windows", _tables(statistics)))
    sections.append(("provenance", "Provenance", _provenance(grid)))
    title = f"LAid: results at scale {grid.config['scale']}"
    lead = (
        f"Long-window anchoring distillation (Zhou et al., AAAI 2026), measured by this project. {grid.questions_note()}"
        " Every number in Tables 1 and 3 opens the chain behind it; headings sort; points in figures show their values."
    )
    parts = {
        "title": html.escape(title),
        "lead": html.escape(lead),
        "nav": " ".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text, _ in sections),
        "sections": "\n".join(
            f'<section id="{name}">\n<h2>{html.escape(text)}</h2>\n{body}\n</section>'
            for name, text, body in sections
        ),
        "footer": "<p>Made by <code>laid report</code> from cells alone; nothing in it was typed by hand.</p>",
        # "</" inside a script element would end it
        "cells": dumps(chain_data(grid, root), indent=None).replace("</", "<\\/"),
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "js": (PAGE / "page.js").read_text(encoding="utf-8"),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


# ------------------------------------------------------------------ tables


def _tables(tables: Sequence[Table], footnote: str | None = None) -> str:
    body = "\n".join(table_html(table) for table in tables)
    return body + (f'\n<p class="notes">{html.escape(footnote)}</p>' if footnote else "")


def table_html(table: Table) -> str:
    """A sortable table; entries with a cell become buttons that open its chain."""
    head = "".join(
        f'<th scope="col"{_name_class(table, i)}>{html.escape(text)}</th>'
        for i, text in enumerate(table.header)
    )
    rows = []
    for r, row in enumerate(table.rows):
        cells = "".join(
            f"<td{_name_class(table, i, row)}>{_entry(entry)}</td>" for i, entry in enumerate(row)
        )
        first = ' class="first"' if r and r in table.breaks else ""
        rows.append(f"<tr{first}>{cells}</tr>")
    notes = [*table.notes[:1], *([table.legend] if table.legend else []), *table.notes[1:]]
    if any(entry.mark for row in table.rows for entry in row):
        notes.append("Bold: best of its block; underlined: second best.")
    two = ' class="two"' if table.names == 2 else ""
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<h3 id="{table.name}">{html.escape(table.title)}</h3>\n<div class="scroll" tabindex="0" role="region"'
        f' aria-labelledby="{table.name}"><table{two}><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + f'\n</tbody></table></div>\n<ul class="notes">{listed}</ul>'
    )


def _name_class(table: Table, column: int, row: Sequence[Entry] = ()) -> str:
    if column >= table.names:
        return ""
    # On a phone the first column gives way, and the second shows its text above its own.
    model = f' data-model="{html.escape(row[0].text)}"' if row and table.names == 2 and column == 1 else ""
    return f' class="name"{model}'


def _entry(entry: Entry) -> str:
    text = html.escape(entry.text + entry.stars)
    if entry.mark:
        text = f'<span class="{entry.mark}">{text}</span>'
    if entry.cell:
        text = (
            f'<button data-cell="{html.escape(entry.cell)}" title="Show where it comes from">{text}</button>'
        )
    detail = f'<span class="detail">{html.escape(entry.detail)}</span>' if entry.detail else ""
    return text + detail


# ------------------------------------------------------------------ claims


def _read_claims(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != "laid-claims/1":
        raise LaidError(f"{path}: not a file of `laid claims`; make it again")
    return found


def _claims(found: dict[str, Any]) -> str:
    parts = [
        "<p>What the paper says, held against its own printed tables and against the cells of this scale.</p>"
    ]
    for claim in found["claims"]:
        badges = "".join(
            f"<span>{html.escape(source)} {_badge(claim['results'][source]['verdict'])}</span>"
            for source in found["sources"]
        )
        parts.append(
            f'<details id="claim-{html.escape(claim["id"])}"><summary><span class="title">{html.escape(claim["title"])}'
            f"</span>{badges}</summary><p>{html.escape(claim['claim'])} <em>({html.escape(claim['where'])})</em></p>"
            f"<p>Test: {html.escape(claim['how'])}</p>"
        )
        for source in found["sources"]:
            result = claim["results"][source]
            lines = [f"{s['text']}: {s['verdict']}" for s in result["statements"]] + result["remarks"]
            items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            parts.append(
                f"<p><strong>{html.escape(source)}: {html.escape(verdict_text(result))}</strong></p><ul>{items}</ul>"
            )
        parts.append("</details>")
    return "\n".join(parts)


def _badge(verdict: str) -> str:
    return f'<span class="verdict {verdict.replace(" ", "-")}">{html.escape(verdict)}</span>'


# ------------------------------------------------------------------ figures


def _figures(folder: Path) -> str:
    parts = []
    for entry in read_json(folder / "captions.json"):
        name, title, caption = (entry[key] for key in ("name", "title", "caption"))
        path = safe_join(folder, f"{name}.svg")
        if not path.is_file():
            raise LaidError(f"{path}: named in captions.json, but not there; run `laid figures` again")
        drawing = inline_svg(path.read_text(encoding="utf-8"), name)
        width = re.search(r'<svg[^>]*\bviewBox="0 0 ([\d.]+)', drawing)
        kind = "page" if width and float(width[1]) > WIDE else "column"
        parts.append(
            f'<h3 id="figure-{name}">{html.escape(title)}</h3>\n<figure class="{kind}"><div class="scroll" tabindex="0"'
            f' role="region" aria-labelledby="figure-{name}">{drawing}</div>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "\n".join(parts)


def inline_svg(svg: str, prefix: str) -> str:
    """An SVG file as an element for a page: no prolog, no metadata, ids and references made unique by `prefix`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", svg)
    return re.sub(r'<svg([^>]*?) width="[^"]*" height="[^"]*"', r'<svg\1 role="img"', svg, count=1).strip()


# ------------------------------------------------------------------ provenance


def _provenance(grid: Grid) -> str:
    """Which code, libraries and configuration stand behind the cells, with how many cells each."""
    counts: dict[str, dict[str, int]] = {"Code": {}, "Libraries": {}}
    for key in grid.models:
        for size in grid.sizes:
            provenance = grid.cell(*key, size)["provenance"]
            code = provenance["code"]
            state = " with changes" if code.get("dirty") else ""
            text = f"version {code.get('version')}, commit {code.get('commit')}{state}"
            libraries = ", ".join(
                f"{name} {version}" for name, version in provenance["libraries"].items() if version
            )
            for kind, value in (("Code", text), ("Libraries", libraries)):
                counts[kind][value] = counts[kind].get(value, 0) + 1
    rows = [
        f'<tr><td class="name">{kind}</td><td class="name wrap">{html.escape(value)}</td><td>{n}</td></tr>'
        for kind, values in counts.items()
        for value, n in values.items()
    ]
    return (
        '<div class="scroll"><table><thead><tr><th class="name">What</th><th class="name">Value</th><th>Cells</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div><p>Configuration and hashes of data and checkpoints stand with"
        " each cell: choose a number in Table 1 or 3.</p>"
    )


def read_page_data(page: str) -> dict[str, Any]:
    """The cells' chains that a page carries; serves tests and whoever wants the data out again."""
    match = re.search(r'<script type="application/json" id="cells">(.*?)</script>', page, re.DOTALL)
    if match is None:
        raise LaidError("not a results page of `laid report`: it carries no cells")
    return json.loads(match[1])
