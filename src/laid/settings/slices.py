"""Which values the result of each step depends on.

A new key takes part where it, or a section that holds it, is named in SLICES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laid.errors import LaidError
from laid.io import dumps
from laid.settings.base import merge, plain

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


def slice_for(step: str, settings: Mapping[str, Any], **wildcards: Any) -> dict[str, Any]:
    """The part of `settings` that the result of `step` depends on, as a nested mapping.

    Serves Snakemake's params (a change of a value in here, and only that, makes a rerun) and provenance. Wildcards:
    member, student, method, seed, size, as the step has them.
    """
    if step not in SLICES:
        raise LaidError(f"no step {step!r}; steps: {', '.join(SLICES)}")
    values, result = plain(settings), {}
    for entry in SLICES[step]:
        keys = entry.lstrip("-").format(**wildcards).split(".")
        if entry.startswith("-"):
            _drop(result, keys)
        else:
            found = _lookup(values, keys)
            if found is not None:
                result = merge(result, _nest(keys, found))
    for key, before in LATER.items():
        _drop_at(result, key.split("."), before)
    return result


def slice_json(step: str, settings: Mapping[str, Any], **wildcards: Any) -> str:
    """`slice_for` as compact JSON: one string that changes exactly when the slice does."""
    return dumps(slice_for(step, settings, **wildcards), indent=None)


def _lookup(values: Any, keys: list[str]) -> Any:
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
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
