"""Checkpoints to go on from: weights, optimiser and log, safetensors and JSON, written whole or not.

Accelerate's save_state pickles the optimiser and the states of random numbers. This holds neither pickles nor random
states (dropout and gaps follow from seed and step), but whole tensors, so that another number of processes, or another
layout, may go on from it.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from laid.errors import LaidError
from laid.io import atomic_path, parsed, read_json, sha256_file, sha256_json, write_json


@dataclass
class State:
    """A run after `step` steps. tensors: whole, weights and the optimiser's, by name."""

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)


class About(TypedDict):
    """state.json. sha256: of state.safetensors beside it. digest: of all the others here."""

    key: str
    step: int
    log: list[dict[str, int | float]]
    sha256: str
    digest: str


class Checkpoint:
    """One run's checkpoint folder. `key` names its configuration and inputs: another run's is not used.

    The main process writes, all read (the folder must be on a file system that all see). minutes: between checkpoints; 0 is
    none.
    """

    def __init__(self, folder: Path, key: str, minutes: float):
        self.folder, self.key, self.minutes = folder, key, minutes
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether the time between checkpoints has passed."""
        return self.minutes > 0 and time.monotonic() - self.last >= 60 * self.minutes

    def save(self, state: State) -> None:
        """Keep this state; the one before it is replaced."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
        with atomic_path(self.folder, sum(t.nbytes for t in tensors.values())) as folder:
            folder.mkdir()
            save_file(tensors, folder / "state.safetensors")
            about = {"key": self.key, "step": state.step, "log": state.log}
            about["sha256"] = sha256_file(folder / "state.safetensors")
            about["digest"] = sha256_json(about)
            write_json(folder / "state.json", about, indent=None)
        self.last = time.monotonic()

    def load(self) -> State | None:
        """None without a checkpoint of this very run. Raises LaidError for one that is cut short or changed."""
        file = self.folder / "state.safetensors"
        if not (self.folder / "state.json").is_file():
            return None
        about = parsed(read_json(self.folder / "state.json"), About, self.folder / "state.json")
        if about["key"] != self.key:
            return None
        try:
            rest = {name: value for name, value in about.items() if name != "digest"}
            if sha256_file(file) != about["sha256"] or sha256_json(rest) != about["digest"]:
                raise LaidError(
                    f"{file.with_suffix('')}.*: changed since it was written; remove {self.folder} to start again"
                )
            return State(about["step"], load_file(file), about["log"])
        except (OSError, SafetensorError) as error:
            raise LaidError(f"{self.folder}: broken checkpoint ({error}); remove it to start again") from None

    def remove(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
