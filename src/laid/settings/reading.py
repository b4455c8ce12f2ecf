"""Reading YAML: plain data only, numbers as YAML 1.2 has them, each key once, every mistake in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from laid.errors import LaidError
from laid.io import UNPRINTABLE, read_text, unprintable

DEEPEST, LARGEST = 40, 100_000  # levels of nesting; values once aliases are written out
NUMBER = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader in which 1e-4 is a number and 2024-01-01 a text, and which refuses what no setting can be."""

    yaml_implicit_resolvers = {}
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (
            None,
            *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq")),
        )
    }


for _kind, _first in (("bool", "yYnNtTfFoO"), ("null", "~nN\0"), ("merge", "<")):
    _pattern = next(
        pattern
        for pairs in yaml.SafeLoader.yaml_implicit_resolvers.values()
        for tag, pattern in pairs
        if tag == f"tag:yaml.org,2002:{_kind}"
    )
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", _pattern, ["", *_first] if _kind == "null" else list(_first)
    )
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^(?:{NUMBER.pattern})$"), list("-+.0123456789")
)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 19 or not re.fullmatch(r"[-+]?[0-9][0-9_]*", text):
        raise LaidError(f"line {node.start_mark.line + 1}: {_cut(text)}: no whole number that fits 64 bits")
    return int(text)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (
            "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge",
        ):  # fmt: skip
            what = _cut(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise LaidError(f"line {line}: key {what}: a key must be a name")
        if key_node.value in seen:
            raise LaidError(
                f"line {line}: key {_cut(key_node.value)!r} stands here and on line {seen[key_node.value]}; keep one"
            )
        seen[key_node.value] = line
    return loader.construct_mapping(node, deep=True)


def _other(_: _Loader, node: yaml.Node) -> None:
    tag = _cut(node.tag.replace("tag:yaml.org,2002:", "!!"))
    raise LaidError(
        f"line {node.start_mark.line + 1}: a value of the kind {tag}: allowed are numbers, texts, true, false, null, lists and mappings"
    )


_Loader.add_constructor(None, _other)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """What a file says, and its nodes, which know the lines. Raises LaidError, one line."""
    text = read_text(path, "configuration file")
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _measure(node, {}, 0)
        values = yaml.load(text, Loader=_Loader)
    except LaidError as error:
        raise LaidError(f"{path}: {error}") from None
    except RecursionError:
        raise LaidError(f"{path}: nested more than {DEEPEST} levels deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        problem = " ".join((getattr(error, "problem", None) or "unreadable").split())
        raise LaidError(f"{path}: not valid YAML{at}: {_cut(problem, 200)}") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
    ) as error:  # an explicit tag on what is no such thing
        raise LaidError(f"{path}: not valid YAML: {_cut(' '.join(str(error).split()), 200)}") from None
    if values is None:
        return {}, None
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "a single value"
        raise LaidError(f"{path}: expected `key: value` lines at the top, found {found}")
    return values, node


def from_text(value: Any) -> Any:
    """A value given on the command line, where all that stands in braces is text: read as a file would be."""
    if isinstance(value, dict):
        return {key: from_text(child) for key, child in value.items()}
    if isinstance(value, list):
        return [from_text(child) for child in value]
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        return value
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, value, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, value, yaml.Mark("", 0, 0, 0, None, None)))
    except (LaidError, ValueError):
        return value
    finally:
        loader.dispose()


def _measure(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Values below a node with aliases written out. Raises LaidError where that is too many or too deep."""
    line = node.start_mark.line + 1
    if depth > DEEPEST:
        raise LaidError(f"line {line}: nested more than {DEEPEST} levels deep")
    if isinstance(node, yaml.ScalarNode):
        if unprintable(node.value):
            raise LaidError(f"line {line}: {_cut(node.value)} {UNPRINTABLE}")
        return 1
    if id(node) not in sizes:
        children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + sum(_measure(child, sizes, depth + 1) for child in children)
    if sizes[id(node)] > LARGEST:
        raise LaidError(f"line {line}: its aliases stand for more than {LARGEST:,} values")
    return sizes[id(node)]


def _cut(text: str, length: int = 60) -> str:
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= length else shown[: length - 3] + "..."
