"""Every key in Markdown, from the classes: docs/reference/settings.md is this, `laid config --docs` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from laid.io import dumps
from laid.settings.loading import json_schema

HEAD = """# Every key

Made from the classes in `src/laid/settings/` by `laid config --docs`. What overlays are and what runs again after a change:
[configuration.md](configuration.md). A key that is left out takes the default shown here; defaults are neutral, `config.yaml`
and each overlay say their own values.
"""
KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


def reference() -> str:
    """The Markdown: a table for each section, in the order of the classes."""
    schema = json_schema()
    return HEAD + "\n" + "\n".join(_tables(schema, schema["$defs"], "", "Top level"))


def _tables(node: dict[str, Any], classes: dict[str, Any], path: str, title: str) -> Iterator[str]:
    plain, below = [], {}
    for key, child in node["properties"].items():
        names = _references(child)
        if not names:
            plain.append((key, child))
        for name in names:
            below.setdefault(name, []).append((key, child))
    yield f"## {title}\n\n{_line(node['description'])}\n"
    if plain:
        yield "| key | value | default | |\n|---|---|---|---|"
        for key, child in plain:
            default = dumps(child["default"], indent=None).strip('"')
            yield f"| `{key}` | {_value(child)} | `{default}` | {_line(child['description'])} |"
        yield ""
    for name, found in below.items():
        if len(found) > 1:  # one class, described once: say what each of its places is for
            yield "\n".join(f"- `{path}{key}`: {_line(child['description'])}" for key, child in found) + "\n"
        (key, child), inner = found[0], classes[name]
        if len(found) > 1 or "additionalProperties" in child or "patternProperties" in child:
            key = "<name>" if len(found) > 1 else f"{key}.<name>"
        kind = f" ({name})" if len(_references(child)) > 1 else ""
        yield from _tables(inner, classes, f"{path}{key}.", f"`{path}{key}`{kind}")


def _references(node: dict[str, Any]) -> list[str]:
    """The classes that a property's value is of."""
    if "$ref" in node:
        return [node["$ref"].rpartition("/")[2]]
    inner = [*node.get("anyOf", []), *node.get("patternProperties", {}).values()]
    if isinstance(node.get("additionalProperties"), dict):
        inner.append(node["additionalProperties"])
    return [name for part in inner for name in _references(part)]


def _value(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_value(part) for part in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node["type"] == "array":
        return f"list of: {_value(node['items'])}"
    if node["type"] == "object":
        inner = node["additionalProperties"]
        return f"name: {'value' if inner is True else _value(inner)}"
    bounds = [
        f"{sign} {node[bound]:g}"
        for bound, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if bound in node
    ]
    return " ".join([KINDS[node["type"]], ", ".join(bounds)]).strip()


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
