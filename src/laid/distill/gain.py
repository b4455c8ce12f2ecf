"""Learnable gain of RoPE frequencies: how strongly each query head answers to each rotation.

The paper's abstract names "learnable RoPE response gain modulation" without a formula; this is our reading. A
rotation pair of a query is multiplied by exp(g) with g = 0 at the start, which sharpens or dulls the score's
dependence on that frequency. Scaling a pair commutes with turning it, so the gain may act on q_proj's output, before
rotation, and folds into q_proj's rows: an exported student is a plain checkpoint and costs nothing more.
Where a family normalises queries after q_proj (Qwen3-VL), the gain acts on, and folds into, that norm's weight, which all
heads of a layer share; so do their gains then.

The length-aware form also multiplies a query by (tokens / reference) ** b, b learnable per head: as keys are added,
softmax spreads thinner, and a sharper query makes up for it. `tokens` counts the keys this query may attend to (its
own causal index + 1, padding left out), so that prefill, decoding with a cache and any batch agree.
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
    length_aware: learn b. reference: tokens at which the length factor is 1. exponent: where b starts.
    Parameters: log_gain (layers, heads, head_dim / 2), starting at 0, with 1 for heads where the family normalises
        queries; exponent (layers, heads) if length_aware.
    Raises LaidError on a reference that is not positive.
    """

    def __init__(
        self,
        model,
        length_aware: bool = False,
        reference: float = 1024.0,
        exponent: float = 0.0,
    ) -> None:
        super().__init__()
        if not reference > 0:
            raise LaidError(f"gain: reference is {reference} tokens, must be above 0")
        self.geometry = geometry(model)
        self.length_aware, self.reference = length_aware, float(reference)
        layers, heads = self.geometry.layers, self.geometry.heads
        own = 1 if self.geometry.query_norm else heads
        self.log_gain = nn.Parameter(torch.zeros(layers, own, self.geometry.frequencies))
        if length_aware:
            self.exponent = nn.Parameter(torch.full((layers, heads), float(exponent)))
        self._handles: list = []
        self._counts: dict[int, torch.Tensor] = {}

    def gains(self) -> torch.Tensor:
        """(layers, heads, frequencies): the factor of each rotation pair, without the length factor."""
        return self.log_gain.exp().expand(-1, self.geometry.heads, -1)

    def length_factor(self, counts: torch.Tensor) -> torch.Tensor:
        """(counts / reference) ** b for counts (...) of visible keys -> (layers, ..., heads), float32. Ones without b."""
        if not self.length_aware:
            return torch.ones(self.geometry.layers, *counts.shape, self.geometry.heads, device=counts.device)
        logs = self._logs(counts)
        exponent = self.exponent.view(self.geometry.layers, *[1] * counts.dim(), -1)
        return (exponent * logs[None, ..., None]).exp()

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
        if self.length_aware:
            self._handles.append(text.register_forward_pre_hook(_pass_counts, with_kwargs=True))
        for row, layer in enumerate(text.layers):
            attention = layer.self_attn
            if self.length_aware:
                self._handles.append(
                    attention.register_forward_pre_hook(self._counts_hook(row), with_kwargs=True)
                )
            queries = family.queries(attention)
            self._handles.append(queries.register_forward_hook(self._scale_hook(row), prepend=True))
        return self

    def detach(self) -> None:
        """Take the hooks off; the model is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._counts = [], {}

    @torch.no_grad()
    def fold_(self, model: nn.Module, tokens: float | None = None) -> None:
        """Multiply q_proj's weight rows and bias (or q_norm's weight) by the gains, in place: no hook is needed then.

        tokens: for a length-aware gain, the one visible-key count whose factor is folded in for every query. The fold
        is exact for queries at that count.
        Raises LaidError while attached, with unmerged adapters, without `tokens` where it is needed, and where heads
        that share a q_norm would need different factors.
        """
        if self._handles:
            raise LaidError("the gain is still attached: detach() before folding, or it would act twice")
        self._require_same_sizes(model)
        if self.length_aware and tokens is None:
            raise LaidError("a length-aware gain folds for one length: pass tokens=")
        if tokens is not None and not tokens > 0:
            raise LaidError(f"gain: tokens is {tokens}, must be above 0")
        scale = self._per_output(self.gains())
        if self.length_aware:
            factor = self.length_factor(torch.tensor(float(tokens), device=scale.device))
            scale = scale * factor.repeat_interleave(self.geometry.head_dim, dim=-1)
        for layer, module in enumerate(text_model(model).layers):
            if self.geometry.query_norm:
                self._fold_norm(module.self_attn.q_norm, scale[layer], layer)
                continue
            projection = module.self_attn.q_proj
            if not isinstance(projection, nn.Linear):
                raise LaidError(
                    f"layer {layer}: q_proj is a {type(projection).__name__}, not a plain Linear:"
                    " merge the adapter first (model.merge_and_unload())"
                )
            wide = torch.promote_types(projection.weight.dtype, torch.float32)
            for tensor in (projection.weight, projection.bias):
                if tensor is not None:
                    factor = scale[layer].to(tensor.device, wide).view(-1, *[1] * (tensor.dim() - 1))
                    tensor.copy_(tensor.to(wide) * factor)

    def _fold_norm(self, norm: nn.Module, scale: torch.Tensor, layer: int) -> None:
        """scale (heads * head_dim,) into q_norm's weight (head_dim,)."""
        by_head = scale.view(self.geometry.heads, -1)
        if not torch.equal(by_head, by_head[:1].expand_as(by_head)):
            raise LaidError(
                f"layer {layer}: heads have different length factors, but share one q_norm into which they cannot fold:"
                " set methods.<name>.gain.length_aware to false"
            )
        wide = torch.promote_types(norm.weight.dtype, torch.float32)
        norm.weight.copy_(norm.weight.to(wide) * by_head[0].to(norm.weight.device, wide))

    def _per_output(self, gains: torch.Tensor) -> torch.Tensor:
        """(..., heads, frequencies) -> (..., heads * head_dim): dims f and f + head_dim / 2 form pair f."""
        return torch.cat((gains, gains), dim=-1).flatten(-2)

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
            logs = self._logs(self._counts[row]) if self.length_aware else None
            exponent = self.exponent[row] if self.length_aware else None
            heads = output.view(*output.shape[:2], self.geometry.heads, 2, -1)
            scaled = _Scale.apply(heads, self.log_gain[row], exponent, logs)
            return scaled.view(output.shape)

        return hook

    def _logs(self, counts: torch.Tensor) -> torch.Tensor:
        """log(counts / reference), float32, of the same shape."""
        return (counts.float().clamp_min(1.0) / self.reference).log()

    def _counts_hook(self, row: int):
        # The counts travel as an argument of the layer, so that a checkpointed layer sees its own again in backward.
        def hook(_attention, _args, kwargs):
            self._counts[row] = kwargs["laid_visible_keys"]

        return hook

    def _require_same_sizes(self, model: nn.Module) -> None:
        theirs = geometry(model)
        if theirs != self.geometry:
            raise LaidError(
                f"the gain was made for {self.geometry}, the model has {theirs}: make it from this model"
            )


