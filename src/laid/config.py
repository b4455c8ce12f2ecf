"""The configuration: a base file and overlays, merged, validated against one schema, defaults filled in.

To add a key: describe it in workflow/schemas/config.schema.json (type, bounds, description, default) and name it,
or a section that holds it, in SLICES for each step whose result depends on it. That is all.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from laid.errors import LaidError
from laid.io import dumps, read_json, sha256_json, write_text

SCHEMA = Path("workflow/schemas/config.schema.json")

# step -> the dotted keys its result depends on, read left to right: "a.b" adds, "-a.b" takes away again,
# {name} is a wildcard. The results of earlier steps are not listed: they are inputs, known by their hashes.
# Keys that change no result (results, resources, how work is sharded) stand nowhere, nor does what only chooses inputs.
SLICES: dict[str, list[str]] = {
    "data": ["data", "-data.download"],
    "haystacks": ["haystacks", "-haystacks.long"],
    "haystacks_long": [
        "haystacks",
        "-haystacks.train",
        "-haystacks.validation",
        "-haystacks.test",
        "haystacks.validation.share",
    ],
    "pretrain": [
        "family",
        "-family.members",
        "family.members.{member}",
        "haystacks.validation.share",
        "haystacks.seed",
    ],
    "teacher_cache": ["teacher_cache", "training.dtype", "evaluation.order_seed", "evaluation.attention"],
    "train": [
        "training",
        "-training.checkpoint_minutes",
        "-training.parallel",
        "methods.{method}",
        "-methods.{method}.questions",
        "evaluation.order_seed",
        "evaluation.attention",
    ],
    "evaluate": [
        "evaluation",
        "-evaluation.shard",
        "-evaluation.feature_cache_gb",
        "methods.{method}",
        "-methods.{method}.questions",
    ],
    "analyse": [
        "analysis.questions",
        "analysis.spectrum_size",
        "evaluation.order_seed",
        "evaluation.dtype",
        "haystacks.train.max_size",
        "haystacks.test.sizes",
    ],
    "beyond_haystacks": [
        "haystacks.seed",
        "haystacks.hard_negatives",
        "haystacks.needles",
        "haystacks.vocabulary",
        "haystacks.min_needles",
        "beyond.sizes",
        "beyond.questions",
    ],
    "why": ["beyond.few", "beyond.questions", "evaluation", "-evaluation.shard", "haystacks.test.sizes"],
    "pope": ["pope", "-pope.methods"],
    "tables": ["tables", "models", "haystacks.test.sizes"],
    "sweep": [
        "sweep",
        "-sweep.variants",
        "tables.short_max",
        "tables.threshold",
        "haystacks.validation.sizes",
    ],
}

# Keys that came after results, with the value that stands for what was done before: at that value a key is in no slice,
# so that its coming makes nothing again. "*" is any name.
LATER: dict[str, Any] = {
    "methods.*.axes": "all",
    "methods.*.rows": "answer",
    "methods.*.kl_vocabulary": "common",
    "methods.*.gaps.draw": "uniform",
    "teacher_cache.queries": "all",
}


def load(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Read the first file as the base, lay the others over it, validate, fill in defaults.

    Mappings merge key by key; lists and scalars replace. Raises LaidError, one line with file, line, dotted key,
    value and what is allowed.
    """
    paths = list(paths)
    if not paths:
        raise LaidError("no configuration file given; the default is config.yaml")
    return validate(merged(paths), paths)


def merged(paths: Iterable[str | Path]) -> dict[str, Any]:
    """What the files say together, neither validated nor filled in: one file with it stands for all of them."""
    together: dict[str, Any] = {}
    for path in paths:
        together = merge(together, _read_yaml(path)[0])
    return together


