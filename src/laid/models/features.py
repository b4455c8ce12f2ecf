"""Visual features, computed once per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from laid.data.images import image_size
from laid.models.decoder import text_model, vision_tower
from laid.models.families import family_of
from laid.models.feature_store import FeatureStore
from laid.models.processing import Processor
from laid.models.windows import windows_at_once
from laid.progress import Progress

LEAST = 8  # visual tokens in a pass of the vision tower


class ImageFeatures:
    """The language model's inputs for images, by path; each image goes through the vision tower once.

    Raises LaidError where model and processor are of two checkpoints.

    model: of any family in laid.models.families. file: path in a question -> file on disk. limit_bytes: what is kept in memory;
    the longest unused are dropped and computed again when asked for. store: a folder that keeps them on disk for
    other runs (laid.models.feature_store). Features are (tokens, hidden), or wider where the family
    has several kinds (Family.image_features), in the model's dtype, on its device.
    """

    def __init__(
        self,
        model,
        processor: Processor,
        file: Callable[[str], Path],
        batch: int = 64,
        limit_bytes: int = 8 << 30,
        store: str | Path | None = None,
    ):
        self.model, self.processor, self.file = model, processor, file
        self.family = family_of(text_model(model).config)
        processor.require_fits(model.config)
        self.batch, self.limit_bytes = batch, limit_bytes
        self.kept: dict[str, torch.Tensor] = {}
        self.bytes = 0
        self.computed = 0
        self.store = FeatureStore(store, model, processor) if store is not None else None
        self._grids: dict[str, tuple[int, int]] = {}
        self._others: list[ImageFeatures] = []
        ahead = next(vision_tower(model).parameters()).device.type == "cuda"
        if ahead:  # on a CPU, where nothing is gained, features stay the same bits
            windows_at_once(model)
        self._readers = ThreadPoolExecutor() if ahead else None
        self._read: dict[str, Future[tuple[torch.Tensor, torch.Tensor]]] = {}

    def alongside(self, other: ImageFeatures) -> None:
        """Let `other`, which reads the same files, see every image that is decoded here from now on, so that it decodes none
        again; nothing where its processor would make other patches of them."""
        ours, theirs = (one.processor.image_processor.to_json_string() for one in (self, other))
        if ours == theirs:
            self._others.append(other)

    def grids(self, paths: Sequence[str]) -> list[tuple[int, int]]:
        """Merged grids (height, width) of `paths`, in visual tokens, from the files' headers alone."""
        for path in paths:
            if path not in self._grids:
                file = self.file(path)
                self._grids[path] = self.processor.grid(*image_size(file), file)
        return [self._grids[path] for path in paths]

    def prepare(self, paths: Iterable[str], label: str | None = None) -> None:
        """Compute ahead, in full batches, until the limit is reached; `label` shows progress by that name."""
        todo = [path for path in dict.fromkeys(paths) if path not in self.kept]
        bar = Progress(len(todo), label, unit="images") if label and todo else None
        for start in range(0, len(todo), self.batch):
            if self.bytes >= self.limit_bytes:
                break
            self._compute(todo[start : start + self.batch], todo[start + self.batch : start + 2 * self.batch])
            if bar is not None:
                bar.update(len(todo[start : start + self.batch]))
        if bar is not None:
            bar.__exit__(None, None, None)

    def fill_store(self, paths: Sequence[str]) -> None:
        """Compute what the store lacks of `paths`, keeping nothing in memory."""
        todo = [path for path in paths if not self.store.has(self.file(path))]
        with Progress(len(todo), "images", unit="images") as bar:
            for start in range(0, len(todo), self.batch):
                batch = todo[start : start + self.batch]
                self._compute(batch, todo[start + self.batch : start + 2 * self.batch])
                self.kept, self.bytes = {}, 0
                bar.update(len(batch))

    def get(self, paths: Sequence[str]) -> list[torch.Tensor]:
        """The features of `paths`, in order, computed where they are missing."""
        todo = [path for path in dict.fromkeys(paths) if path not in self.kept]
        for start in range(0, len(todo), self.batch):
            self._compute(todo[start : start + self.batch])
        for path in dict.fromkeys(paths):  # used last, dropped last
            self.kept[path] = self.kept.pop(path)
        found = [self.kept[path] for path in paths]
        while self.bytes > self.limit_bytes and self.kept:
            old = self.kept.pop(next(iter(self.kept)))
            self.bytes -= old.numel() * old.element_size()
        return found

    @torch.no_grad()
    def _compute(self, paths: list[str], next_ones: Sequence[str] = ()) -> None:
        """Bring `paths` into memory; of `next_ones` images are read meanwhile, where a GPU would wait for them."""
        if self.store is not None:
            device = next(vision_tower(self.model).parameters()).device
            stored = self.store.get([self.file(path) for path in paths])
            for path in paths:
                if self.file(path) in stored:
                    self._keep(path, stored[self.file(path)].to(device))
            paths = [path for path in paths if path not in self.kept]
            if not paths:
                return
        # Matrix products of very few rows round otherwise; features must not depend on what they were computed beside.
        tokens = [height * width for height, width in self.grids(paths)]
        filled = [*paths, *[paths[0]] * -(-(LEAST - sum(tokens)) // tokens[0])]
        pixels, grid = self._pixels(filled, next_ones)
        self._see(paths, pixels, grid)
        for other in self._others:
            if other._lacks(paths):
                other._see(paths, pixels, grid)
                if other.store is not None and other.bytes > other.limit_bytes:
                    other.kept, other.bytes = {}, 0

    def _lacks(self, paths: Sequence[str]) -> bool:
        """Whether there is one of `paths` that is neither kept nor stored, and room for it."""
        if self.store is None:
            return self.bytes < self.limit_bytes and not self.kept.keys() >= set(paths)
        return any(path not in self.kept and not self.store.has(self.file(path)) for path in paths)

    def _see(self, paths: Sequence[str], pixels: torch.Tensor, grid: torch.Tensor) -> None:
        """The tower's pass over the images of `paths`, and others behind them that are not looked at."""
        device = next(vision_tower(self.model).parameters()).device
        with torch.autocast(device.type, enabled=False):  # nor on who asks: validation does within a pass
            features = self.family.image_features(self.model, pixels.to(device), grid.to(device))
        for path, feature in zip(paths, features):
            if path not in self.kept:
                self._keep(path, feature.clone())  # not a view: dropping it is to free its memory
        self.computed += len(paths)
        if self.store is not None:
            self.store.put({self.file(path): self.kept[path] for path in paths})

    def _pixels(self, paths: Sequence[str], next_ones: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the vision tower takes of images. For a GPU, threads decode and resize them, one image each, ahead of it.

        Threads, since Pillow and NumPy work without Python's lock, and containers have little memory to share with processes.
        """
        if self._readers is None:
            return self.processor.pixels([self.file(path) for path in paths])
        coming = [p for p in next_ones if self.store is None or not self.store.has(self.file(p))]
        for path in dict.fromkeys([*paths, *coming]):
            if path not in self._read:
                self._read[path] = self._readers.submit(self.processor.pixels, [self.file(path)])
        read = {path: self._read.pop(path).result() for path in dict.fromkeys(paths)}
        pixels, grids = zip(*(read[path] for path in paths))
        return torch.cat(pixels), torch.cat(grids)

    def _keep(self, path: str, feature: torch.Tensor) -> None:
        self.kept[path] = feature
        self.bytes += feature.numel() * feature.element_size()
