"""YaRN (Peng et al. 2024) on M-RoPE, through transformers' own rope parameters.

Frequencies that turned often within the trained positions stay, those that turned less than once are divided by `factor`,
a linear ramp between; cos and sin are both multiplied by 0.1 ln(factor) + 1, so attention logits by its square.
On M-RoPE this is uneven, because each axis owns a range of frequencies. With head_dim 128, base 1e6 and 32,768 trained
positions the ramp runs over frequencies 23 to 40 and the sections are 16 (time), 24 (height), 24 (width): time keeps its
frequencies, height is ramped, width is divided by the factor.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from laid.errors import LaidError
from laid.models.decoder import Applied, geometry, text_model

AXES = ("all", "time", "image_base")


def apply_yarn(
    model: nn.Module,
    factor: float,
    original_max_position_embeddings: int,
    axes: str = "all",
    attention_factor: float | None = None,
    beta_fast: float = 32,
    beta_slow: float = 1,
) -> Applied:
    """Put YaRN on the decoder of `model`, in place; nothing else changes and there is nothing to train.

    original_max_position_embeddings: M-RoPE positions (not tokens) that the model was trained to; Qwen2.5-VL: 32,768.
        Its config's max_position_embeddings, 128,000, is not that number, so it is asked for here.
    axes: "all" is transformers' own YaRN, written to the config, so that a saved checkpoint carries it. Two variants,
        kept in memory only: "time" changes the time section alone (the axis that orders text and images; height and
        width keep frequencies and scale), "image_base" turns a token by its base position (text position, or where
        its image begins) with YaRN's frequencies and by its offset inside the image with the trained ones, so that
        the layout inside an image stays as trained.
    attention_factor: None is 0.1 ln(factor) + 1.
    Raises LaidError on a factor below 1, unknown axes, and a model that has another scaling already.
    """
    if axes not in AXES:
        raise LaidError(f"yarn: axes is {axes!r}, allowed: {', '.join(AXES)}")
    if factor < 1:
        raise LaidError(
            f"yarn: factor is {factor}, must be at least 1 (positions wanted / positions trained)"
        )
    if original_max_position_embeddings < 1:
        raise LaidError(
            f"yarn: original_max_position_embeddings is {original_max_position_embeddings}, must be above 0"
        )
    text = text_model(model)
    before, rotary = text.config.rope_parameters, text.rotary_emb
    kind = before.get("rope_type", "default")
    if kind != "default":
        raise LaidError(f"yarn: the model has rope_type {kind!r} already; start from one with 'default'")
    parameters = {k: v for k, v in before.items() if k != "type"} | {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": int(original_max_position_embeddings),
        "beta_fast": float(beta_fast),
        "beta_slow": float(beta_slow),
    }
    if attention_factor is not None:
        parameters["attention_factor"] = float(attention_factor)

    if axes == "all":
        text.config.rope_parameters = parameters
        text.rotary_emb = type(rotary)(text.config).to(rotary.inv_freq.device)
    else:
        changed = copy.deepcopy(text.config)
        changed.rope_parameters = parameters
        yarn = type(rotary)(changed).to(rotary.inv_freq.device)
        axis = geometry(text.config).axis_of_frequency().to(rotary.inv_freq.device)
        text.rotary_emb = (_TimeOnly if axes == "time" else _ImageBase)(rotary, yarn, axis)

    def undo():
        text.config.rope_parameters, text.rotary_emb = before, rotary

    return Applied(undo)


class _Variant(nn.Module):
    """A rotary embedding made of the trained one and YaRN's. forward: x (any), position_ids (3, batch, tokens)."""

    def __init__(self, trained: nn.Module, yarn: nn.Module, axis: torch.Tensor) -> None:
        super().__init__()
        self.trained, self.yarn = trained, yarn
        self.register_buffer("axis", axis, persistent=False)


class _TimeOnly(_Variant):
    @torch.no_grad()
    def forward(self, x, position_ids):
        of_time = torch.cat((self.axis, self.axis)) == 0
        pairs = zip(self.yarn(x, position_ids), self.trained(x, position_ids), strict=True)
        return tuple(torch.where(of_time, new, old) for new, old in pairs)


class _ImageBase(_Variant):
    @torch.no_grad()
    def forward(self, x, position_ids):
        position_ids = position_ids.expand(3, -1, -1)
        base = position_ids[0]
        offset = (position_ids - base)[self.axis].permute(1, 2, 0)  # (batch, tokens, frequencies)
        angle = (
            base[..., None].float() * self.yarn.inv_freq.float()
            + offset.float() * self.trained.inv_freq.float()
        )
        angle = torch.cat((angle, angle), dim=-1)
        scale = self.yarn.attention_scaling
        return (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)