def validate(values: dict[str, Any], paths: Iterable[str | Path] = ()) -> dict[str, Any]:
    """Return a copy of `values` with the schema's defaults filled in. Raises LaidError as `load` does.

    `paths` (base, then overlays) serve messages only: they say which file a bad value came from. A value that no
    file holds came from the command line (`snakemake --config`).
    """
    import jsonschema

    sources = [(Path(path), *_read_yaml(path)) for path in paths]

    checker = jsonschema.Draft202012Validator(schema())
    values = _without_variants(values, sources)
    errors = sorted(checker.iter_errors(values), key=lambda e: (list(map(str, e.absolute_path)), e.validator))
    if errors:
        raise LaidError(_message(errors[0], sources))
    variants = (values.get("sweep") or {}).get("variants") or {}
    extended = _extended(values, variants, sources)
    full = fill(extended, schema())
    for name in variants:  # to every step a variant is a method like the others
        method = fill(extended["methods"][name], {"$ref": "#/$defs/trained_method"})
        full["methods"][name] = full["sweep"]["variants"][name] = method
    for key, complaint in _cross_checks(full):
        path = tuple(key.split("."))
        raise LaidError(f"{_where(path, sources, _lookup(values, path))}{key}: {complaint}")
    return full


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge deeply, everything else is replaced. Neither argument is changed."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def fill(value: Any, node: dict[str, Any]) -> Any:
    """A copy of `value` in which keys that are missing have the schema's default, at every depth."""
    node = _resolve(node)
    if not isinstance(value, dict):
        return copy.deepcopy(value)
    known = node.get("properties", {})
    result = {}
    for key, child in known.items():
        child = _resolve(child)
        if key in value:
            result[key] = fill(value[key], child)
        elif "default" in child:
            result[key] = fill(child["default"], child)
        elif "properties" in child:
            result[key] = fill({}, child)
    others = node.get("additionalProperties")
    for key in [key for key in value if key not in known]:
        result[key] = fill(value[key], others if isinstance(others, dict) else {})
    return result


def slice_for(step: str, config: dict[str, Any], **wildcards: Any) -> dict[str, Any]:
    """The part of `config` that the result of `step` depends on, as a nested mapping.

    Serves Snakemake's params (a change of a value in here, and only that, makes a rerun) and provenance. Wildcards:
    member, student, method, seed, size, as the step has them.
    """
    if step not in SLICES:
        raise LaidError(f"no step {step!r}; steps: {', '.join(SLICES)}")
    result: dict[str, Any] = {}
    for entry in SLICES[step]:
        keys = entry.lstrip("-").format(**wildcards).split(".")
        if entry.startswith("-"):
            _drop(result, keys)
        else:
            found = _lookup(config, keys)
            if found is not None:
                result = merge(result, _nest(keys, found))
    for key, before in LATER.items():
        _drop_at(result, key.split("."), before)
    return result


def slice_json(step: str, config: dict[str, Any], **wildcards: Any) -> str:
    """`slice_for` as compact JSON: one string that changes exactly when the slice does."""
    return dumps(slice_for(step, config, **wildcards), indent=None)


def resolved_file(config: dict[str, Any], folder: str | Path) -> Path:
    """Path of a YAML file below `folder` that holds `config`, named by its content; written if it is not there yet."""
    path = Path(folder) / f"config-{sha256_json(config)[:12]}.yaml"
    if not path.is_file():
        write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return path


