"""Attention after a cache: aligned at the lower right, without a mask; and the cache that does not copy."""

import pytest
import torch
from torch.nn import functional as F

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
