"""The losses of one batch: what the student says and looks at, against the labels and the teacher (paper, eq. 7 and 8).

    outputs of student and teacher  ->  {"sft", "kl", "laid"}  ->  Objective.total  ->  L_total

`Distillation` holds what is learned beside the student of the teacher's heads, w of eq. 7. It sees tensors and a method's
settings alone: where the teacher's come from, a cache or a pass of its own, is not its business.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_dataclass

from laid.distill.alignment import HeadAlignment
from laid.distill.kl import forward_kl
from laid.distill.objective import Objective
from laid.distill.schedule import DistanceSchedule, distance_to_answer
from laid.errors import LaidError
from laid.models.capture import LayerQK
from laid.models.decoder import Geometry, layer_indices, rotate

if TYPE_CHECKING:
    from laid.settings import TrainedMethod


@dataclass
class Tokens:
    """What is known of a batch's B x T tokens.

    positions: (3, B, T) of the student's pass. real: (B, T), true where a token is no padding. answer: (B,), the token that
    predicts the answer.
    """

    positions: Tensor
    real: Tensor
    answer: Tensor


@dataclass
class StudentOutputs:
    """logits: (B, 2, vocabulary) at the answer and after it. heads: layer -> its queries and keys."""

    logits: Tensor
    heads: dict[int, LayerQK]


register_dataclass(StudentOutputs)  # so that what shards a student sees its tensors


@dataclass
class TeacherOutputs:
    """logits: (B, 2, vocabulary) at the answer and after it, None where they were not asked for. heads: layer -> queries
    (B, heads, T, head_dim) and keys (B, kv_heads, T, head_dim) before rotation, padded right, of any format.
    """

    logits: Tensor | None = None
    heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> TeacherOutputs:
        heads = {layer: (q.to(device), k.to(device)) for layer, (q, k) in self.heads.items()}
        return replace(self, logits=None if self.logits is None else self.logits.to(device), heads=heads)


class Heads(Protocol):
    """The sizes of a teacher's attention; depth: its number of layers."""

    heads: int
    kv_heads: int
    head_dim: int
    depth: int


class Distillation(nn.Module):
    """Losses of a student under one method, and w of eq. 7, which they learn.

    method: lambdas, temperature, alignment, distance, gaps.reach. student, teacher: the sizes of their attention (teacher
    None: no teacher's part has weight). Raises LaidError where layers or heads do not fit.
    """

    def __init__(self, method: TrainedMethod, student: Geometry, teacher: Heads | None) -> None:
        super().__init__()
        self.method = method
        self.objective = Objective.of(method)
        self.distance = DistanceSchedule(method.distance.strength)
        self.pairs: list[tuple[int, int]] = []
        self.alignments = nn.ModuleDict()
        if not self.needs("laid"):
            return
        how = method.alignment
        if student.head_dim != teacher.head_dim and how.rotation == "after":
            raise LaidError(
                f"alignment.rotation: after turns the teacher's heads by the student's RoPE, but head_dim is"
                f" {student.head_dim} in the student and {teacher.head_dim} in the teacher: compare before rotation, with"
                " alignment.projection: true"
            )
        for own, theirs in how.pairs:
            pair = (layer_indices(own, student.layers)[0], layer_indices(theirs, teacher.depth)[0])
            self.pairs.append(pair)
            self.alignments[_key(pair)] = HeadAlignment(
                student.heads, student.kv_heads, teacher.heads, teacher.kv_heads, student.head_dim, teacher.head_dim,
                how.key_weights, how.projection,
            )  # fmt: skip

    def needs(self, part: str) -> bool:
        """Whether "sft", "kl" or "laid" ever has weight."""
        return self.objective.needs(part)

    @property
    def student_layers(self) -> list[int]:
        """Layers of the student whose queries and keys are looked at."""
        return sorted({s for s, _ in self.pairs})

    @property
    def teacher_layers(self) -> list[int]:
        """Layers of the teacher whose queries and keys are looked at."""
        return sorted({t for _, t in self.pairs})

    def forward(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        tokens: Tokens,
        labels: Tensor,
        progress: float,
        apart: int = 0,
    ) -> dict[str, Tensor]:
        """The parts of eq. 8 that ever have weight, scalars; L_LAid is summed over pairs of layers.

        labels: (B, 2) token ids. progress: in [0, 1]. apart: samples that make one L_LAid, which is normalised over their tokens; the
        batch's is the mean (0: all samples).
        """
        logits = student.logits
        method = self.method
        parts: dict[str, Tensor] = {}
        if self.needs("sft"):
            parts["sft"] = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        if self.needs("kl"):
            parts["kl"] = forward_kl(logits, teacher.logits, method.temperature)
        if self.needs("laid"):
            distance = distance_to_answer(tokens.positions, tokens.answer)
            weights = self.distance.weights(distance, progress, tokens.real, method.gaps.reach or None)
        rows = len(tokens.answer)
        for pair in self.pairs:
            compared = self._compared(student.heads[pair[0]], teacher.heads[pair[1]])
            how, alignment = method.alignment, self.alignments[_key(pair)]
            for start in range(0, rows, apart or rows):
                part = slice(start, start + (apart or rows))
                loss = alignment(
                    *(x[part] for x in (*compared, tokens.real, weights)), how.norm, how.normalize
                )
                parts["laid"] = parts.get("laid", 0.0) + loss * (len(tokens.answer[part]) / rows)
        return parts

    def _compared(self, own: LayerQK, theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys of the student, then of the teacher, before or after rotation."""
        if self.method.alignment.rotation == "after":
            return *own.rotated(), *(rotate(x, own.cos, own.sin) for x in theirs)
        return own.q, own.k, *theirs


def _key(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"
