"""Attention whose far keys are scored at other rotations than its near keys, without a tokens x tokens tensor.

Two ways to the same numbers: blocks of queries with one softmax over both kinds of scores, and fused attention over the
near and the far part merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from laid.errors import LaidError
from laid.models.decoder import repeat_kv, rotate


@dataclass
class Regrouping:
    """Which keys are far from which queries, and how far keys and their queries are turned further.

    q_base: (batch, queries), k_base: (batch, keys) base positions; far is q_base - k_base >= window.
    q_turn, k_turn: (cos, sin), each (batch, queries | keys, head_dim), on top of the rotation they arrive with.
    never_far: (batch, keys) true for keys that keep ordinary scores at any distance, or None.
    flash: use fused attention where possible; insist: refuse instead of falling back. block_elements: floats of scores
    held at a time.
    """

    window: int
    q_base: torch.Tensor
    k_base: torch.Tensor
    q_turn: tuple[torch.Tensor, torch.Tensor]
    k_turn: tuple[torch.Tensor, torch.Tensor]
    never_far: torch.Tensor | None = None
    flash: bool = False
    insist: bool = False
    block_elements: int = 2**25
    _bounds: dict = field(default_factory=dict)

    def far(self, start: int, stop: int, keys: slice) -> torch.Tensor:
        """(batch, stop - start, keys) true where the ordinary score gives way to the merged one."""
        distance = self.q_base[:, start:stop, None] - self.k_base[:, None, keys]
        far = distance >= self.window
        return far if self.never_far is None else far & ~self.never_far[:, None, keys]

    def bounds(self, start: int, stop: int, end: int) -> tuple[int, int]:
        """(near_from, far_to): among keys before `end`, none before near_from is near, none from far_to on is far."""
        if (start, stop) not in self._bounds:  # the same for every layer
            far = self.far(start, stop, slice(0, end)).flatten(0, 1)
            near_at, far_at = (~far).any(0).nonzero(), far.any(0).nonzero()
            found = int(near_at[0]) if len(near_at) else end, int(far_at[-1]) + 1 if len(far_at) else 0
            self._bounds[start, stop] = found
        return self._bounds[start, stop]


def grouped_attention(query, key, value, mask, regrouping: Regrouping, scaling: float) -> torch.Tensor:
    """(batch, heads, queries, head_dim): attention of rotated query and key under `regrouping`.

    query: (batch, heads, queries, head_dim). key, value: (batch, kv_heads, keys, head_dim), the last `queries` of
    them the queries' own. mask: None (causal), or (batch, 1, queries, keys), boolean or additive.
    Raises LaidError when fused attention is insisted on and cannot be used.
    """
    keys = regrouping.k_base.shape[1]
    key, value = key[:, :, :keys], value[:, :, :keys]  # a static cache is longer than what it holds
    why_not = _why_not_fused(query, key, mask, regrouping)
    if regrouping.insist and why_not:
        raise LaidError(
            f'self_extend: backend "flash" cannot be used here: {why_not}; use "auto" or "blocks"'
        )
    far_query = rotate(query, *(x.to(query.dtype) for x in regrouping.q_turn))
    far_key = rotate(key, *(x.to(key.dtype) for x in regrouping.k_turn))
    if regrouping.flash and not why_not:
        return _fused(query, key, value, far_query, far_key, regrouping, scaling)
    return _blocks(query, key, value, far_query, far_key, mask, regrouping, scaling)


def _blocks(query, key, value, far_query, far_key, mask, regrouping, scaling):
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    past = keys - queries
    copies = heads // kv_heads
    block = max(1, regrouping.block_elements // (batch * heads * keys))
    out = []
    for start in reversed(range(0, queries, block)):  # widest first, so that freed memory fits what follows
        stop = min(queries, start + block)
        end = past + stop
        near_from, far_to = regrouping.bounds(start, stop, end)

        def scores(q, k, start=start, stop=stop):
            # Query heads of one key head side by side, so that keys need not be repeated.
            q = q[:, :, start:stop].reshape(batch, kv_heads, copies * (stop - start), dim)
            return (q @ k.transpose(-1, -2)).view(batch, heads, stop - start, -1).float() * scaling

        far = scores(far_query, far_key[:, :, :far_to])
        near = scores(query, key[:, :, near_from:end])
        mixed = slice(near_from, max(near_from, far_to))
        width = mixed.stop - mixed.start
        chosen = torch.where(
            regrouping.far(start, stop, mixed)[:, None], far[..., near_from:], near[..., :width]
        )
        merged = torch.cat((far[..., :near_from], chosen, near[..., width:]), dim=-1)
        if mask is None:
            at = torch.arange(past + start, end, device=query.device)
            allowed = torch.arange(end, device=query.device) <= at[:, None]
        else:
            allowed = mask[:, :, start:stop, :end]
            allowed = allowed if allowed.dtype == torch.bool else allowed >= 0
        merged = merged.masked_fill(~allowed, torch.finfo(merged.dtype).min)
        weights = merged.softmax(-1).to(value.dtype).view(batch, kv_heads, copies * (stop - start), end)
        out.append((weights @ value[:, :, :end]).view(batch, heads, stop - start, dim))
    return torch.cat(out[::-1], dim=2)


def _why_not_fused(query, key, mask, regrouping) -> str | None:
    if mask is not None:
        return "the batch has padding or a prepared mask"
    if regrouping.never_far is not None:
        return "far keys are no prefix of the sequence"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "gradients are needed"
    if bool((regrouping.k_base.diff() < 0).any()):
        return "base positions do not rise along the sequence"
    if query.is_cuda and (query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8):
        return f"fused CUDA attention needs half precision and head_dim a multiple of 8, not {query.dtype}, {query.shape[-1]}"
    if query.device.type not in ("cuda", "cpu"):
        return f"no fused attention with log-sum-exp on {query.device.type}"
    return None


def _fused(query, key, value, far_query, far_key, regrouping, scaling):
    heads, queries = query.shape[1], query.shape[2]
    past = key.shape[2] - queries
    key, far_key, value = (repeat_kv(x, heads) for x in (key, far_key, value))
    # Far keys of a query are a prefix: every key whose base lies at least a window back.
    limit = (regrouping.q_base - regrouping.window).contiguous()
    boundaries = torch.searchsorted(regrouping.k_base.contiguous(), limit, right=True)
    if not bool((boundaries == boundaries[:1]).all()):  # layouts differ: one sequence at a time
        tensors = (query, key, value, far_query, far_key)
        rows = range(query.shape[0])
        return torch.cat(
            [_runs(*(x[b : b + 1] for x in tensors), boundaries[b], past, scaling) for b in rows]
        )
    return _runs(query, key, value, far_query, far_key, boundaries[0], past, scaling)


def _runs(query, key, value, far_query, far_key, boundary, past, scaling):
    """Fused attention for each run of queries with one boundary (queries,): keys before it are far."""
    queries = query.shape[2]
    new_run = torch.nonzero(boundary.diff()).flatten() + 1
    edges = [0, *new_run.tolist(), queries]
    out = torch.empty_like(query)
    for start, stop in pairwise(edges):
        split = int(boundary[start])
        q, own = query[:, :, start:stop], slice(past + start, past + stop)
        before = slice(split, past + start)
        parts = [_with_lse(q, key[:, :, own], value[:, :, own], True, scaling)]
        if before.stop > before.start:
            parts.append(_with_lse(q, key[:, :, before], value[:, :, before], False, scaling))
        if split:
            far = far_query[:, :, start:stop]
            parts.append(_with_lse(far, far_key[:, :, :split], value[:, :, :split], False, scaling))
        out[:, :, start:stop] = merge_by_lse(parts)
    return out


def merge_by_lse(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention over the union of disjoint key sets from each set's (output, log-sum-exp of its scores).

    output: (batch, heads, queries, head_dim), log-sum-exp: (batch, heads, queries).
    """
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    merged = sum(output.to(lse.dtype) * (lse - total).exp()[..., None] for output, lse in parts)
    return merged.to(parts[0][0].dtype)


def _with_lse(q, k, v, causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) of torch's fused attention; the public function returns the output alone."""
    ops = torch.ops.aten
    if q.is_cuda:
        output, lse = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)[:2]
    else:
        output, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scaling)
    return output, lse
