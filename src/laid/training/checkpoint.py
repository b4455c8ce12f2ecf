"""Checkpoints to go on from: weights, optimiser and log, safetensors and JSON, written whole or not."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from laid.errors import LaidError
from laid.io import atomic_path, read_json, write_json
from laid.training.parallel import Alone


class Checkpoint:
    """One run's checkpoint folder. `key` names its configuration and inputs: another run's is not taken up.

    It holds whole tensors, so that another number of processes may go on from it. Every process of the run calls `save`
    and `load`; the main one writes, all read (the folder must be on a file system that all see).
    """

    def __init__(self, folder: Path, key: str, minutes: float, parallel: Alone | None = None):
        self.folder, self.key, self.minutes = folder, key, minutes
        self.parallel = parallel or Alone()
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether the time between checkpoints has passed."""
        return self.minutes > 0 and time.monotonic() - self.last >= 60 * self.minutes

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        log: list[dict],
    ) -> None:
        """Keep the state after `step` steps; the one before it is replaced. tensors: whole."""
        flat = {f"optimizer/{k}": v for k, v in self.parallel.optimizer_tensors(optimizer)}
        self.last = time.monotonic()
        if not self.parallel.main:
            return
        with atomic_path(self.folder) as folder:
            folder.mkdir()
            everything = {**{f"weights/{k}": v for k, v in tensors.items()}, **flat}
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in everything.items()},
                folder / "state.safetensors",
            )
            write_json(folder / "state.json", {"key": self.key, "step": step, "log": log}, indent=None)

    def load(
        self, optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, torch.Tensor], list[dict[str, Any]]] | None:
        """(steps done, weights, log), the optimiser restored; None without a checkpoint of this very run."""
        if not (self.folder / "state.json").is_file():
            return None
        about = read_json(self.folder / "state.json")
        if about.get("key") != self.key:
            return None
        try:
            tensors = load_file(self.folder / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise LaidError(f"{self.folder}: broken checkpoint ({error}); remove it to start again") from None
        self.parallel.restore_optimizer(
            optimizer,
            {k.removeprefix("optimizer/"): t for k, t in tensors.items() if k.startswith("optimizer/")},
        )
        weights = {
            name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")
        }
        return about["step"], weights, about["log"]

    def remove(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
