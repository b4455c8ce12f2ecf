"""Attention after a cache: aligned at the lower right, without a mask; the cache that does not copy; packed prompts."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from laid.models import attention
from laid.models.attention import cache_for, fused, merge_by_lse
from laid.models.forward import hidden_states, last_logits
from laid.plan.steps import meta_batch
from tiny_vlm import tiny_model


@pytest.mark.parametrize("queries", [1, 5, 9])
def test_causal_means_the_lower_right(queries):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h, n in ((4, queries), (2, 9), (2, 9)))
    seen = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    output, lse = fused(q, k, v, 0.3, causal=queries > 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected)
    scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(lse, scores.masked_fill(~seen, -torch.inf).logsumexp(-1))


def test_merge_by_log_sum_exp_is_attention_over_the_union():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=g, dtype=torch.float64) for n in (5, 9, 9))
    parts = []
    for keys in (slice(0, 2), slice(2, 3), slice(3, 9)):
        scores = q @ k[:, :, keys].transpose(-1, -2)
        parts.append((scores.softmax(-1) @ v[:, :, keys], scores.logsumexp(-1)))
    expected = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    torch.testing.assert_close(merge_by_lse(parts)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_chunks_are_read_without_a_mask_into_tensors_that_stay(family):
    """Every layer of every chunk; keys and values lie where they lay before the chunk."""
    model = tiny_model(family=family)
    batch = meta_batch(model.config, 2, 50, 0, torch.float32, "cpu")
    batch.ids.random_(1, 50, generator=torch.Generator().manual_seed(1))
    whole = hidden_states(model, batch)
    seen, cache = [], cache_for(50)

    def look(_module, _args, kwargs):
        kept = cache.layers[0].keys.data_ptr() if len(cache.layers) and cache.get_seq_length() else None
        seen.append((kwargs["attention_mask"], kept))

    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    logits = last_logits(model, batch, 16, cache)
    torch.testing.assert_close(logits, model.get_output_embeddings()(whole[:, -1]), rtol=1e-4, atol=1e-4)
    assert len(seen) == 8 and all(mask is None for mask, _ in seen)
    assert len({kept for _, kept in seen[1:]}) == 1 and cache.get_seq_length() == 50


class FlashByHand(TorchDispatchMode):
    """What CUDA's kernel does with packed prompts, by its arguments; counts the calls."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is not torch.ops.aten._flash_attention_forward:
            return func(*args, **kwargs or {})
        self.calls += 1
        q, k, v, ends, also, longest, _, dropout, causal, _ = args
        assert ends is also and ends.dtype == torch.int32 and longest == ends.diff().max()
        assert (dropout, causal) == (0.0, True) and q.shape == k.shape == v.shape and q.dtype == v.dtype
        parts = []
        for a, b in itertools.pairwise(ends.tolist()):
            scores = kwargs["scale"] * torch.einsum("qhd,khd->hqk", q[a:b].float(), k[a:b].float())
            seen = torch.ones(b - a, b - a, dtype=torch.bool).tril()
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v[a:b].float()).to(q.dtype))
        return torch.cat(parts), *4 * [torch.empty(0)]


@torch.no_grad()
def test_packed_prompts_are_one_call_of_flash_attention(monkeypatch):
    """A model in bfloat16, its kernel done by hand: one call a layer, and the states of the prompts read one by one."""
    model = tiny_model(dtype=torch.bfloat16, scale=0.05)
    batch = meta_batch(model.config, 3, 20, 0, torch.bfloat16, "cpu")
    batch.ids.random_(1, 50, generator=torch.Generator().manual_seed(1))
    batch.lengths = torch.tensor([20, 7, 13])
    batch.packed = (20, 7, 13)
    apart = hidden_states(model, batch)
    monkeypatch.setattr(attention, "_flash", lambda _query: True)
    with FlashByHand() as flash:
        together = hidden_states(model, batch)
    assert flash.calls == len(model.model.language_model.layers)
    torch.testing.assert_close(together.float(), apart.float(), rtol=2e-2, atol=2e-2)


def test_packed_prompts_have_gradients():
    """Of shapes alone, on the device without content: autocast's float32 queries, shared keys."""
    q = torch.empty(1, 4, 40, 16, device="meta", requires_grad=True)
    k = torch.empty(1, 2, 40, 16, device="meta", requires_grad=True)
    v = torch.empty(1, 2, 40, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([0, 20, 27, 40], dtype=torch.int32, device="meta")
    found, _ = attention.attention(None, q, k, v, None, laid_packed=((20, 7, 13), ends, []), scaling=0.25)
    assert found.shape == (1, 40, 4, 16) and found.dtype == torch.bfloat16
    found.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))
