"""Finding the language model inside whatever wraps it, and the numbers its attention is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from laid.errors import LaidError
from laid.models.families import family_of


def text_model(model: nn.Module) -> nn.Module:
    """The decoder (Qwen2_5_VLTextModel, Qwen3VLTextModel ...) inside `model`.

    Found by what it is made of, `layers` with `self_attn.q_proj` and one `rotary_emb`, so that it is the same
    object whether `model` is bare, wrapped by peft, accelerate or DistributedDataParallel, or the decoder itself.
    Raises LaidError when there is none or more than one.
    """
    found = [
        module
        for module in model.modules()
        if "rotary_emb" in module._modules  # cheap to ask: this runs several times a step
        and isinstance(module._modules.get("layers"), nn.ModuleList)
        and len(module.layers)
        and hasattr(getattr(module.layers[0], "self_attn", None), "q_proj")
    ]
    if len(found) != 1:
        raise LaidError(
            f"{type(model).__name__}: {len(found)} language models found inside, expected 1"
            " (layers with self_attn.q_proj and one rotary_emb); pass a vision-language model or its language_model"
        )
    return found[0]


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision tower inside `model`, whatever wraps it. Raises LaidError when there is none."""
    found = next((module for name, module in model.named_modules() if name.split(".")[-1] == "visual"), None)
    if found is None:
        raise LaidError(f"{type(model).__name__}: no vision tower inside; pass a vision-language model")
    return found


def refuse_compiled(model: nn.Module, what: str) -> None:
    """Raise LaidError where `model` is compiled already: a graph traced without hooks would leave them out unsaid."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise LaidError(
                f"{what}: the model is compiled already; attach to the plain model first, compile after"
            )


def layer_indices(layers: int | Iterable[int] | None, count: int) -> tuple[int, ...]:
    """Absolute, ascending, distinct layer numbers. Negative ones count from the end; None means every layer.

    Raises LaidError when one lies outside 0..count-1 or none is given.
    """
    asked = range(count) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    for layer in asked:
        if not -count <= layer < count:
            raise LaidError(
                f"layer {layer} does not exist: the model has {count} layers, 0 to {count - 1} (or -1 to {-count})"
            )
    found = tuple(sorted({layer % count for layer in asked}))
    if not found:
        raise LaidError(f"no layer chosen: name at least one of the model's {count} layers")
    return found


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder's attention. `sections` counts frequencies for (time, height, width).

    query_norm: queries are normalised after q_proj, with one weight for all heads. axes: the axis of each frequency.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    sections: tuple[int, ...]
    query_norm: bool
    axes: tuple[int, ...] = field(repr=False)

    @property
    def frequencies(self) -> int:
        return self.head_dim // 2

    def axis_of_frequency(self) -> torch.Tensor:
        """(head_dim / 2,) of 0 time, 1 height, 2 width: the M-RoPE axis that turns each frequency."""
        return torch.tensor(self.axes, dtype=torch.long)


def geometry(model_or_config) -> Geometry:
    """Read the sizes from a model, its config or its text config.

    Raises LaidError for a family that is not known, or when the M-RoPE sections do not add up to head_dim / 2.
    """
    config = text_model(model_or_config).config if isinstance(model_or_config, nn.Module) else model_or_config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    family = family_of(config)
    sections = tuple(rope.get("mrope_section") or family.sections)
    if sum(sections) != head_dim // 2:
        raise LaidError(
            f"mrope_section {list(sections)} adds up to {sum(sections)}, but head_dim {head_dim} has"
            f" {head_dim // 2} frequencies: give sections that sum to {head_dim // 2}"
        )
    return Geometry(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        sections=sections,
        query_norm=family.query_norm,
        axes=tuple(family.axis_of_frequency(sections).tolist()),
    )


class Applied:
    """A training-free method that is on. `remove()` gives the model back as it was; also a context manager."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc) -> None:
        self.remove()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) on the two halves of the last dimension: components f and f + head_dim / 2 form a pair."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (batch, heads, tokens, head_dim) by angles given as cos, sin (batch, tokens, head_dim)."""
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def repeat_kv(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, kv_heads, tokens, head_dim) -> (batch, heads, tokens, head_dim), each KV head for its query heads.

    Raises LaidError when `heads` is no multiple of kv_heads.
    """
    kv_heads = x.shape[1]
    if heads % kv_heads:
        raise LaidError(f"{heads} query heads cannot share {kv_heads} key heads: not a multiple")
    return x if heads == kv_heads else x.repeat_interleave(heads // kv_heads, dim=1)
