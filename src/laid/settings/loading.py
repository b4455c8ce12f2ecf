"""From files to settings: a base file and overlays, merged, validated, and every mistake told in one line."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from laid.errors import LaidError
from laid.io import dumps, read_text, sha256_json, write_text
from laid.settings.base import Section, merge, plain
from laid.settings.reading import from_text, read_yaml
from laid.settings.tree import Invalid, Settings


def load(paths: Iterable[str | Path], command_line: Mapping[str, Any] | None = None) -> Settings:
    """Read the first file as the base, lay the others over it, and what the command line says over all of them.

    Mappings merge key by key; lists and scalars replace. Raises LaidError, one line with file, line, dotted key,
    value and what is allowed.
    """
    paths = list(paths)
    if not paths:
        raise LaidError("no configuration file given; the default is config.yaml")
    return validate(merge(merged(paths), from_text(dict(command_line or {}))), paths)


def merged(paths: Iterable[str | Path]) -> dict[str, Any]:
    """What the files say together, neither validated nor filled in: one file with it stands for all of them."""
    together: dict[str, Any] = {}
    for path in paths:
        values = read_yaml(path)[0]
        together = merge({} if values.get("complete") is True else together, values)
    return together


def validate(values: Mapping[str, Any], paths: Iterable[str | Path] = ()) -> Settings:
    """`values` as settings, defaults filled in. Raises LaidError as `load` does.

    `paths` (base, then overlays) serve messages only: they say which file a bad value came from. A value that no
    file holds came from the command line (`snakemake --config`).
    """
    try:
        return Settings.of(values)
    except Invalid as error:
        raise LaidError(
            _message(error, plain(values), _counted([(Path(path), *read_yaml(path)) for path in paths]))
        ) from None


def _counted(sources: list[tuple]) -> list[tuple]:
    """The files from the last complete one on: nothing before it counts."""
    complete = [at for at, (_, values, _) in enumerate(sources) if values.get("complete") is True]
    return sources[complete[-1] :] if complete else sources


def look_at(words: Sequence[str]) -> None:
    """Exit, in one line, where one of the files that `snakemake` with these words will read cannot be read.

    Its own reader would end in a traceback, and where aliases stand for billions of values, not at all.
    """
    files = [] if any(word.startswith(("-d", "--dir")) for word in words) else ["config.yaml"]
    taken = False
    for word in words:
        if word.startswith("-"):
            option, _, value = word.partition("=")
            taken = option in ("--configfile", "--configfiles")
            files += [value] if taken and value else []
        elif taken:
            files.append(word)
    try:
        for file in files:
            if file != "config.yaml" or Path(file).is_file():
                if "__use_yte__" in read_yaml(file)[0]:
                    raise LaidError(
                        f"{file}: __use_yte__: Snakemake would run what stands in this file: take it out"
                    )
                _require_readable(file)
    except LaidError as error:
        raise SystemExit(f"snakemake: error: {error}") from None


def _require_readable(file: str) -> None:
    """Raise LaidError where YAML 1.1, which Snakemake reads, ends over what is fine here: 2024-13-45 is no date, but a text."""
    try:
        yaml.load(read_text(file), Loader=yaml.FullLoader)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LaidError(f"{file}: Snakemake cannot read it: {reason}: put that value in quotes") from None


def resolved_file(settings: Settings, folder: str | Path) -> Path:
    """Path of a YAML file below `folder` that holds `settings`, named by its content; written if not there yet."""
    values = settings.model_dump()
    path = Path(folder) / f"config-{sha256_json(values)[:12]}.yaml"
    if not path.is_file():
        write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return path


def json_schema() -> dict[str, Any]:
    """The JSON schema of configuration files, for Snakemake and editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}


# ------------------------------------------------------------------ messages

