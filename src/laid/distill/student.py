"""Which weights of a student are trained, and whether its activations are kept or computed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from laid.errors import LaidError
from laid.methods.decoder import text_model


def make_trainable(
    model: nn.Module, lora: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> nn.Module:
    """Freeze all but an adapter (lora: the method's section of that name) or the language model; returns the model.

    settings: the section `training`. Raises LaidError for train_vision.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
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
        for part in (text_model(model), model.get_output_embeddings()):
            part.requires_grad_(True)
    if settings["train_vision"]:
        raise LaidError(
            "training.train_vision: true needs features computed anew in every step; set it to false"
        )
    if settings["gradient_checkpointing"]:
        text_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model
