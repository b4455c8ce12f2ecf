"""One training step: batch -> teacher -> student -> losses -> total -> backward, and then the optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laid.distill.distillation import Distillation, TeacherOutputs
from laid.distill.gain import RopeGain
from laid.distill.objective import PARTS
from laid.distill.schedule import learning_rate_factor
from laid.models.decoder import geometry
from laid.settings import TrainedMethod
from laid.settings.training import Training as TrainingSettings
from laid.training.data import Data, Piece
from laid.training.engine import Engine
from laid.training.student import Student
from laid.training.teacher import Teacher


@dataclass
class Lesson:
    """A student and what it learns from.

    student: the pass, wrapped by whatever lays it out over processes. gain: attached to it by hooks. every_weight: the wrapper waits for a gradient of every weight.
    """

    student: nn.Module
    distillation: Distillation
    teacher: Teacher | None = None
    gain: RopeGain | None = None
    every_weight: bool = False

    @property
    def learned(self) -> dict[str, nn.Module]:
        """What is learned beside the student, small and whole in every process."""
        found: dict[str, nn.Module] = {"alignment": self.distillation.alignments}
        return found | ({"gain": self.gain} if self.gain is not None else {})


def lesson_of(model: nn.Module, method: TrainedMethod, teacher: Teacher | None) -> Lesson:
    """A model, its adapter in place, under a method. Raises LaidError where layers or heads do not fit."""
    device, shape = next(model.parameters()).device, geometry(model)
    gain = None
    if method.gain:
        gain = RopeGain(model).to(device).attach(model)
    distillation = Distillation(method, shape, teacher).to(device)
    return Lesson(Student(model, distillation), distillation, teacher, gain)


def forward_backward(
    lesson: Lesson, piece: Piece, progress: float, engine: Engine | None = None, share: float = 1.0
) -> dict[str, Tensor]:
    """batch -> teacher -> student -> losses -> total -> backward. Returns the losses by part, and their total as "".

    share: by how much these samples count in their step. engine: the other processes, if any.
    """
    distillation, tokens = lesson.distillation, piece.tokens
    taught = TeacherOutputs()
    if lesson.teacher is not None:
        wanted = (piece.indices, tokens.real.shape[1], distillation.teacher_layers, distillation.needs("kl"))
        taught = lesson.teacher.outputs(*wanted).to(tokens.real.device)
    student = lesson.student(piece.inputs, piece.labels, taught)
    unused = student.words.pop("", None)  # of a student that gives no logits
    losses = distillation(student, taught, tokens, progress, piece.apart)
    for name in student.words if piece.share != 1 else ():
        losses[name] = losses[name] * piece.share
    total = distillation.objective.total(losses)
    if lesson.every_weight and unused is not None:
        total = total + unused
    del student, taught  # backward keeps what it needs
    if torch.is_grad_enabled():
        (engine.backward if engine else Tensor.backward)(total * share)
    return {**losses, "": total}


@dataclass
class Training:
    """All that the steps of a run need.

    optimizer: AdamW over `weights` of the student and those learned `beside` it. peaks: the highest learning rate of each of
    its groups. steps: in all.
    """

    settings: TrainingSettings
    lesson: Lesson
    data: Data
    engine: Engine
    optimizer: torch.optim.Optimizer
    weights: list[nn.Parameter]
    beside: list[nn.Parameter]
    peaks: list[float]
    steps: int


def training_step(t: Training, indices: Sequence[int], step: int) -> dict[str, float]:
    """One step of the optimiser over the samples `indices`, in pieces of per_device_batch, or of several such together as
    tokens_per_pass allows; returns a line for the log.

    Every piece counts by its share of the samples, whichever process computes it.
    """
    progress = step / t.steps
    factor = learning_rate_factor(step, t.steps, t.settings.warmup, t.settings.schedule)
    for group, peak in zip(t.optimizer.param_groups, t.peaks, strict=True):
        group["lr"] = peak * factor
    sums: dict[str, float] = {}
    pieces = t.engine.pieces(indices, t.settings.per_device_batch, t.data.lengths, t.settings.tokens_per_pass)
    for part in pieces:
        # Dropout follows from step and samples alone, so that resuming is exact, in however many processes.
        # The device's generator alone: torch.manual_seed writes a stack trace for every kind of device that has not begun.
        generator = torch.cuda if t.engine.device.type == "cuda" else torch.default_generator
        generator.manual_seed(t.data.seed * 1_000_003 + step + (indices.index(part[0]) << 32))
        piece, share = t.data.piece(part, step, t.steps, indices), len(part) / len(indices)
        with t.engine.accumulating(t.lesson.student, last=part is pieces[-1]):
            found = forward_backward(t.lesson, piece, progress, t.engine, share)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + share * float(value.detach())
    sums = dict(zip(sums, t.engine.sum(sums.values()), strict=True))
    norm = t.engine.step(t.optimizer, t.weights, t.beside, t.settings.max_grad_norm)
    return {
        "step": step + 1,
        **{f"loss_{name}" if name else "loss": round(value, 6) for name, value in sums.items()},
        "grad_norm": round(norm, 6),
        "lr": t.peaks[0] * factor,
        "distance_emphasis": progress,
        **_weights_now(t.lesson),
    }


def _weights_now(lesson: Lesson) -> dict[str, float]:
    """The lambdas, and how far the gains have moved."""
    objective, gain = lesson.distillation.objective, lesson.gain
    line = {f"lambda_{part}": getattr(objective, part) for part in PARTS if objective.needs(part)}
    if gain is not None:
        gains = gain.gains().detach()
        line |= {f"gain_{name}": float(getattr(gains, name)()) for name in ("min", "mean", "max")}
    return line