BOUNDS = {
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "greater_than": ("gt", "must be greater than {}"),
    "less_than": ("lt", "must be less than {}"),
    "string_pattern_mismatch": ("pattern", "must match {}"),
}
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def _message(error: Invalid, values: Any, sources: list[tuple]) -> str:
    """Where, which key, which value, what is allowed."""
    path, problem = error.path, error.problem
    key, value = ".".join(path), _lookup(values, path)
    where = _where(path, sources, value)
    if isinstance(problem, str):
        shown = f" = {_show(value)}" if path[-1] == "extends" else ""
        return f"{where}{key}{shown}: {problem}"
    rule, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    annotation = _annotation(error.model, path[error.depth :])
    if rule == "extra_forbidden":
        model = _bare(_annotation(error.model, path[error.depth : -1]))
        known = sorted(model.model_fields)
        inside = f"in {'.'.join(path[:-1])!r}" if path[:-1] else "at the top"
        return f"{where}{_printable(key)}: unknown key; {_near(path[-1], known)}keys {inside}: {', '.join(known)}"
    if path[-1] == "[key]":
        return f"{where}{'.'.join(path[:-2])}: {path[-2]!r}: must match {context['pattern']}"
    if rule in BOUNDS:
        allowed = BOUNDS[rule][1].format(_number(context[BOUNDS[rule][0]]))
    elif rule in EXPECTED:
        null = " or null" if type(None) in typing.get_args(annotation) else ""
        allowed = f"expected {EXPECTED[rule]}{null}, found {_kind(value)}"
    elif rule == "literal_error":
        choices = _choices(annotation)
        allowed = f"allowed: {', '.join(map(_show, choices))}"
        close = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        allowed += f" (did you mean {close[0]!r}?)" if close else ""
    elif rule == "too_short":
        least = context["min_length"]
        allowed = f"needs at least {least} entr{'y' if least == 1 else 'ies'}, has {len(value)}"
    elif rule == "too_long":
        allowed = f"takes at most {context['max_length']} entries, has {len(value)}"
    elif rule == "string_too_short":
        allowed = "must not be empty"
    elif rule == "finite_number":
        allowed = "must be a finite number"
    else:
        allowed = problem["msg"]
    return f"{where}{key or 'configuration'} = {_show(value)}: {allowed}"


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def _annotation(model: Any, path: Iterable[str]) -> Any:
    """The type of what stands at `path` below a section."""
    for part in path:
        model = _bare(model)
        if isinstance(model, type) and issubclass(model, Section):
            field = model.model_fields.get(part)
            model = field.annotation if field else None
        elif typing.get_origin(model) in (list, dict):
            model = typing.get_args(model)[-1]
    return _bare(model, nullable=True)


def _bare(annotation: Any, nullable: bool = False) -> Any:
    """A type without what Annotated adds and, unless it is asked for, without null."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if not nullable and typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _bare(next(kind for kind in typing.get_args(annotation) if kind is not type(None)))
    return annotation


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for part in typing.get_args(annotation) for choice in _choices(part)]


def _where(path: tuple[str, ...], sources: list[tuple], bad: Any) -> str:
    """`file, line N: ` of the last file that sets `path` (or the nearest key above it) and is to blame for `bad`.

    A value that is there, but in no file, came from the command line.
    """
    if sources and bad is not None and all(_lookup(values, path) is None for _, values, _ in sources):
        return "command line: "
    for depth in range(len(path), 0, -1):
        for file, values, node in reversed(sources):
            found = _lookup(values, path[:depth], default=_MISSING)
            if found is _MISSING:
                continue
            if depth == len(path) and not isinstance(bad, (dict, list)) and not _same(found, bad):
                return "command line: "
            line = _line(node, path[:depth])
            return f"{file}, line {line}: " if line else f"{file}: "
    return "command line: " if sources else "configuration: "


def _same(one: Any, other: Any) -> bool:
    return one == other or str(one) == str(other) == "nan"


def _line(node: yaml.Node | None, path: tuple[str, ...]) -> int | None:
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == part), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
    return line


def _show(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float) and not abs(value) < float("inf"):
        text = {float("inf"): ".inf", float("-inf"): "-.inf"}.get(value, ".nan")
    else:
        text = "null" if value is None else dumps(plain(value), indent=None)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(bound: Any) -> Any:
    return f"{bound:g}" if isinstance(bound, float) else bound


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


_MISSING = object()


def _lookup(values: Any, keys: Iterable[str], default: Any = None) -> Any:
    for key in keys:
        if isinstance(values, list) and key.isdigit() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return default
    return values
