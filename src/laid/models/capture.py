"""Queries and keys of chosen decoder layers, caught as the forward pass makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from laid.errors import LaidError
from laid.models.decoder import layer_indices, refuse_compiled, rotate, text_model
from laid.models.families import family_of
from laid.models.parallel import all_heads


@dataclass
class LayerQK:
    """What one layer's attention compares, still attached to the autograd graph.

    q: (batch, heads, tokens, head_dim) before rotation, as q_proj (with its adapter and gain, and normalised where
        the family does so) gives it.
    k: (batch, kv_heads, tokens, head_dim) before rotation.
    cos, sin: (batch, tokens, head_dim) of this layer's rotary embedding.
    """

    q: torch.Tensor
    k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, k) after rotation, the same shapes: what the attention scores are made of."""
        return rotate(self.q, self.cos, self.sin), rotate(self.k, self.cos, self.sin)


class QKCapture:
    """Catch pre-rotation Q and K of `layers` with forward hooks, without `output_attentions` and without copies.

        with QKCapture(model, [-1]) as capture:
            model(**batch)
            qk = capture.take()          # {35: LayerQK}

    model: the decoder or anything around it (bare, peft, accelerate, DistributedDataParallel).
    layers: layer numbers; negative ones count from the end.

    Gradients flow through what is caught. Under gradient checkpointing only the first forward is caught, not its
    recomputation in backward; the re-entrant kind runs that forward without gradients and is refused. Adapters
    must be in place before attaching. Under torch.compile attach first and compile after: a graph that was traced
    without the hooks catches nothing, which `take` reports.
    """

    def __init__(self, model: nn.Module, layers: int | Iterable[int]) -> None:
        refuse_compiled(model, "capture")
        self._text = text_model(model)
        self.layers = layer_indices(layers, len(self._text.layers))
        self._handles: list = []
        self._projections: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._caught: dict[int, dict[str, torch.Tensor]] = {}
        self._open = False
        self._with_grad = False

    def attach(self) -> QKCapture:
        """Set the hooks. Raises LaidError when they are set already."""
        if self._handles:
            raise LaidError("this capture is attached already: detach() it first, or make a second QKCapture")
        family = family_of(self._text.config)
        self._handles = [
            self._text.register_forward_pre_hook(self._begin),
            self._text.register_forward_hook(self._end),
        ]
        for layer in self.layers:
            attention = self._text.layers[layer].self_attn
            queries, keys = family.queries(attention), family.keys(attention)
            self._projections[layer] = (attention.q_proj, attention.k_proj)
            self._handles += [
                attention.register_forward_pre_hook(self._positions_hook(layer), with_kwargs=True),
                queries.register_forward_hook(self._projection_hook(layer, "q", attention.head_dim)),
                keys.register_forward_hook(self._projection_hook(layer, "k", attention.head_dim)),
            ]
        return self

    def detach(self) -> None:
        """Remove the hooks and forget what was caught."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._projections, self._caught, self._open = [], {}, {}, False

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_exc) -> None:
        self.detach()

    def take(self) -> dict[int, LayerQK]:
        """What the last forward pass caught, by absolute layer number; it is handed over once.

        Raises LaidError when no forward pass was seen, or it did not reach every chosen layer.
        """
        caught, self._caught = self._caught, {}
        missing = [layer for layer in self.layers if len(caught.get(layer, ())) != 4]
        if missing:
            raise LaidError(
                f"no queries and keys were caught for layers {missing} of {list(self.layers)}: run one forward pass"
                " between attach() and take(); with torch.compile, attach() before compiling"
            )
        return {layer: LayerQK(**caught[layer]) for layer in self.layers}

    def _begin(self, *_args) -> None:
        self._caught, self._open, self._with_grad = {}, True, torch.is_grad_enabled()

    def _end(self, *_args) -> None:
        self._open = False

    def _positions_hook(self, layer: int):
        def hook(attention, args, kwargs):
            if not self._open:  # a checkpointed layer computed again in backward
                return
            if (attention.q_proj, attention.k_proj) != self._projections[layer]:
                raise LaidError(
                    f"layer {layer}: q_proj or k_proj was replaced after QKCapture was attached (an adapter?):"
                    " add adapters first, attach() after"
                )
            if self._with_grad and not torch.is_grad_enabled():
                raise LaidError(
                    f"layer {layer} runs under re-entrant gradient checkpointing, which hides its gradients:"
                    ' use activation_checkpointing_enable({"use_reentrant": False})'
                )
            cos, sin = kwargs["position_embeddings"]
            self._caught[layer] = {"cos": cos, "sin": sin}

        return hook

    def _projection_hook(self, layer: int, name: str, head_dim: int):
        def hook(_module, _args, output):
            if self._open:
                batch, tokens = output.shape[:2]
                heads = output.view(batch, tokens, -1, head_dim).transpose(1, 2)
                self._caught[layer][name] = all_heads(heads)

        return hook