@cache
def schema() -> dict[str, Any]:
    """The schema, from the checkout that this package belongs to (or from the current folder)."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / SCHEMA).is_file():
            return read_json(root / SCHEMA)
    raise LaidError(
        f"{SCHEMA} not found: laid runs from its checkout; install it there with `pip install -e .`"
    )


# ------------------------------------------------------------------ reading YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where plain YAML would silently keep the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.value in seen:
            raise LaidError(
                f"line {line}: key {key_node.value!r} stands here and on line {seen[key_node.value]}"
            )
        seen[key_node.value] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(path: str | Path) -> tuple[dict[str, Any], yaml.Node | None]:
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
    except FileNotFoundError:
        raise LaidError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise LaidError(f"{path}: is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise LaidError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except LaidError as error:
        raise LaidError(f"{path}: {error}; keep one") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise LaidError(
            f"{path}: not valid YAML{at}: {getattr(error, 'problem', None) or 'unreadable'}"
        ) from None
    if values is None:
        return {}, None
    if not isinstance(values, dict):
        raise LaidError(f"{path}: expected `key: value` lines at the top, found {_kind(values)}")
    return values, node


# ------------------------------------------------------------------ messages


def _message(error: Any, sources: list[tuple]) -> str:
    """One line for a jsonschema error: where, which key, which value, what is allowed."""
    path = tuple(str(part) for part in error.absolute_path)
    rule, bound, value, key = error.validator, error.validator_value, error.instance, ".".join(path)
    if rule == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = min(str(k) for k in value if k not in known)
        close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}? " if close else ""
        inside = f"in {key!r}" if key else "at the top"
        full = ".".join((*path, unknown))
        return f"{_where((*path, unknown), sources, value[unknown])}{full}: unknown key; {hint}keys {inside}: {', '.join(known)}"
    allowed = {
        "enum": lambda: f"allowed: {', '.join(map(_show, bound))}",
        "type": lambda: f"expected {_types(bound)}, found {_kind(value)}",
        "minimum": lambda: f"must be at least {bound}",
        "maximum": lambda: f"must be at most {bound}",
        "exclusiveMinimum": lambda: f"must be greater than {bound}",
        "exclusiveMaximum": lambda: f"must be less than {bound}",
        "minItems": lambda: f"needs at least {bound} entr{'y' if bound == 1 else 'ies'}, has {len(value)}",
        "maxItems": lambda: f"takes at most {bound} entries, has {len(value)}",
        "minLength": lambda: "must not be empty",
        "uniqueItems": lambda: "an entry stands twice",
        "pattern": lambda: f"must match {bound}",
    }.get(rule, lambda: error.message)()
    if rule == "enum" and isinstance(value, str):
        close = difflib.get_close_matches(value, [b for b in bound if isinstance(b, str)], n=1)
        allowed += f" (did you mean {close[0]!r}?)" if close else ""
    return f"{_where(path, sources, value)}{key or 'configuration'} = {_show(value)}: {allowed}"


def _where(path: tuple[str, ...], sources: list[tuple], bad: Any) -> str:
    """`file, line N: ` of the last file that sets `path` (or the nearest key above it) and is to blame for `bad`."""
    for depth in range(len(path), 0, -1):
        for file, values, node in reversed(sources):
            found = _lookup(values, path[:depth], default=_MISSING)
            if found is _MISSING:
                continue
            if depth == len(path) and not isinstance(bad, (dict, list)) and found != bad:
                return "command line: "
            line = _line(node, path[:depth])
            return f"{file}, line {line}: " if line else f"{file}: "
    return "command line: " if sources else "configuration: "


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
    text = (
        "null" if value is None else dumps(value, indent=None) if not isinstance(value, str) else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


def _types(bound: str | list[str]) -> str:
    return " or ".join(_NAMES[t] for t in ([bound] if isinstance(bound, str) else bound))


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return _NAMES["null"] if value is None else _NAMES.get(kinds.get(type(value)), type(value).__name__)


# ------------------------------------------------------------------ methods that extend others


def _without_variants(values: dict[str, Any], sources: list[tuple]) -> dict[str, Any]:
    """`values` without what an earlier validation put among the methods: the variants of the sweep.

    Raises LaidError for a variant that has the name of a method.
    """
    sweep, methods = values.get("sweep"), values.get("methods")
    variants = sweep.get("variants") if isinstance(sweep, dict) else None
    if not isinstance(variants, dict):
        return values
    known = schema()["properties"]["methods"]["properties"]
    for name in variants:
        if name in known:
            where = _where(("sweep", "variants", name), sources, variants[name])
            raise LaidError(
                f"{where}sweep.variants.{name}: {name!r} is a method already; give the variant a new name"
            )
    if not isinstance(methods, dict):
        return values
    return {**values, "methods": {name: method for name, method in methods.items() if name not in variants}}


def _extended(values: dict[str, Any], variants: dict[str, Any], sources: list[tuple]) -> dict[str, Any]:
    """`values` with every method laid over the one it extends, before defaults fill what neither sets.

    variants: more methods, which go among the others.
    """
    methods = {**(values.get("methods") or {}), **variants}

    def resolve(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
        own = methods[name] or {}
        parent = own.get("extends")
        if parent is None:
            return own
        section = ("sweep", "variants") if name in variants else ("methods",)
        where = _where((*section, name, "extends"), sources, parent)
        if parent in seen:
            raise LaidError(
                f"{where}{'.'.join(section)}.{name}.extends = {parent!r}: goes in a circle ({' -> '.join((*seen, parent))})"
            )
        if parent not in methods:
            raise LaidError(
                f"{where}{'.'.join(section)}.{name}.extends = {parent!r}: no such method; methods: {', '.join(methods)}"
            )
        return merge(resolve(parent, (*seen, parent)), own)

    return {**values, "methods": {name: resolve(name, (name,)) for name in methods}} if methods else values


# ------------------------------------------------------------------ what one key alone cannot tell


def _cross_checks(config: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """(dotted key, complaint) for every pair of values that contradict each other."""
    data, models = config["data"], config["models"]
    if data["source"] == "local" and not data["root"]:
        yield (
            "data.root",
            "data.source is 'local', so this must name the folder with annotations/ and the images",
        )
    for part in ("train", "long"):
        low, high = (config["haystacks"][part][key] for key in ("min_size", "max_size"))
        if low > high:
            yield f"haystacks.{part}.min_size", f"{low} is above max_size {high}"
    pope = config["pope"]
    if pope["wording"] == "haystack" and pope["objects"] < 2:
        yield (
            "pope.objects",
            f"{pope['objects']}: the wording 'haystack' names a second object of the image, so give at least 2",
        )
    sweep = config["sweep"]
    for key, allowed in (
        ("students", models["students"]),
        ("against", [name for name, method in config["methods"].items() if "lambda_sft" in method]),
        ("only", list(sweep["variants"])),
    ):
        unknown = [name for name in sweep[key] or [] if name not in allowed]
        if unknown:
            yield f"sweep.{key}", f"{unknown[0]!r} is not among {', '.join(allowed) or 'none'}"
    for name, method in config["methods"].items():
        if method.get("questions") == "long" and method["lambda_sft"] > 0:
            yield (
                f"methods.{name}.lambda_sft",
                f"{method['lambda_sft']:g} weighs labels, which questions: long does without; set it to 0",
            )
    if models["teacher"] in models["students"]:
        yield "models.students", f"{models['teacher']!r} is the teacher and cannot be a student of itself"


# ------------------------------------------------------------------ small helpers

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


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _drop_at(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Remove the entry at `keys`, where "*" is any, if it is `value`."""
    first, *rest = keys
    for key in list(values) if first == "*" else [first] if first in values else []:
        if not rest and values[key] == value:
            del values[key]
        elif rest and isinstance(values[key], dict):
            _drop_at(values[key], rest, value)


def _drop(values: dict[str, Any], keys: list[str]) -> None:
    parent = _lookup(values, keys[:-1])
    if isinstance(parent, dict):
        parent.pop(keys[-1], None)


def _resolve(node: dict[str, Any]) -> dict[str, Any]:
    """`node` with a local "$ref" (#/$defs/name) replaced by what it names; keys beside it win."""
    if "$ref" not in node:
        return node
    target = schema()["$defs"][node["$ref"].rpartition("/")[2]]
    return {**target, **{k: v for k, v in node.items() if k != "$ref"}}
