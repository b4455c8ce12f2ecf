"""Learnable gain of RoPE frequencies: how strongly each query head answers to each rotation.

The paper's abstract names "learnable RoPE response gain modulation" without a formula; this is our reading. A
rotation pair of a query is multiplied by exp(g) with g = 0 at the start, which sharpens or dulls the score's
dependence on that frequency. Scaling a pair commutes with turning it, so the gain may act on q_proj's output, before
rotation, and folds into q_proj's rows: an exported student is a plain checkpoint and costs nothing more.
Where a family normalises queries after q_proj (Qwen3-VL), the gain acts on, and folds into, that norm's weight, which all
heads of a layer share; so do their gains then.
"""

from __future__ import annotations

import torch
from torch import nn

from laid.errors import LaidError
from laid.models.decoder import geometry, refuse_compiled, text_model
from laid.models.families import family_of


class RopeGain(nn.Module):
    """Gains for the query heads of every layer, applied by hooks; it is no part of the model's own state.

    Give its parameters to the optimiser beside the model's. Under DistributedDataParallel wrap it too, or reduce its
    gradients: the model's own wrapper does not know them.

    model: a model or its config, for the sizes.
    Parameters: log_gain (layers, heads, head_dim / 2), starting at 0, with 1 for heads where the family normalises
        queries.
    """

    def __init__(self, model) -> None:
        super().__init__()
        self.geometry = geometry(model)
        heads = 1 if self.geometry.query_norm else self.geometry.heads
        self.log_gain = nn.Parameter(torch.zeros(self.geometry.layers, heads, self.geometry.frequencies))
        self._handles: list = []

    def gains(self) -> torch.Tensor:
        """(layers, heads, frequencies): the factor of each rotation pair."""
        return self.log_gain.exp().expand(-1, self.geometry.heads, -1)

    def attach(self, model: nn.Module) -> RopeGain:
        """Act on `model` from its next forward on, ahead of every other hook there. Adapters must be in place.

        Raises LaidError when attached already or when the model's sizes are not those this gain was made for.
        """
        if self._handles:
            raise LaidError("this gain is attached already: detach() it first, or it would act twice")
        refuse_compiled(model, "gain")
        self._require_same_sizes(model)
        text = text_model(model)
        family = family_of(text.config)
        hooked = [layer.self_attn.q_proj for layer in text.layers]
        self._handles.append(text.register_forward_pre_hook(self._same_projections_hook(hooked)))
        for row, layer in enumerate(text.layers):
            queries = family.queries(layer.self_attn)
            self._handles.append(queries.register_forward_hook(self._scale_hook(row), prepend=True))
        return self

    def detach(self) -> None:
        """Take the hooks off; the model is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def fold_(self, model: nn.Module) -> None:
        """Multiply q_proj's weight rows and bias (or q_norm's weight) by the gains, in place: no hook is needed then.

        Raises LaidError while attached, and with unmerged adapters.
        """
        if self._handles:
            raise LaidError("the gain is still attached: detach() before folding, or it would act twice")
        self._require_same_sizes(model)
        gains = self.log_gain.exp()
        # (layers, heads * head_dim), or (layers, head_dim) of a norm: dims f and f + head_dim / 2 form pair f
        scale = torch.cat((gains, gains), dim=-1).flatten(-2)
        for layer, module in enumerate(text_model(model).layers):
            folded = module.self_attn.q_norm if self.geometry.query_norm else module.self_attn.q_proj
            if not (self.geometry.query_norm or isinstance(folded, nn.Linear)):
                raise LaidError(
                    f"layer {layer}: q_proj is a {type(folded).__name__}, not a plain Linear:"
                    " merge the adapter first (model.merge_and_unload())"
                )
            wide = torch.promote_types(folded.weight.dtype, torch.float32)
            for tensor in (folded.weight, getattr(folded, "bias", None)):
                if tensor is not None:
                    factor = scale[layer].to(tensor.device, wide).view(-1, *[1] * (tensor.dim() - 1))
                    tensor.copy_(tensor.to(wide) * factor)

    def _same_projections_hook(self, hooked: list[nn.Module]):
        def hook(text, _args):
            for layer, projection in enumerate(hooked):
                if text.layers[layer].self_attn.q_proj is not projection:
                    raise LaidError(
                        f"layer {layer}: q_proj was replaced after the gain was attached (an adapter?), which the gain"
                        " would miss: add adapters first, attach() after"
                    )

        return hook

    def _scale_hook(self, row: int):
        def hook(_module, _args, output):
            heads = output.view(*output.shape[:2], self.geometry.heads, 2, -1)
            return _Scale.apply(heads, self.log_gain[row]).view(output.shape)

        return hook

    def _require_same_sizes(self, model: nn.Module) -> None:
        theirs = geometry(model)
        if theirs != self.geometry:
            raise LaidError(
                f"the gain was made for {self.geometry}, the model has {theirs}: make it from this model"
            )


class _Scale(torch.autograd.Function):
    """queries * exp(log_gain), which keeps its result alone for backward.

    queries: (batch, tokens, heads, 2, frequencies). log_gain: (heads or 1, frequencies). As the factor is an exponential,
    its gradient is the result times the gradient of the result: what it multiplies need not stay.
    """

    @staticmethod
    def forward(ctx, queries, log_gain):
        scaled = queries * _factor(queries, log_gain)
        ctx.save_for_backward(scaled, log_gain)
        return scaled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_scaled):
        scaled, log_gain = ctx.saved_tensors
        by_pair = (of_scaled * scaled).sum(3, dtype=log_gain.dtype)  # (batch, tokens, heads, frequencies)
        of_gain = by_pair.sum((0, 1)).sum_to_size(log_gain.shape)
        return of_scaled * _factor(of_scaled, log_gain), of_gain


def _factor(queries: torch.Tensor, log_gain: torch.Tensor) -> torch.Tensor:
    """(heads or 1, 1, frequencies) in the format of `queries`."""
    return log_gain.exp()[:, None].to(queries.dtype)
