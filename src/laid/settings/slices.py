"""Which values the result of each step depends on.

A new key takes part where it, or a section that holds it, is named in SLICES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laid.errors import LaidError
from laid.io import dumps
from laid.settings.base import merge, plain
from laid.settings.tune import variants

# What YaRN and SelfExtend go by: a job that measures several methods has no method of its own in its wildcards.
UNTRAINED = [f"methods.*.{key}" for key in ("factor", "original_positions", "axes", "group", "window")]

# step -> the dotted keys its result depends on, read left to right: "a.b" adds, "-a.b" takes away again,
# "-a.b?" only where it is null; {name} is a wildcard, * any key. The results of earlier steps are not listed: they are inputs, known by their hashes.
# Keys that change no result (results, resources, how work is sharded) stand nowhere, nor does what only chooses inputs.
SLICES: dict[str, list[str]] = {
    "data": ["data", "-data.download"],
    "haystacks": ["haystacks"],
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
        "-training.tokens_per_pass",
        "-training.trackers",
        "-training.validation?",
        "methods.{method}",
        *(f"-methods.{{method}}.{key}" for key in ("extends", "label")),
        "evaluation.order_seed",
        "evaluation.attention",
    ],
    "evaluate": [
        "evaluation",
        "-evaluation.shard",
        "-evaluation.feature_cache_gb",
        "-evaluation.keep_features",
        "methods.{method}",
        *(f"-methods.{{method}}.{key}" for key in ("extends", "label")),
    ],
    # Of a model behind a server: how it reads images and batches is the server's.
    "served": ["evaluation.scoring", "evaluation.order_seed", "evaluation.max_new_tokens"],
    "analyse": [
        "analysis.questions",
        "analysis.spectrum_size",
        *UNTRAINED,
        "evaluation.order_seed",
        "evaluation.dtype",
        "evaluation.attention",
        "haystacks.train.max_size",
        "haystacks.test.sizes",
    ],
    "alignability": [
        "analysis.alignment_questions",
        "methods.*.alignment.pairs",
        "evaluation.order_seed",
        "evaluation.dtype",
        "evaluation.attention",
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
    "why": [
        "beyond.few",
        "beyond.questions",
        "evaluation",
        "-evaluation.shard",
        "-evaluation.keep_features",
        "haystacks.test.sizes",
        *UNTRAINED,
    ],
    "pope": ["pope", "-pope.methods"],
    "tables": ["tables", "models", "haystacks.test.sizes", "beyond.table", "beyond.sizes", "methods.*.label"],
    "sweep": [
        "sweep",
        "methods.*.label",
        "tables.short_max",
        "tables.threshold",
        "haystacks.validation.sizes",
    ],
    "tune": [
        "tune",
        "methods",
        "training.lr",
        "training.epochs",
        "tables.short_max",
        "haystacks.validation.sizes",
    ],
}


def slice_for(step: str, settings: Mapping[str, Any], **wildcards: Any) -> dict[str, Any]:
    """The part of `settings` that the result of `step` depends on, as a nested mapping.

    Serves Snakemake's params (a change of a value in here, and only that, makes a rerun) and provenance. Wildcards:
    member, student, method, seed, size, as the step has them.
    """
    if step not in SLICES:
        raise LaidError(f"no step {step!r}; steps: {', '.join(SLICES)}")
    values, result = plain(settings), {}
    # What is tried concerns its own jobs alone, not those that take all methods.
    for name in variants(values.get("tune", {}).get("methods", {})):
        if name != wildcards.get("method"):
            values["methods"].pop(name, None)
    for entry in SLICES[step]:
        keys = entry.lstrip("-").format(**wildcards).split(".")
        if entry.startswith("-"):
            _drop(result, keys)
        else:
            result = merge(result, _part(values, keys))
    return result


def slice_json(step: str, settings: Mapping[str, Any], **wildcards: Any) -> str:
    """`slice_for` as compact JSON: one string that changes exactly when the slice does."""
    return dumps(slice_for(step, settings, **wildcards), indent=None)


def _part(values: Any, keys: list[str]) -> dict[str, Any]:
    """What stands at `keys`, below those keys; nothing where there is none, or null at the end of a "*"."""
    first, *rest = keys
    if not isinstance(values, dict):
        return {}
    if first == "*":
        found = {name: _part(child, rest) for name, child in values.items()}
        return {name: part for name, part in found.items() if any(v is not None for v in part.values())}
    if first not in values:
        return {}
    if not rest:
        return {first: values[first]}
    below = _part(values[first], rest)
    return {first: below} if below else {}


def _drop(values: dict[str, Any], keys: list[str]) -> None:
    *above, last = keys
    for key in above:
        if key not in values:
            return
        values = values[key]
    name = last.removesuffix("?")
    if name == last or values.get(name) is None:
        values.pop(name, None)