class _Scale(torch.autograd.Function):
    """queries * exp(log_gain) * exp(logs * exponent), which keeps its result alone for backward.

    queries: (batch, tokens, heads, 2, frequencies). log_gain: (heads or 1, frequencies). exponent: (heads,) and logs:
    (batch or 1, tokens), or None both. As every factor is an exponential, its gradient is the result times the gradient
    of the result: neither factors nor what they multiply need to stay.
    """

    @staticmethod
    def forward(ctx, queries, log_gain, exponent, logs):
        scaled = queries * _factor(queries, log_gain, exponent, logs)
        ctx.save_for_backward(scaled, log_gain, exponent, logs)
        return scaled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_scaled):
        scaled, log_gain, exponent, logs = ctx.saved_tensors
        by_pair = (of_scaled * scaled).sum(3, dtype=log_gain.dtype)  # (batch, tokens, heads, frequencies)
        of_gain = by_pair.sum((0, 1)).sum_to_size(log_gain.shape)
        of_exponent = None
        if exponent is not None:
            of_exponent = (by_pair.sum(-1) * logs[..., None]).sum((0, 1)).to(exponent.dtype)
        return of_scaled * _factor(of_scaled, log_gain, exponent, logs), of_gain, of_exponent, None


def _factor(queries, log_gain, exponent, logs) -> torch.Tensor:
    """(batch or 1, tokens or 1, heads or 1, 1, frequencies) in the format of `queries`."""
    factor = log_gain.exp()[:, None]
    if exponent is not None:
        factor = (logs[..., None] * exponent).exp()[..., None, None] * factor
    return factor.to(queries.dtype)


def _pass_counts(_text, _args, kwargs):
    """Give the layers `laid_visible_keys`: how many keys each query may attend to."""
    like = kwargs.get("inputs_embeds")
    like = kwargs["input_ids"] if like is None else like
    past = kwargs.get("past_key_values")
    mask = kwargs.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    past = int(past.get_seq_length()) if past is not None else 0
    kwargs["laid_visible_keys"] = visible_keys(mask, like.shape[1], past, like.device)
    return _args, kwargs


def visible_keys(mask: torch.Tensor | None, tokens: int, past: int = 0, device=None) -> torch.Tensor:
    """(batch or 1, tokens): the number of keys each of the last `tokens` queries may attend to, itself included.

    mask: None (all past + tokens keys are real), (batch, past + tokens) of 1 and 0, or the (batch, 1, tokens, keys)
    causal mask that transformers prepares, boolean or additive.
    """
    if mask is None:
        return torch.arange(past + 1, past + tokens + 1, device=device)[None]
    if mask.dim() == 2:
        return mask[:, : past + tokens].long().cumsum(-1)[:, -tokens:]
    return (mask if mask.dtype == torch.bool else mask >= 0).sum(-1)[:, 0]
