"""The losses of one batch: what the student says and looks at, against the labels and the teacher (paper, eq. 7 and 8).

    outputs of student and teacher  ->  {"sft", "kl", "laid"}  ->  Objective.total  ->  L_total

SFT and KL are those of every answer token. Logits are made for ROWS of them at a time and forgotten, those of the teacher too, so
that an answer of a thousand tokens needs no thousand rows of a vocabulary.

`Distillation` holds what is learned beside the student of the teacher's heads, w of eq. 7. It sees tensors and a method's
settings alone: where the teacher's come from, a cache or a pass of its own, is not its business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import checkpoint

from laid.distill.alignment import HeadAlignment
from laid.distill.kl import TopK, kl_rows
from laid.distill.objective import Objective
from laid.distill.schedule import DistanceSchedule, distance_to_answer
from laid.errors import LaidError
from laid.models.capture import LayerQK
from laid.models.decoder import Geometry, layer_indices, rotate

if TYPE_CHECKING:
    from laid.settings import TrainedMethod

ROWS = 128  # of logits at a time: 78 MB of float32 at a vocabulary of 151,936


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
    """words: the losses at answer tokens, means over the batch's N. heads: layer -> its queries and keys."""

    words: dict[str, Tensor]
    heads: dict[int, LayerQK]


register_dataclass(StudentOutputs)  # so that what shards a student sees its tensors


@dataclass
class Unsaid:
    """Logits not made yet: hidden (n, hidden) of the last layer, and the head that makes logits of them."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]

    def __getitem__(self, part: slice) -> Tensor:
        with torch.no_grad():
            return self.head(self.hidden[part]).float()

    def __len__(self) -> int:
        return len(self.hidden)

    def to(self, _device: torch.device | str) -> Unsaid:
        return self  # it computes where its head lies


Said = Tensor | TopK | Unsaid  # (n, vocabulary), whole or not; a slice of it gives a Tensor or TopK


@dataclass
class TeacherOutputs:
    """logits: at the batch's N answer tokens, (N, vocabulary) or (B, 2, vocabulary); or in parts, [(which of the N, logits)], which
    together are all; None where they were not asked for. heads: layer -> queries (B, heads, T, head_dim) and keys
    (B, kv_heads, T, head_dim) before rotation, padded right, of any format.
    """

    logits: Said | list[tuple[Tensor, Said]] | None = None
    heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def said(self) -> list[tuple[Tensor | None, Said]]:
        """Parts as above; None stands for all."""
        if isinstance(self.logits, list):
            return self.logits
        logits = self.logits
        return [(None, logits.flatten(0, -2) if isinstance(logits, Tensor) else logits)]

    def to(self, device: torch.device | str) -> TeacherOutputs:
        heads = {layer: (q.to(device), k.to(device)) for layer, (q, k) in self.heads.items()}
        if isinstance(self.logits, list):
            return TeacherOutputs([(which.to(device), part.to(device)) for which, part in self.logits], heads)
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

    def words(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, teacher: TeacherOutputs
    ) -> dict[str, Tensor]:
        """SFT and KL, as far as they ever have weight, means over N answer tokens.

        head: hidden states to logits. hidden: (N, hidden) of the tokens that predict them. labels: (N,) token ids.
        """
        wanted = [part for part in ("sft", "kl") if self.needs(part)]
        if not wanted:
            return {}
        sums = [0.0] * len(wanted)
        temperature, count = self.method.temperature, len(labels)

        def losses(hidden: Tensor, labels: Tensor, said: Said | None, part: slice) -> list[Tensor]:
            logits = head(hidden)
            found = []
            if self.needs("sft"):
                found.append(F.cross_entropy(logits.float(), labels, reduction="sum"))
            if said is not None:
                found.append(kl_rows(logits, said[part].to(logits.device), temperature).sum())
            return found

        for which, said in teacher.said if self.needs("kl") else [(None, None)]:
            own, named = (hidden, labels) if which is None else (hidden[which], labels[which])
            for start in range(0, len(named), ROWS):
                part = slice(start, start + ROWS)
                args = own[part], named[part], said, part
                if count > ROWS:  # logits are made again in backward
                    found = checkpoint(losses, *args, use_reentrant=False, preserve_rng_state=False)
                else:
                    found = losses(*args)
                sums = [a + b for a, b in zip(sums, found, strict=True)]
        scale = {"sft": 1.0, "kl": temperature**2}
        return {part: scale[part] * (total / count) for part, total in zip(wanted, sums, strict=True)}

    def forward(
        self,
        student: StudentOutputs,
        teacher: TeacherOutputs,
        tokens: Tokens,
        progress: float,
        apart: int = 0,
    ) -> dict[str, Tensor]:
        """The parts of eq. 8 that ever have weight, scalars; L_LAid is summed over pairs of layers.

        progress: in [0, 1]. apart: samples that make one L_LAid, which is normalised over their tokens; the batch's is the mean
        (0: all samples).
        """
        method = self.method
        parts = dict(student.words)
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
