"""Attention whose far keys are scored at other rotations than its near keys, without a tokens x tokens tensor.

Two ways to the same numbers: fused attention over the far and the near part, merged by their log-sum-exp, with a strip of keys
between them that are far from some queries of a block and near to others; and, for whatever has a mask, gradients or
far keys here and there, blocks of queries with one softmax over both kinds of scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from laid.errors import LaidError
from laid.models.attention import fused, merge_by_lse
from laid.models.decoder import rotate

# Queries that share a strip. A strip costs more the wider it is, and on other devices starting kernels costs more than that.
BLOCK = {"cpu": 64}
LARGE = 1024


@dataclass(frozen=True)
class Block:
    """Queries start to stop. Keys before `far` are far from all of them; from `near` on, all are near that are seen at all."""

    start: int
    stop: int
    far: int
    near: int


@dataclass
class Regrouping:
    """Which keys are far from which queries, and how far keys and their queries are turned further.

    q_base: (batch, queries), k_base: (batch, keys) base positions; far is q_base - k_base >= window.
    q_turn, k_turn: (cos, sin), each (batch, queries | keys, head_dim), on top of the rotation they arrive with.
    never_far: (batch, keys) true for keys that keep ordinary scores at any distance, or None.
    fuse: use fused attention where possible; insist: refuse instead of falling back. block_elements: floats of scores
    held at a time. It is made once for all layers, and reads positions then, so that no layer waits for the device.
    """

    window: int
    q_base: torch.Tensor
    k_base: torch.Tensor
    q_turn: tuple[torch.Tensor, torch.Tensor]
    k_turn: tuple[torch.Tensor, torch.Tensor]
    never_far: torch.Tensor | None = None
    fuse: bool = False
    insist: bool = False
    block_elements: int = 2**25
    ascending: bool = field(init=False, default=False)
    _boundary: torch.Tensor = field(init=False)  # (batch, queries): keys before it are far
    _edges: tuple[list[int], list[int]] = field(init=False)  # its least and its largest over the batch
    _bounds: dict = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.fuse or self.never_far is not None:
            return
        self._boundary = torch.searchsorted(
            self.k_base.contiguous(), (self.q_base - self.window).contiguous(), right=True
        )
        least, most = self._boundary.aminmax(dim=0)
        risen = (self.k_base.diff() >= 0).all().expand(1)
        found = torch.cat((risen, least, most)).tolist()
        self.ascending = bool(found[0])
        self._edges = found[1 : 1 + len(least)], found[1 + len(least) :]

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

    def blocks(self, heads: int) -> list[Block]:
        """All queries in blocks, with far keys at the left and near ones at the right of each; the same for every layer."""
        if heads in self._bounds:
            return self._bounds[heads]
        batch, queries = self.q_base.shape
        past = self.k_base.shape[1] - queries
        least, most = self._edges
        found, start = [], 0
        while start < queries:
            size = BLOCK.get(self.q_base.device.type, LARGE)
            while True:
                stop = min(queries, start + size)
                far, near = least[start], most[stop - 1]
                if near > past + start:  # some of the block's own keys are far from others
                    near = past + stop
                if size == 1 or batch * heads * (stop - start) * (near - far) <= self.block_elements:
                    break
                size //= 2
            found.append(Block(start, stop, far, near))
            start = stop
        return self._bounds.setdefault(heads, found)

    def strip(self, block: Block) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, queries, keys) of a block's strip: whether a key is far; and whether it is seen (None: all are)."""
        at = torch.arange(block.far, block.near, device=self._boundary.device)
        far = at < self._boundary[:, block.start : block.stop, None]
        past = self.k_base.shape[1] - self.q_base.shape[1]
        if block.near <= past + block.start:
            return far, None
        own = torch.arange(past + block.start, past + block.stop, device=at.device)
        return far, at <= own[:, None]


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
    if regrouping.fuse and not why_not:
        return _fused(query, key, value, far_query, far_key, regrouping, scaling)
    return _blocks(query, key, value, far_query, far_key, mask, regrouping, scaling)


def _scores(query, key, scaling):
    """(batch, heads, queries, keys) in float32; query heads of one key head side by side, so that keys are not repeated."""
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    together = query.reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    return (together @ key.transpose(-1, -2)).view(batch, heads, queries, -1).float() * scaling


def _weighted(weights, value):
    """(batch, heads, queries, head_dim) of weights (batch, heads, queries, keys) and value (batch, kv_heads, keys, head_dim)."""
    batch, heads, queries, keys = weights.shape
    kv_heads = value.shape[1]
    together = weights.to(value.dtype).view(batch, kv_heads, heads // kv_heads * queries, keys)
    return (together @ value).view(batch, heads, queries, -1)


def _blocks(query, key, value, far_query, far_key, mask, regrouping, scaling):
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    past = keys - queries
    block = max(1, regrouping.block_elements // (batch * heads * keys))
    out = []
    for start in reversed(range(0, queries, block)):  # widest first, so that freed memory fits what follows
        stop = min(queries, start + block)
        end = past + stop
        near_from, far_to = regrouping.bounds(start, stop, end)
        far = _scores(far_query[:, :, start:stop], far_key[:, :, :far_to], scaling)
        near = _scores(query[:, :, start:stop], key[:, :, near_from:end], scaling)
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
        out.append(_weighted(merged.softmax(-1), value[:, :, :end]))
    return torch.cat(out[::-1], dim=2)


def _why_not_fused(query, key, mask, regrouping) -> str | None:
    if mask is not None:
        return "the batch has padding or a prepared mask"
    if regrouping.never_far is not None:
        return "far keys are no prefix of the sequence"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "gradients are needed"
    if not regrouping.ascending:
        return "base positions do not rise along the sequence"
    return None


def _fused(query, key, value, far_query, far_key, regrouping, scaling):
    past = key.shape[2] - query.shape[2]
    out = torch.empty_like(query)
    for block in regrouping.blocks(query.shape[1]):
        rows, strip, end = slice(block.start, block.stop), slice(block.far, block.near), past + block.stop
        q, far_q = query[:, :, rows], far_query[:, :, rows]
        parts = []
        if block.near < end:  # down to the block's own tokens
            near = slice(block.near, end)
            parts.append(fused(q, key[:, :, near], value[:, :, near], scaling, causal=q.shape[2] > 1))
        if block.far:
            far = slice(0, block.far)
            parts.append(fused(far_q, far_key[:, :, far], value[:, :, far], scaling))
        if block.far < block.near:
            is_far, seen = regrouping.strip(block)
            chosen = torch.where(
                is_far[:, None],
                _scores(far_q, far_key[:, :, strip], scaling),
                _scores(q, key[:, :, strip], scaling),
            )
            if seen is not None:
                chosen = chosen.masked_fill_(~seen, torch.finfo(chosen.dtype).min)
            lse = chosen.logsumexp(-1)
            parts.append((_weighted(chosen.sub_(lse[..., None]).exp_(), value[:, :, strip]), lse))
        out[:, :, rows] = merge_by_lse(parts)[0] if len(parts) > 1 else parts[0][0]
    return out
