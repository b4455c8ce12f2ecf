"""Visual features, computed once per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from laid.models.processing import Processor
from laid.progress import Progress


class ImageFeatures:
    """The language model's inputs for images, by path; each image goes through the vision tower once.

    model: a Qwen2.5-VL model. file: path in a question -> file on disk. limit_bytes: what is kept in memory; the
    oldest are dropped and computed again when asked for. Features are (tokens, hidden), in the model's dtype.
    """

    def __init__(
        self,
        model,
        processor: Processor,
        file: Callable[[str], Path],
        batch: int = 64,
        limit_bytes: int = 8 << 30,
    ):
        self.model, self.processor, self.file = model, processor, file
        self.batch, self.limit_bytes = batch, limit_bytes
        self.kept: dict[str, torch.Tensor] = {}
        self.grids: dict[str, tuple[int, int]] = {}
        self.bytes = 0
        self.computed = 0

    @torch.no_grad()
    def prepare(self, paths: Iterable[str], label: str | None = None) -> None:
        """Compute what is not there yet, in batches; `label` shows progress under that name."""
        todo = [path for path in dict.fromkeys(paths) if path not in self.kept]
        bar = Progress(len(todo), label, unit="images") if label and todo else None
        merge = self.processor.image_processor.merge_size
        device = next(self.model.parameters()).device
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            pixels, grid = self.processor.pixels([self.file(path) for path in part])
            grid = grid.to(device)
            output = self.model.model.get_image_features(pixels.to(device), grid)
            for path, feature, (_, height, width) in zip(part, output.pooler_output, grid.tolist()):
                self.kept[path] = feature.detach()
                self.grids[path] = (height // merge, width // merge)
                self.bytes += feature.numel() * feature.element_size()
            self.computed += len(part)
            if bar is not None:
                bar.update(len(part))
        if bar is not None:
            bar.__exit__(None, None, None)

    def get(self, paths: list[str]) -> list[torch.Tensor]:
        """The features of `paths`, in order, computed where they are missing."""
        self.prepare(paths)
        found = [self.kept[path] for path in paths]
        needed = set(paths)
        for path in list(self.kept):
            if self.bytes <= self.limit_bytes:
                break
            if path not in needed:
                old = self.kept.pop(path)
                self.bytes -= old.numel() * old.element_size()
        return found
