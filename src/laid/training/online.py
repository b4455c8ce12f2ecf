"""A teacher that answers as training goes: what the cache replaces, and what its content is made by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from laid.models.capture import LayerQK, QKCapture
from laid.models.decoder import geometry, layer_indices
from laid.models.forward import Batch, hidden_states, logits_at


@torch.no_grad()
def teacher_outputs(
    model: nn.Module, inputs: Batch, layers: Sequence[int]
) -> tuple[Tensor, dict[int, LayerQK]]:
    """One pass: (B, 2, vocabulary) logits at the last two tokens; queries and keys before rotation."""
    if layers:
        with QKCapture(model, layers) as capture:
            hidden = hidden_states(model, inputs)
            caught = capture.take()
    else:
        hidden, caught = hidden_states(model, inputs), {}
    count = len(inputs.lengths)
    rows = torch.arange(count, device=hidden.device).repeat_interleave(2)
    columns = torch.stack([inputs.lengths - 2, inputs.lengths - 1], 1).flatten()
    return logits_at(model, hidden, rows, columns).view(count, 2, -1), caught


class OnlineTeacher:
    """Serves `laid.training.losses.Losses` as a TeacherCache does, with a pass of the teacher for every batch.

    model: the teacher. layers: those whose queries and keys are asked for. batch: sample indices -> the
    teacher's inputs, in its own features, at ordinary positions.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], batch: Callable[[Sequence[int]], Batch]):
        shape = geometry(model)
        self.model, self.batch = model, batch
        self.layers = layer_indices(layers, shape.layers) if layers else ()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.depth = shape.layers
        self._seen: tuple[int, ...] | None = None

    def logits(self, indices: Sequence[int]) -> Tensor:
        """(B, 2, vocabulary) float32 logits at the answer and after it."""
        return self._pass(indices)[0].float()

    def queries_keys(self, layer: int, indices: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """(B, heads, tokens, head_dim), (B, kv_heads, tokens, head_dim) of an absolute layer."""
        qk = self._pass(indices)[1][layer]
        return qk.q, qk.k

    def _pass(self, indices: Sequence[int]) -> tuple[Tensor, dict[int, LayerQK]]:
        if tuple(indices) != self._seen:
            self._found = teacher_outputs(self.model, self.batch(indices), self.layers)
            self._seen = tuple(indices)
        return self._found
