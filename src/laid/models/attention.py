"""The decoder's attention where transformers' "sdpa" would prepare a mask of queries x keys: tokens that follow a cache.

`needs_no_mask` puts it on a decoder: SDPA as it was where nothing lies before the queries, and fused attention aligned at the
lower right where something does. It is torch's alone, so that it runs on any device. The cache beside it hands out what it
holds and no more, and grows without copying.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from laid.models.decoder import repeat_kv

SDPA = "laid_sdpa"


def needs_no_mask(text: nn.Module) -> None:
    """Let the decoder `text` attend over a cache without a mask, where it runs on sdpa; other inputs stay the same bits."""
    if text.config._attn_implementation == "sdpa":
        text.config._attn_implementation = (
            SDPA  # set_attn_implementation would refuse a wrapped decoder, and not raise
        )


def attention(module, query, key, value, attention_mask, laid_packed=None, **kwargs):
    """transformers' AttentionInterface. Without a mask the queries are the last of the keys, and causal.

    laid_packed: (lengths, their ends, masks) of prompts that lie one behind the other and attend to themselves alone, each
    under its mask if there are any. Without masks, CUDA's flash kernel takes all of them at once; else one call a prompt:
    the kernels, and on a CPU the bits, of a prompt that is read alone.
    """
    if laid_packed is not None:
        lengths, ends, masks = laid_packed
        if not masks and _flash(value):
            return _flash_packed(query, key, value, ends, max(lengths), kwargs.get("scaling")), None
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), masks or [None] * len(lengths))
        return torch.cat([sdpa_attention_forward(module, *part, **kwargs)[0] for part in parts], dim=1), None
    if attention_mask is not None or query.shape[2] == 1 or query.shape[2] == key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return fused(query, key, value, scaling, causal=True)[0].transpose(1, 2).contiguous(), None


def mask(q_length=0, kv_length=0, q_offset=0, kv_offset=0, allow_is_causal_skip=True, **kwargs):
    """transformers' AttentionMaskInterface: none where `attention` knows by itself who sees whom."""
    plain = kwargs["mask_function"] is causal_mask_function and kwargs["attention_mask"] is None
    local, past = kwargs.get("local_size"), kv_length - q_length
    if (
        allow_is_causal_skip
        and plain
        and (local is None or kv_length < local)
        and past == q_offset - kv_offset
    ):
        return None
    skip = allow_is_causal_skip and (
        q_length == 1 or not past
    )  # what else goes without one is aligned otherwise
    sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    return sdpa_mask(**sizes, allow_is_causal_skip=skip, **kwargs)


AttentionInterface.register(SDPA, attention)
AttentionMaskInterface.register(SDPA, mask)


def fused(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(output (batch, heads, queries, head_dim), log-sum-exp of the scores (batch, heads, queries)) of torch's fused attention.

    query: (batch, heads, queries, head_dim); key, value: (batch, kv_heads, keys, head_dim). causal: the queries' own keys are the
    last ones, and each sees those up to its own. torch's public function gives the output alone, and aligns `is_causal`
    at the upper left.
    """
    ops, past = torch.ops.aten, key.shape[2] - query.shape[2]
    if causal and past and not _flash(query):
        own = fused(query, key[:, :, past:], value[:, :, past:], scaling, causal=True)
        before = fused(query, key[:, :, :past], value[:, :, :past], scaling)
        return merge_by_lse([own, before])
    if _flash(query):  # for which causal means the lower right
        return ops._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)[:2]
    if query.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scaling)
    key, value = (repeat_kv(x, query.shape[1]) for x in (key, value))
    output, lse = ops._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scaling
    )[:2]
    return output, lse[..., : query.shape[2]]  # the kernel pads it


def _flash_packed(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """(1, tokens, heads, head_dim) of `attention` over packed prompts, by flash attention's variable-length form.

    ends: (prompts + 1,) int32, 0 and where each prompt ends. Under autocast the rotation leaves queries and keys in float32.
    """
    q, k, v = (repeat_kv(x, query.shape[1])[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scaling
    )[0][None]


def _flash(query: Tensor) -> bool:
    """Whether CUDA's flash kernel takes it; tensors without content stand for a GPU's."""
    low = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type in ("cuda", "meta") and low and query.shape[-1] % 8 == 0


def merge_by_lse(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, and its log-sum-exp, from each set's (output, log-sum-exp).

    output: (batch, heads, queries, head_dim), log-sum-exp: (batch, heads, queries).
    """
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    merged = sum(output.to(lse.dtype) * (lse - total).exp()[..., None] for output, lse in parts)
    return merged.to(parts[0][0].dtype), total


class _Room(DynamicLayer):
    """A layer's keys and values in tensors of their final length, filled from the left.

    DynamicLayer copies all it holds whenever it grows; transformers' StaticLayer hands out its whole length, which needs a mask
    of queries x keys, and counts on the device.
    """

    def __init__(self, tokens: int, made: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.tokens, self.made = tokens, made

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.room = [x.new_empty(*x.shape[:2], self.tokens, x.shape[3]) for x in new]
            for room in self.room if self.made else ():
                self.made(room)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for room, x in zip(self.room, new, strict=True):
            room[:, :, start:stop] = x
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values


def cache_for(tokens: int, made: Callable[[Tensor], None] | None = None) -> Cache:
    """An empty key-value cache for prompts and answers of `tokens` tokens in all. made: is told of each tensor it makes."""
    return Cache(layer_class_to_replicate=partial(_Room, tokens, made))
