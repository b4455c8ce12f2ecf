"""The ledger of claims: read, put to the tests of laid.results.claim_tests, written as JSON and Markdown."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from laid.errors import LaidError
from laid.results.answers import Curves
from laid.results.claim_tests import TESTS
from laid.results.names import SHIPPED
from laid.results.render import Entry, Table
from laid.results.render import markdown as table_markdown
from laid.settings.reading import read_yaml


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The claims of claims.yaml. Raises LaidError for a broken file, a missing key or an unknown test."""
    path = Path(path)
    if not path.exists():
        raise LaidError(f"{path}: no such ledger of claims; it lies at the root of the repository")
    entries = read_yaml(path)[0].get("claims")
    if not isinstance(entries, list) or not entries:
        raise LaidError(f"{path}: expected a list under `claims`")
    seen = set()
    for i, entry in enumerate(entries):
        wanted = {"id", "title", "claim", "where", "test", "how"}
        if not isinstance(entry, dict) or not wanted <= entry.keys() <= wanted | {"methods", "with"}:
            raise LaidError(
                f"{path}: claim {i + 1} needs {', '.join(sorted(wanted))} and may have `methods` and `with`"
            )
        for key in sorted(entry):
            kinds = {"methods": list[str], "with": dict[str, Any]}
            _require(entry[key], kinds.get(key, str), f"{path}: claim {i + 1}: {key}")
        if entry["test"] not in TESTS:
            raise LaidError(
                f"{path}: claim {entry['id']!r} asks for test {entry['test']!r}; tests: {', '.join(TESTS)}"
            )
        known = [
            name
            for name in inspect.signature(TESTS[entry["test"]]).parameters
            if name not in ("source", "root", *(["method"] if "methods" in entry else []))
        ]
        if sorted(entry.get("with") or {}) != sorted(known):
            asked = ", ".join(known) or "nothing"
            raise LaidError(f"{path}: claim {entry['id']!r}: test {entry['test']} takes {asked} under `with`")
        kinds = get_type_hints(TESTS[entry["test"]])
        for name, value in (entry.get("with") or {}).items():
            _require(value, kinds[name], f"{path}: claim {entry['id']!r}: with.{name}")
        if entry["id"] in seen:
            raise LaidError(f"{path}: claim {entry['id']!r} is there twice")
        seen.add(entry["id"])
    return [one for entry in entries for one in _by_method(entry)]


def _require(value: Any, kind: Any, what: str) -> None:
    try:
        TypeAdapter(kind, config={"strict": True}).validate_python(value)
    except ValidationError as error:
        raise LaidError(f"{what} is {value!r:.60}: {error.errors()[0]['msg']}") from None


def _by_method(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A claim for each of its `methods`, whose name stands for {method} in the texts; others as they are."""
    if "methods" not in entry:
        yield entry
    for method in entry.get("methods", []):
        texts = {
            key: entry[key].replace("{method}", SHIPPED.get(method, method))
            for key in ("title", "claim", "how")
        }
        yield (
            entry
            | texts
            | {"id": f"{entry['id']}_{method}", "with": {"method": method, **entry.get("with", {})}}
        )


def assess(ledger: Sequence[dict[str, Any]], sources: Sequence[Curves], root: Path | None) -> dict[str, Any]:
    """Every claim on every source, as the content of claims.json. root: <results>/<scale>, for exported models."""
    found = []
    for entry in ledger:
        outcomes = {}
        for source in sources:
            settings = dict(entry.get("with", {}))
            if "root" in inspect.signature(TESTS[entry["test"]]).parameters:
                settings["root"] = root
            outcome = TESTS[entry["test"]](source, **settings)
            outcomes[source.name] = {
                "verdict": outcome.verdict,
                "with_error": outcome.with_error,
                "statements": [
                    {k: _finite(v) for k, v in asdict(s).items()} | {"text": s.text(), "verdict": s.verdict}
                    for s in outcome.statements
                ],
                "remarks": outcome.remarks,
            }
        text = {key: " ".join(str(entry[key]).split()) for key in ("id", "title", "claim", "where", "how")}
        found.append({**text, "results": outcomes})
    return {"format": "laid-claims/1", "sources": [source.name for source in sources], "claims": found}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict_text(result: dict[str, Any]) -> str:
    """The verdict, and beside a verdict on printed figures what sampling error would leave of it."""
    if result["with_error"] in (None, result["verdict"]):
        return result["verdict"]
    return f"{result['verdict']} ({result['with_error']} within sampling error)"


def summary(found: dict[str, Any]) -> Table:
    """One line per claim: the verdict on each source."""
    sources = found["sources"]
    rows = [
        [Entry(claim["title"]), *(Entry(verdict_text(claim["results"][name])) for name in sources)]
        for claim in found["claims"]
    ]
    notes = ["Supported: every statement of the test holds with its 95 % interval; not supported: one fails."]
    if "published" in sources:
        notes.append(
            "Published: the printed figures as exact; in parentheses what remains if each came from 100 questions."
        )
    header = ["Claim", *(name if name == "published" else f"scale {name}" for name in sources)]
    return Table("claims", "Claims of the paper", header, rows, notes, names=len(header))


def markdown(found: dict[str, Any]) -> str:
    """The ledger with its figures: a summary table, then every claim with its statements."""
    lines = [table_markdown(summary(found))]
    for claim in found["claims"]:
        lines += [
            f"### {claim['title']}",
            "",
            f"{claim['claim']} ({claim['where']})",
            "",
            f"Test: {claim['how']}",
            "",
        ]
        for name in found["sources"]:
            result = claim["results"][name]
            lines.append(f"- **{name}: {verdict_text(result)}**")
            lines += [f"  - {s['text']}: {s['verdict']}" for s in result["statements"]]
            lines += [f"  - {remark}" for remark in result["remarks"]]
        lines.append("")
    return "\n".join(lines).replace("<=", "&lt;=")
