"""Visual features on disk, known by content, so that a frozen vision tower sees an image once for all runs.

What a feature depends on is its key: the vision tower's weights and dtype, the image processor's settings, the libraries'
versions and the kind of device (together the folder's name), and the image file's bytes. Renamed, moved or re-downloaded
images are found again; a changed weight, setting or image is not mistaken for another. Features lie in packs, safetensors
files written whole and renamed, each named by the images in it: processes that share a folder cannot spoil each other's
work, and a killed one leaves nothing half-written. A pack that cannot be read counts as not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from laid import provenance
from laid.data.images import READING
from laid.errors import LaidError
from laid.io import atomic_path, sha256_file, sha256_json
from laid.models.decoder import vision_tower
from laid.models.processing import Processor


class FeatureStore:
    """The features of one vision tower in `folder`, which may hold those of others beside them.

    model: wrapped or not. Raises LaidError where it has no vision tower.
    """

    def __init__(self, folder: str | Path, model: torch.nn.Module, processor: Processor):
        self.folder = Path(folder) / tower_key(model, processor)[:24]
        self.found = 0
        self._packs: dict[str, Any] = {}  # image hash -> the open pack it lies in
        self._hashes: dict[Path, str] = {}
        self._read: set[str] = set()
        self._look()

    def get(self, files: Sequence[Path]) -> dict[Path, torch.Tensor]:
        """The features (tokens, hidden) of those of `files` that are here, on the CPU.

        Raises LaidError for a file that is missing.
        """
        if any(self._hash(file) not in self._packs for file in files):
            self._look()  # another process may have written meanwhile
        here = {file: self._packs.get(self._hash(file)) for file in files}
        found = {file: pack.get_tensor(self._hash(file)) for file, pack in here.items() if pack is not None}
        self.found += len(found)
        return found

    def has(self, file: Path) -> bool:
        """Whether the features of an image file were here when the packs were last looked for."""
        return self._hash(file) in self._packs

    def put(self, features: Mapping[Path, torch.Tensor]) -> None:
        """Keep the features of image files, as one pack."""
        tensors = {self._hash(file): tensor.detach().cpu().contiguous() for file, tensor in features.items()}
        if tensors:
            name = sha256_json(sorted(tensors))[:32]
            with atomic_path(self.folder / f"{name}.safetensors") as beside:
                save_file(tensors, beside)

    def _hash(self, file: Path) -> str:
        if file not in self._hashes:
            try:
                self._hashes[file] = sha256_file(file)
            except OSError as error:
                raise LaidError(f"{file}: cannot be read: {error.strerror}") from None
        return self._hashes[file]

    def _look(self) -> None:
        """Open the packs that were not there before."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            try:
                pack = safe_open(path, "pt")
            except (OSError, SafetensorError):
                continue  # its images are computed again, and the pack is written again
            self._read.add(path.name)
            self._packs |= dict.fromkeys(pack.keys(), pack)


def tower_key(model: torch.nn.Module, processor: Processor) -> str:
    """Hex SHA-256 of everything that features depend on but the image itself."""
    tower = vision_tower(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    versions = provenance.libraries()
    return sha256_json(
        {
            "weights": digest.hexdigest(),
            "reading": READING,
            "processor": json.loads(processor.image_processor.to_json_string()),
            "device": next(tower.parameters()).device.type,
            "libraries": {name: versions[name] for name in ("torch", "transformers", "numpy", "pillow")},
        }
    )
