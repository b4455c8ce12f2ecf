"""One results page that opens offline: tables, figures, claims, and the chain behind every cell."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from typing_extensions import TypedDict

from laid.errors import LaidError
from laid.io import dumps, parsed, read_json, safe_join, sha256_json
from laid.results import tables as table_module
from laid.results.answers import Results
from laid.results.claims import verdict_text
from laid.results.names import Names
from laid.results.render import Table, table_html

PAGE = Path(__file__).with_name("page")
WIDE = 400  # points: figures wider than this keep a readable width on a phone and scroll


def build(
    results: Results, figures: Path | None, claims: Path | None, root: Path, footnote: str | None = None
) -> str:
    """The page as HTML text, without any reference outside itself.

    figures: folder of `laid figures` (captions.json and SVGs); claims: claims.json of `laid claims`; both may be None.
    root: <results>/<scale>, where run and model records lie. Raises LaidError where a given input is missing or broken.
    """
    found = _read_claims(claims) if claims else None
    sections = [("tables", "Tables", _tables(table_module.build(results), footnote))]
    if found:
        sections.append(("claims", "Claims", _claims(found)))
    if figures:
        sections.append(("figures", "Figures", _figures(figures)))
    statistics = table_module.build_statistics(results)
    sections.append(("statistics", "Tests and windows", _tables(statistics)))
    sections.append(("provenance", "Provenance", _provenance(results)))
    title = f"LAid: results at scale {results.name}"
    lead = (
        f"Long-window anchoring distillation (Zhou et al., AAAI 2026), measured by this project. {results.questions_note()}"
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
        "cells": dumps(chain_data(results, root), indent=None).replace("</", "<\\/"),
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "js": (PAGE / "page.js").read_text(encoding="utf-8"),
    }
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


# ------------------------------------------------------------------ tables


def _tables(tables: Sequence[Table], footnote: str | None = None) -> str:
    body = "\n".join(table_html(table) for table in tables)
    return body + (f'\n<p class="notes">{html.escape(footnote)}</p>' if footnote else "")


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


class Caption(TypedDict):
    """An entry of captions.json, which `laid figures` writes beside the drawings."""

    name: str
    title: str
    caption: str


def _figures(folder: Path) -> str:
    parts, file = [], folder / "captions.json"
    for entry in parsed(read_json(file), list[Caption], file):
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


def _provenance(results: Results) -> str:
    """Which code, libraries and configuration stand behind the cells, with how many cells each."""
    behind = results.wanted["provenance"]
    texts = {"Code": behind.map(_code), "Libraries": behind.map(_libraries)}
    rows = [
        f'<tr><td class="name">{kind}</td><td class="name wrap">{html.escape(value)}</td><td>{n}</td></tr>'
        for kind, values in texts.items()
        for value, n in values.groupby(values, sort=False).size().items()
    ]
    return (
        '<div class="scroll"><table><thead><tr><th class="name">What</th><th class="name">Value</th><th>Cells</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div><p>Configuration and hashes of data and checkpoints stand with"
        " each cell: choose a number in Table 1 or 3.</p>"
    )


def _code(provenance: dict[str, Any]) -> str:
    code = provenance["code"]
    return f"version {code.get('version')}, commit {code.get('commit')}{' with changes' if code.get('dirty') else ''}"


def _libraries(provenance: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in provenance["libraries"].items() if version)


# ------------------------------------------------------------------ chains

_RECORDS = ("laid.json", "pretrain.json", "run.json")
_LARGEST = 100_000  # bytes: a record is a small file; a larger one is something else


def chain_data(results: Results, root: Path) -> dict[str, Any]:
    """{"cells": "<student>/<method>/<size>" -> facts, chain, command; "records": hash -> text, each held once}."""
    records: dict[str, str] = {}
    answers = {
        key: part
        for source in (results, results.farther)
        if source
        for key, part in source.answers.groupby(["student", "method", "size"], sort=False)
    }
    cells = {}
    for source in (results, results.farther):
        for cell in source.wanted.itertuples(index=False) if source else ():
            key = f"{cell.student}/{cell.method}/{cell.size}"
            if key not in cells:
                cells[key] = {
                    "title": _title(cell, results.names),
                    "facts": _facts(cell, answers[cell.student, cell.method, cell.size]),
                    "chain": _chain(cell, root, records),
                    "command": f"snakemake --cores all {source.folder / key}.json",
                }
    return {"cells": cells, "records": records}


def _title(cell: Any, names: Names) -> str:
    return f"{cell.student}, {names[cell.method]}, {cell.size} image{'s' if cell.size > 1 else ''}"


def _facts(cell: Any, answers: pd.DataFrame) -> list[tuple[str, str]]:
    right = answers.groupby("label")["correct"].mean()
    shares = {
        label: f"{100 * right[label]:.1f} %" if label in right else "none asked" for label in ("yes", "no")
    }
    interval = f"[{100 * cell.low:.2f}, {100 * cell.high:.2f}], {cell.interval_method}"
    seeds = ", ".join(map(str, cell.seeds))
    told = ((cell.tokens_mean, "tokens"), (cell.positions_mean, "M-RoPE positions"))
    known = [f"{mean:.1f} {what}" for mean, what in told if not math.isnan(mean)]
    prompt = f"{', '.join(known)} on average" if known else "its length is not known"
    return [
        ("Accuracy", f"{100 * cell.accuracy:.2f} % {interval}"),
        ("Right where yes is right", shares["yes"]),
        ("Right where no is right", shares["no"]),
        ("Answers", f"{cell.n} ({cell.questions} questions, seeds {seeds})"),
        ("Compliance", f"{100 * cell.compliance:.1f} %"),
        ("Prompt", prompt),
    ]


def _chain(cell: Any, root: Path, records: dict[str, str]) -> list[dict[str, Any]]:
    """Steps from the data to the number; a step names hashes and, by reference, its settings."""
    provenance = cell.provenance
    data = dict(provenance["data"])
    steps: list[dict[str, Any]] = []

    def step(what: str, names: list[str], record: Any = None) -> None:
        entry: dict[str, Any] = {"what": what, "hashes": [[name, data.pop(name)] for name in names]}
        if record is not None:
            text = dumps(record)
            reference = sha256_json(record)[:12]
            records[reference] = text
            entry["details"] = reference
        if entry["hashes"] or record is not None:
            steps.append(entry)

    step("Images and their labels", [n for n in data if n.startswith("annotations") or n == "images"])
    step("Questions", [n for n in data if "question" in n or "haystack" in n])
    step(
        f"Checkpoint of {cell.student}", [n for n in data if n == "model" or n.startswith("models/")],
        _record(root / "models" / cell.student),
    )  # fmt: skip
    for name in [n for n in data if n.startswith("run")]:
        seed = name.removeprefix("run_")
        step(
            f"Trained with {cell.method}, {seed}",
            [name],
            _record(root / "runs" / cell.student / cell.method / seed),
        )
    step("Other inputs", list(data))
    data["settings"] = provenance["config"]
    step("Evaluation", ["settings"], provenance.get("settings"))
    code = provenance["code"]
    data["commit"] = f"{code.get('commit')}{' (with changes)' if code.get('dirty') else ''}"
    step(
        f"Code, laid {code.get('version')}", ["commit"], {"libraries": provenance["libraries"], "code": code}
    )
    return steps


def _record(folder: Path) -> Any:
    """What a run or checkpoint says of itself, or None."""
    for name in _RECORDS:
        path = folder / name
        if path.is_file() and path.stat().st_size <= _LARGEST:
            return read_json(path)
    return None


def read_page_data(page: str) -> dict[str, Any]:
    """The cells' chains that a page carries; serves tests and whoever wants the data out again."""
    match = re.search(r'<script type="application/json" id="cells">(.*?)</script>', page, re.DOTALL)
    if match is None:
        raise LaidError("not a results page of `laid report`: it carries no cells")
    return json.loads(match[1])
