"""The teacher of a training step: read from its cache, or a model that answers as training goes.

Either gives the same: its logits at the answers, and queries and keys of the layers that are looked at. The cache is
`laid.training.teacher_cache.TeacherCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from laid.distill.distillation import TeacherOutputs, Unsaid
from laid.models.capture import LayerQK
from laid.models.decoder import geometry
from laid.models.features import ImageFeatures
from laid.models.forward import Batch
from laid.training.student import answer_states


class Teacher(Protocol):
    """heads, kv_heads, head_dim: of its attention. depth: its number of layers. lengths: tokens it reads of each question."""

    heads: int
    kv_heads: int
    head_dim: int
    depth: int
    lengths: Sequence[int]

    def outputs(
        self, indices: Sequence[int], tokens: int, layers: Sequence[int], logits: bool = True
    ) -> TeacherOutputs:
        """What it says at every answer token and looks at, for the samples `indices` (places in the question file), padded to `tokens`, of absolute `layers`."""


@torch.no_grad()
def teacher_outputs(
    model: nn.Module, inputs: Batch, layers: Sequence[int]
) -> tuple[Tensor, dict[int, LayerQK]]:
    """One pass without gradients: (B, 2, vocabulary) logits at the last two tokens; queries and keys before rotation."""
    states, caught = answer_states(model, inputs, layers)
    return model.get_output_embeddings()(states).view(len(inputs.lengths), 2, -1), caught


class OnlineTeacher:
    """A pass of the teacher for every batch.

    batch: sample indices -> the teacher's inputs, in its own features, at ordinary positions. features: those, where they are
    computed as training goes.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Callable[[Sequence[int]], Batch],
        lengths: Sequence[int] = (),
        features: ImageFeatures | None = None,
    ) -> None:
        shape = geometry(model)
        self.model, self.batch, self.lengths, self.features = model, batch, lengths, features
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.depth = shape.layers

    def outputs(
        self, indices: Sequence[int], tokens: int, layers: Sequence[int], logits: bool = True
    ) -> TeacherOutputs:
        with torch.no_grad():
            states, caught = answer_states(self.model, self.batch(indices), layers)
        said = Unsaid(states, self.model.get_output_embeddings()) if logits else None
        return TeacherOutputs(said, {layer: (qk.q, qk.k) for layer, qk in caught.items()})
