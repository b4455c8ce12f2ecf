"""LAid in a training loop of one's own: `LaidLoss` takes two models and a batch as transformers has them. See docs/reference/api.md.

It is the loss of `laid train`: the same `laid.distill.Distillation`, fed by hooks instead of by laid's own prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laid.distill.distillation import (
    Distillation,
    Heads,
    StudentOutputs,
    TeacherOutputs,
    Tokens,
    Unsaid,
)
from laid.errors import LaidError
from laid.models.capture import LayerQK, QKCapture
from laid.models.decoder import Geometry, geometry, text_model
from laid.settings import TrainedMethod

IGNORED = -100  # the label of a token that is no answer, as transformers has it


class LaidLoss(nn.Module):
    """L_total = lambda_laid L_LAid + lambda_kl L_KL + lambda_sft L_SFT (the paper's eq. 8), of a student beside its teacher.

        loss = LaidLoss(student, teacher, lambda_laid=0.3, lambda_kl=0.3, lambda_sft=0.7)
        optimizer = AdamW([*student.parameters(), *loss.parameters()])      # w of eq. 7 is learned too
        loss(student, teacher, batch, progress=step / steps)["loss"].backward()

    student, teacher: vision-language models of a family that laid knows, wrapped or not; only their sizes are read here. The teacher
    may be a `TeacherCache` (heads, kv_heads, head_dim, depth).
    pairs: (student layer, teacher layer) that eq. 7 compares; negative numbers count from the end. temperature: of the KL.
    distance_strength: extra weight in eq. 7 of a token `reach` positions before the answer when training ends; reach 0 takes each
    sample's own farthest. key_weights, rotation, norm, normalize, projection: as methods.<name>.alignment (docs/reference/settings.md).
    Parameters: w of each pair, and what projection learns. Raises LaidError where layers or heads do not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Heads,
        *,
        lambda_laid: float = 0.3,
        lambda_kl: float = 0.3,
        lambda_sft: float = 0.7,
        temperature: float = 2.0,
        pairs: Sequence[tuple[int, int]] = ((-1, -1),),
        key_weights: str = "shared",
        rotation: str = "before",
        norm: str = "mean",
        normalize: bool = True,
        projection: bool = False,
        distance_strength: float = 0.0,
        reach: int = 0,
    ) -> None:
        super().__init__()
        method = TrainedMethod().changed(
            {
                "lambda_laid": lambda_laid,
                "lambda_kl": lambda_kl,
                "lambda_sft": lambda_sft,
                "temperature": temperature,
                "alignment": {
                    "pairs": [list(pair) for pair in pairs],
                    "key_weights": key_weights,
                    "rotation": rotation,
                    "norm": norm,
                    "normalize": normalize,
                    "projection": projection,
                },
                "distance": {"strength": distance_strength},
                "gaps": {"reach": reach},
            }
        )
        shape = _Sizes(geometry(teacher)) if isinstance(teacher, nn.Module) else teacher
        self.distillation = Distillation(method, geometry(student), shape)

    @property
    def teacher_layers(self) -> list[int]:
        """Absolute numbers of the teacher's layers whose queries and keys are compared: what to ask a TeacherCache for."""
        return self.distillation.teacher_layers

    def forward(
        self,
        student: nn.Module,
        teacher: nn.Module | TeacherOutputs | None,
        batch: Mapping[str, Any],
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """{"loss": total, and its parts "sft", "kl", "laid" as far as they have weight}, scalars.

        student: passes `batch` once, without its labels; logits are made for answer tokens alone, in chunks. teacher: passes it too,
        without gradients; or what a TeacherCache gave for these samples; None where no part needs it.
        batch: as the model's processor makes it (input_ids (B, T), attention_mask, pixel_values, ... and position_ids, where they
        are gapped), and labels (B, T), -100 where a token is no answer. What stands behind the last answer is not compared.
        progress: steps done / all steps, in [0, 1].
        Raises LaidError for labels without an answer, and where the student gives no position ids.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        rows, columns, labels, answer, last = _answers(batch["labels"])
        real = torch.arange(batch["labels"].shape[1], device=last.device) <= last[:, None]
        if inputs.get("attention_mask") is not None:
            real = real & inputs["attention_mask"].bool()
        own = _Pass(student, inputs, self.distillation.student_layers)
        if isinstance(teacher, nn.Module):
            with torch.no_grad():
                theirs = _Pass(teacher, inputs, self.teacher_layers)
            said = Unsaid(theirs.hidden[rows, columns], theirs.head)
            teacher = TeacherOutputs(said, {layer: (qk.q, qk.k) for layer, qk in theirs.caught.items()})
        taught = (teacher or TeacherOutputs()).to(own.hidden.device)
        words = self.distillation.words(own.head, own.hidden[rows, columns], labels, taught)
        tokens = Tokens(own.positions, real, answer)
        parts = self.distillation(StudentOutputs(words, own.caught), taught, tokens, progress)
        return {"loss": self.distillation.objective.total(parts), **parts}


class _Sizes:
    """A model's Geometry under the names of `Heads`."""

    def __init__(self, shape: Geometry) -> None:
        self.heads, self.kv_heads, self.head_dim, self.depth = (
            shape.heads, shape.kv_heads, shape.head_dim, shape.layers,
        )  # fmt: skip


class _Pass:
    """One pass of a model over a batch: hidden (B, T, hidden) of the last layer, positions (3, B, T), caught queries and keys."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int]) -> None:
        text, seen = text_model(model), {}

        def before(_module, _args, kwargs) -> None:
            seen["positions"] = kwargs.get("position_ids")

        def after(_module, _args, output) -> None:
            seen["hidden"] = output.last_hidden_state

        hooks = [
            text.register_forward_pre_hook(before, with_kwargs=True), text.register_forward_hook(after),
        ]  # fmt: skip
        self.caught: dict[int, LayerQK] = {}
        try:
            if layers:
                with QKCapture(model, layers) as capture:
                    model(**inputs, logits_to_keep=1, use_cache=False)
                    self.caught = capture.take()
            else:
                model(**inputs, logits_to_keep=1, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if seen.get("positions") is None:
            raise LaidError(
                "the model made no position ids: give mm_token_type_ids as its processor makes them, or position_ids (3, B, T)"
            )
        self.hidden, self.positions = seen["hidden"], seen["positions"][-3:]
        self.head = getattr(model, "module", model).get_output_embeddings()


def _answers(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(rows, columns) of the N tokens that predict answers and (N,) what they predict; per row (B,) the token that predicts the last
    answer's first token, and the last one that predicts any."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    if not bool(predicts.any(1).all()):
        raise LaidError(f"labels: a sample has no answer: every label but its first is {IGNORED}")
    begins = predicts.clone()
    begins[:, 1:] &= ~predicts[:, :-1]
    at = torch.arange(labels.shape[1], device=labels.device)
    rows, columns = predicts.nonzero(as_tuple=True)
    return rows, columns, labels[rows, columns + 1], (begins * at).amax(1), (predicts * at).amax(1)
