"""The conversations of a run as batches: in which order, with which images, at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from laid.data.chat import image_file, read_chats
from laid.distill.dilution import copies, score_bias
from laid.distill.distillation import Tokens
from laid.distill.gaps import open_gaps
from laid.distill.schedule import reach
from laid.errors import LaidError
from laid.models.features import ImageFeatures
from laid.models.forward import Batch, answers_at, collate
from laid.models.processing import Processor
from laid.settings import TrainedMethod
from laid.settings.measuring import Evaluation
from laid.settings.methods import Dilution, Gaps
from laid.training.samples import Sample, batches_of, build_samples, mislabelled


@dataclass
class Piece:
    """Samples of one forward pass. labels: (N,) token ids, of the answers of all samples in order.

    share: how much one of these answer tokens counts beside those of the step's other pieces, so that all count alike.
    apart: of these samples, how many make one L_LAid (0: all).
    """

    indices: Sequence[int]
    inputs: Batch
    tokens: Tokens
    labels: Tensor
    share: float = 1.0
    apart: int = 0

    @classmethod
    def of(cls, indices: Sequence[int], inputs: Batch, labels: Tensor, apart: int = 0) -> Piece:
        """Of samples whose last two tokens predict the answer and the end of the turn: labels (B, 2)."""
        tokens = Tokens(inputs.positions, inputs.token_mask, inputs.lengths - 2)
        return cls(indices, inputs, tokens, labels.flatten(), apart=apart)


@dataclass
class Data:
    """Samples of a question file, as a student (or a teacher that answers as training goes) reads them.

    ordinary: share of samples that gaps and dilution pass over. features: of the model that reads; in_step: features are computed in the step instead, as a trained vision tower needs.
    seed: of order and gaps. packed: prompts are read without padding, and so many make one L_LAid; 0: padded, all together.
    """

    samples: list[Sample]
    features: ImageFeatures
    gaps: Gaps
    dilution: Dilution
    ordinary: float = 0.0
    seed: int = 0
    device: str | torch.device = "cpu"
    in_step: bool = False
    packed: int = 0
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(sample.prompt.ids) for sample in self.samples]

    def order(self, epoch: int, batch: int) -> list[list[int]]:
        """An epoch's batches of `batch` samples, of similar length each."""
        return batches_of(self.lengths, batch, [self.seed, 4, epoch])

    def inputs(self, indices: Sequence[int]) -> Batch:
        """Padded prompts and the features of their images, at ordinary positions."""
        samples = [self.samples[k] for k in indices]
        paths = [path for s in samples for path in s.paths]
        now = [] if self.in_step else [f for s in samples for f in self.features.get(s.paths)]
        batch = collate([s.prompt for s in samples], now)
        batch.answers = answers_at([s.at for s in samples])
        if self.in_step and paths:
            batch.images = self._images(paths)
        if self.packed:
            batch.packed = [self.lengths[k] for k in indices]
        return batch

    def piece(
        self, indices: Sequence[int], step: int, steps: int, among: Sequence[int] | None = None
    ) -> Piece:
        """What a pass over `indices` needs, gapped and diluted as far as `step` of `steps` allows; among: all of its step."""
        inputs = self.inputs(indices)
        if self.gaps.reach or self.dilution.reach:
            inputs.score_bias = torch.zeros(inputs.ids.shape) if self.dilution.reach else None
            for row, sample in enumerate(self.samples[k] for k in indices):
                if self._rng(7, step, sample).random() >= self.ordinary:
                    self._lengthen(inputs, row, sample, step, step / steps)
        labels = torch.from_numpy(np.concatenate([self.samples[k].labels for k in indices]))
        answer = torch.tensor([self.samples[k].answer_at for k in indices])
        inputs, answer = inputs.to(self.device), answer.to(self.device)
        tokens = Tokens(inputs.positions, inputs.token_mask, answer)
        share = self._share(indices, among or indices)
        return Piece(indices, inputs, tokens, labels.to(self.device), share, self.packed)

    def _share(self, indices: Sequence[int], among: Sequence[int]) -> float:
        """A piece's mean over answer tokens counts by its samples: this makes it count by its tokens."""
        part, whole = (sum(len(self.samples[k].labels) for k in some) for some in (indices, among))
        return (part / whole) / (len(indices) / len(among))

    def _rng(self, purpose: int, step: int, sample: Sample) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, step, sample.index])

    def _lengthen(self, inputs: Batch, row: int, sample: Sample, step: int, progress: float) -> None:
        """Open the sample's gaps and dilute its needles, in place."""
        tokens, images, span = len(sample.prompt.ids), len(sample.paths), sample.prompt.span
        starts = sample.prompt.block_starts.tolist()
        if self.gaps.reach:
            far = reach(progress, span, max(span, self.gaps.reach), self.gaps.end)
            inputs.positions[:, row, :tokens] = open_gaps(
                torch.from_numpy(sample.prompt.positions),
                starts,
                sample.text_start,
                far,
                self._rng(3, step, sample),
                draw=self.gaps.draw,
            )
        if self.dilution.reach and sample.needles is not None:
            far = reach(progress, images, max(images, self.dilution.reach), self.dilution.end)
            stands_for = copies(images, len(sample.needles), far, self._rng(5, step, sample))
            inputs.score_bias[row, :tokens] = score_bias(
                tokens, starts, sample.text_start, sample.needles, stands_for
            )

    def _images(self, paths: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels, grid_thw, order) of laid.models.forward.Batch.images: what features are made from in the step."""
        each = {path: k for k, path in enumerate(dict.fromkeys(paths))}
        pixels, grid = self.features.processor.pixels([self.features.file(path) for path in each])
        return pixels, grid, torch.tensor([each[path] for path in paths])


def read_data(
    model: nn.Module,
    processor: Processor,
    questions: str | Path,
    coco: str | Path,
    evaluation: Evaluation,
    method: TrainedMethod,
    store: str | Path | None = None,
    ahead: bool = False,
    other: ImageFeatures | None = None,
    **how: object,
) -> Data:
    """The file or folder `questions` as `model` reads it, images below `coco`.

    store: keeps features for other runs. ahead: compute those of all images now. other: another model's, of the same images.
    how: seed, device, in_step of Data.
    """
    features = ImageFeatures(
        model,
        processor,
        image_file(coco),
        limit_bytes=int(evaluation.feature_cache_gb * 2**30),
        store=store,
    )
    if other is not None:
        features.alongside(other)
    samples = build_samples(read_chats(questions, evaluation.order_seed), features, ahead)
    if method.label_noise:
        samples = mislabelled(samples, method.label_noise, [how.get("seed", 0), 8])
    return Data(samples, features, method.gaps, method.dilution, method.ordinary, **how)


def require_same_tokens(lengths: Sequence[int], teacher: Sequence[int], whose: str) -> None:
    """Raise LaidError where teacher and student read a question in different numbers of tokens."""
    if list(lengths) == list(teacher):
        return
    differing = (k for k, (a, b) in enumerate(zip(lengths, teacher, strict=False)) if a != b)
    at = next(differing, min(len(lengths), len(teacher)))
    raise LaidError(
        f"{whose}: teacher and student do not see the same tokens: question {at} has {list(teacher[at : at + 1])} tokens for"
        f" the teacher and {list(lengths[at : at + 1])} for the student: both need one tokenizer and one image size"
    )
