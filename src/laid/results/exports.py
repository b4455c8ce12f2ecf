"""Whether an exported student is the same machine as before: architecture settings, tensor names and shapes."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from laid.errors import LaidError
from laid.io import read_json

# Settings that say where a checkpoint came from, not what it computes.
_PROVENANCE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint folder, from the safetensors headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            raise LaidError(f"{path}: not a safetensors file, or cut short") from None
    return shapes


def shape_report(root: Path, student: str, method: str) -> tuple[bool | None, str]:
    """(same?, text) for the first seed's export of `method` against models/<student>; None where one is missing."""
    before = root / "models" / student
    after = next((p for p in sorted(root.glob(f"runs/{student}/{method}/seed*/model")) if p.is_dir()), None)
    for folder in (before, after):
        if folder is None or not (folder / "config.json").is_file():
            return None, f"no checkpoint at {folder or root / 'runs' / student / method}"
    if (after / "adapter_config.json").is_file():
        return False, f"{after} is an adapter beside the weights, not a plain checkpoint"
    settings = [_architecture(read_json(folder / "config.json")) for folder in (before, after)]
    if other := _differing(*settings):
        return False, f"settings differ: {', '.join(other)}"
    shapes = [tensor_shapes(folder) for folder in (before, after)]
    if names := _differing(*shapes):
        return False, f"{len(names)} tensors differ in name or shape, first {names[0]}"
    count = sum(map(prod, shapes[0].values()))
    told = f"{count:,} parameters in {len(shapes[0])} tensors of the same names and shapes, same settings"
    return True, told


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _architecture(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A configuration flattened to dotted keys, provenance left out."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in _PROVENANCE:
            continue
        if isinstance(value, dict):
            out |= _architecture(value, f"{before}{key}.")
        else:
            out[before + key] = value
    return out
