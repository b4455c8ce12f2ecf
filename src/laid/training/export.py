"""What a run leaves: a plain checkpoint or an adapter, its log, what was learned beside it, and its record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laid.distill.gain import RopeGain
from laid.io import write_json
from laid.models.processing import Processor


def write_run(
    folder: Path,
    log: Sequence[Mapping[str, Any]],
    learned: Mapping[str, nn.Module],
    record: Mapping[str, Any],
) -> None:
    """log.jsonl, learned.json (w and gains by name) and run.json."""
    values = {
        f"{name}.{key}": parameter.detach().cpu().tolist()
        for name, module in learned.items()
        for key, parameter in module.named_parameters()
    }
    lines = (json.dumps(line, sort_keys=True) + "\n" for line in log)
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(folder / "learned.json", values, indent=None)
    write_json(folder / "run.json", record)


def export_adapter(model: nn.Module, base: str, folder: Path) -> None:
    """A PEFT adapter. base: the name it gives its base, which is the same wherever the same training is run."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form that names this machine's paths


def export_checkpoint(
    model: nn.Module,
    gain: RopeGain | None,
    dtype: torch.dtype,
    processor: Processor,
    folder: Path,
) -> None:
    """A plain checkpoint, adapter merged and gain folded in."""
    if gain is not None:
        gain.detach()
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if gain is not None:
        gain.fold_(model)
    model.to(dtype).save_pretrained(str(folder))
    processor.save(folder)
