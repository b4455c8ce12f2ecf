"""Which weights of a student are trained, and whether its activations are kept or computed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from laid.errors import LaidError
from laid.models.decoder import text_model, vision_tower


def make_trainable(
    model: nn.Module, lora: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> nn.Module:
    """Freeze all but an adapter (lora: the method's section of that name) or the language model; returns the model.

    settings: the section `training`; its train_vision trains the vision tower too. What is trained is kept in float32
    whatever the rest is in: a step of 1e-5 is lost in a bfloat16 weight. Raises LaidError for an adapter with
    train_vision.
    """
    model.requires_grad_(False)
    parts = [text_model(model)]
    if settings["train_vision"]:
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
                r=lora["rank"],
                lora_alpha=lora["alpha"],
                lora_dropout=lora["dropout"],
                # the language model's layers only: the vision tower has projections of the same names
                target_modules=rf".*language_model\.layers\.\d+\..*\.({'|'.join(lora['targets'])})",
            ),
        )
    else:
        for part in (*parts, model.get_output_embeddings()):
            part.requires_grad_(True)
    if settings["gradient_checkpointing"]:
        for part in parts:
            part.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
