"""Whether an exported student is the same machine as before: architecture settings, tensor names and shapes."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from laid.errors import LaidError
from laid.io import read_json

# Settings that say where a checkpoint came from, not what it computes.
_PROVENANCE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint folder, from the safetensors headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= min(path.stat().st_size, 100_000_000):
                raise LaidError(f"{path}: not a safetensors file, or cut short")
            header = json.loads(handle.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
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
    shapes = [tensor_shapes(folder) for folder in (before, after)]
    settings = [_architecture(read_json(folder / "config.json")) for folder in (before, after)]
    other = sorted(
        k for k in settings[0].keys() | settings[1].keys() if settings[0].get(k) != settings[1].get(k)
    )
    if other:
        return False, f"settings differ: {', '.join(other)}"
    if shapes[0] != shapes[1]:
        names = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        return False, f"{len(names)} tensors differ in name or shape, first {names[0]}"
    count = sum(prod(shape) for shape in shapes[0].values())
    return (
        True,
        f"{count:,} parameters in {len(shapes[0])} tensors of the same names and shapes, same settings",
    )


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
