"""The student: which of its weights are trained, and its pass in a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laid.distill.distillation import Distillation, StudentOutputs, TeacherOutputs
from laid.errors import LaidError
from laid.models.capture import LayerQK, QKCapture
from laid.models.decoder import text_model, vision_tower
from laid.models.forward import Batch, hidden_states, packs, padded, with_features
from laid.settings.methods import Lora
from laid.settings.training import Training


def make_trainable(model: nn.Module, lora: Lora | None, training: Training) -> nn.Module:
    """Freeze all but an adapter (lora: the method's section of that name) or the language model; returns the model.

    training.train_vision trains the vision tower too. What is trained is kept in float32 whatever the rest is in: a step of
    1e-5 is lost in a bfloat16 weight. Raises LaidError for an adapter with train_vision.
    """
    model.requires_grad_(False)
    parts = [text_model(model)]
    if training.train_vision:
        if lora is not None:
            raise LaidError(
                "training.train_vision is true, but the method trains an adapter, and an adapter holds no vision tower:"
                " set the method's lora to null, or train_vision to false"
            )
        parts.append(vision_tower(model))
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                # the language model's layers only: the vision tower has projections of the same names
                target_modules=rf".*language_model\.layers\.\d+\..*\.({'|'.join(lora.targets)})",
            ),
        )
    else:
        for part in (*parts, model.get_output_embeddings()):
            part.requires_grad_(True)
    if training.gradient_checkpointing:
        for part in parts:
            part.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class Student(nn.Module):
    """The pass of a student, as a module, so that whatever wraps or shards it sees the whole pass as one forward.

    model: adapters in place. distillation: makes losses of its answer tokens' logits, in the pass, and says whose layers' queries
    and keys are caught; what it learns itself is no part of this module.
    """

    def __init__(self, model: nn.Module, distillation: Distillation) -> None:
        super().__init__()
        self.model, self.layers, self.words = model, distillation.student_layers, distillation.words

    def forward(
        self,
        inputs: Batch | Callable[[nn.Module], Any],
        labels: Tensor | None = None,
        teacher: TeacherOutputs | None = None,
    ) -> StudentOutputs | Any:
        """labels: (N,) what is predicted at `inputs.answer_places`. teacher: its logits there.

        Instead of a batch: any work with the model, for which the wrapper has its weights at hand as for a pass.
        """
        if callable(inputs):
            return inputs(self.model)
        hidden, caught = answer_states(self.model, with_features(self.model, inputs), self.layers)
        head = self.model.get_output_embeddings()
        words = self.words(head, hidden, labels, teacher)
        # The head takes part in every pass: a wrapper may wait for its gradient.
        return StudentOutputs(words or {"": 0.0 * head(hidden[:1]).float().sum()}, caught)


def compute_in(student: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Let a student's passes compute in `dtype`, by autocast; what is made of its outputs does not.

    As Accelerate does it for a student that lies whole; for those that it does not prepare.
    """
    if dtype != torch.float32:
        student.forward = torch.autocast(torch.device(device).type, dtype)(student.forward)


def answer_states(
    model: nn.Module, inputs: Batch, layers: Sequence[int]
) -> tuple[Tensor, dict[int, LayerQK]]:
    """One pass: (N, hidden) of the last layer where `inputs` predicts answers; queries and keys of `layers` before rotation."""
    caught: dict[int, LayerQK] = {}
    if layers:
        with QKCapture(model, layers) as capture:
            hidden = hidden_states(model, inputs)
            caught = capture.take()
    else:
        hidden = hidden_states(model, inputs)
    if caught and packs(text_model(model), inputs):
        caught = {layer: _padded(qk, inputs) for layer, qk in caught.items()}
    rows, columns = (x.to(hidden.device) for x in inputs.answer_places)
    return hidden[rows, columns], caught


def _padded(qk: LayerQK, inputs: Batch) -> LayerQK:
    """What was caught of packed samples, as a padded batch."""
    heads = (padded(x, inputs, 2) for x in (qk.q, qk.k))
    return LayerQK(*heads, *(padded(x, inputs) for x in (qk.cos, qk.sin)))
