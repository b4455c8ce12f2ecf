"""SelfExtend (Jin et al. 2024) on M-RoPE, its distances measured in positions and images kept whole.

Near keys are scored with their ordinary positions. Far keys are scored with positions merged in groups of G: a key at
p // G and a query at p // G + W - W // G, which joins the ordinary ones at distance W. Both kinds of scores meet in
one softmax.

On M-RoPE a token has a base position (of a text token its position, of an image token where its image begins: the
time axis) and, in an image, offsets along height and width. "Far" is a base distance of at least W, so that all
tokens of one image lie on one side of the boundary. Rotations compose: queries and keys arrive rotated to p and are
turned on by (merged position - p); a cached key needs no other form.

G = 1, or an input whose largest base distance is below W, calls the unmodified attention: the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

from laid.errors import LaidError
from laid.methods.merged_attention import Regrouping, grouped_attention
from laid.models.attention import SDPA, attention, mask
from laid.models.decoder import Applied, geometry, refuse_compiled, text_model

AXES = ("all", "text", "image_base")
BACKENDS = ("auto", "blocks", "flash")


def apply_self_extend(
    model: nn.Module,
    group: int,
    window: int,
    axes: str = "all",
    backend: str = "auto",
    block_elements: int = 2**25,
) -> Applied:
    """Switch the decoder of `model` to SelfExtend; `.remove()` switches it back. Nothing to train, no weight changes.

    group: G, at least 1. window: W in M-RoPE positions, at least 1; W - W // G + positions / G should stay within the
        trained positions.
    axes: "all" merges time, height and width alike (position // G on each). "image_base" merges base positions and
        keeps the offsets inside an image as they are. "text" merges the positions of far text keys only: image keys
        keep ordinary positions at every distance (an image of one token is positioned as text is, and counts as text).
    backend: "flash" runs fused attention on the far and the near part of a block of queries, takes a softmax of its own over
        the strip of keys between, and merges the three by log-sum-exp; it needs no padding mask (padding at the right needs
        none), no gradient, and axes other than "text", whose far keys are no prefix of the sequence. "blocks" scores a
        block of queries against all keys and takes one softmax. "auto" takes flash wherever it can, else blocks. Either
        holds block_elements floats of scores at a time, and memory grows linearly with tokens.
    Works with a batch, padding, prefill in parts and a KV cache (the positions of cached keys are kept on the cache).
    Raises LaidError on wrong numbers, an attention other than sdpa or eager, or a cache filled without SelfExtend.
    """
    if group < 1 or window < 1:
        raise LaidError(f"self_extend: group {group} and window {window} must both be at least 1")
    for name, value, allowed in (("axes", axes, AXES), ("backend", backend, BACKENDS)):
        if value not in allowed:
            raise LaidError(f"self_extend: {name} is {value!r}, allowed: {', '.join(allowed)}")
    if backend == "flash" and axes == "text":
        raise LaidError(
            'self_extend: axes "text" needs backend "blocks": its far keys are no prefix of the sequence'
        )
    refuse_compiled(model, "self_extend")
    text = text_model(model)
    before = text.config._attn_implementation
    if before not in ("sdpa", SDPA, "eager"):
        raise LaidError(
            f"self_extend: the model runs on {before!r} attention; load it with sdpa (whose flash kernels are called for the"
            " near and the far part) or eager"
        )
    settings = _Settings(int(group), int(window), axes, backend, block_elements)
    handle = text.register_forward_pre_hook(settings.before_forward, with_kwargs=True)
    text.set_attn_implementation(f"laid_self_extend_{'eager' if before == 'eager' else 'sdpa'}")

    def undo():
        handle.remove()
        text.set_attn_implementation(before)

    return Applied(undo)


@dataclass
class _Settings:
    group: int
    window: int
    axes: str
    backend: str
    block_elements: int

    def before_forward(self, text, args, kwargs):
        """Hand the layers a Regrouping, or nothing where the model is to stay as it is."""
        embeds = kwargs.get("inputs_embeds")
        like = embeds if embeds is not None else kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        past = self._cache(text, kwargs)
        q_at = _positions(kwargs.get("position_ids"), like, past)
        k_at = _remember(past, q_at)
        if self.group == 1 or int((q_at[0].amax(-1) - k_at[0].amin(-1)).max()) < self.window:
            return args, kwargs
        mask = kwargs.get("attention_mask")
        padding = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        kwargs["laid_regrouping"] = self._regroup(text, q_at, k_at, padding)
        return args, kwargs

    def _cache(self, text, kwargs):
        use = kwargs.get("use_cache")
        use = text.config.use_cache if use is None else use
        if use and kwargs.get("past_key_values") is None and not text.training:
            kwargs["past_key_values"] = DynamicCache(config=text.config)
        return kwargs.get("past_key_values")

    def _regroup(self, text, q_at, k_at, padding) -> Regrouping:
        group, window = self.group, self.window
        if self.axes == "image_base":  # one merged base for all three axes, offsets untouched
            q_at, k_at = q_at[:1].expand(3, -1, -1), k_at[:1].expand(3, -1, -1)
        q_turn = q_at // group + window - window // group - q_at
        k_turn = k_at // group - k_at
        axis = geometry(text.config).axis_of_frequency().to(q_at.device)
        inverse = text.rotary_emb.inv_freq.to(q_at.device)
        return Regrouping(
            window=window,
            q_base=q_at[0],
            k_base=k_at[0],
            q_turn=_cos_sin(q_turn, axis, inverse),
            k_turn=_cos_sin(k_turn, axis, inverse),
            never_far=_of_images(k_at[0], padding) if self.axes == "text" else None,
            fuse=self.backend != "blocks",
            insist=self.backend == "flash",
            block_elements=self.block_elements,
        )


def _positions(position_ids, like, past) -> torch.Tensor:
    """(3, batch, tokens) as Qwen2_5_VLTextModel.forward would read what it was given."""
    if position_ids is None:
        start = int(past.get_seq_length()) if past is not None else 0
        position_ids = torch.arange(start, start + like.shape[1], device=like.device).expand(
            like.shape[0], -1
        )
    if position_ids.dim() == 2:
        position_ids = position_ids[None].expand(3, -1, -1)
    return position_ids[-3:]


def _remember(past, q_at: torch.Tensor) -> torch.Tensor:
    """(3, batch, keys): positions of all keys, cached ones first; they live on the cache as `laid_positions`."""
    if past is None:
        return q_at
    seen, batch = int(past.get_seq_length()), q_at.shape[1]
    known = getattr(past, "laid_positions", None) if seen else q_at[:, :, :0]
    if known is None or known.shape[2] < seen or batch % known.shape[1]:
        held = "none" if known is None else f"{known.shape[2]} of {known.shape[1]} sequences"
        raise LaidError(
            f"self_extend: the cache holds {seen} tokens of {batch} sequences but positions of {held}: it must be"
            " filled with SelfExtend on; start with an empty cache"
        )
    known = known[:, :, :seen].repeat_interleave(batch // known.shape[1], dim=1)
    past.laid_positions = torch.cat((known, q_at), dim=2)
    return past.laid_positions


def _cos_sin(
    turn: torch.Tensor, axis: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns in positions (3, batch, tokens) -> cos, sin (batch, tokens, head_dim), float32."""
    angle = turn[axis].permute(1, 2, 0).double() * inverse.double()  # exact for long inputs
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().float(), angle.sin().float()


def _of_images(base: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """(batch, keys) true for image tokens: neighbours share a base position, which text tokens never do."""
    if padding is not None:
        index = torch.arange(base.shape[1], device=base.device)
        base = torch.where(padding[:, : base.shape[1]].bool(), base, -1 - index)
    same = base[:, 1:] == base[:, :-1]
    edge = torch.zeros_like(base[:, :1], dtype=torch.bool)
    return torch.cat((edge, same), 1) | torch.cat((same, edge), 1)


def _attention(plain):
    def forward(module, query, key, value, attention_mask, laid_regrouping=None, **kwargs):
        if laid_regrouping is None:
            return plain(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        out = grouped_attention(query, key, value, attention_mask, laid_regrouping, scaling)
        return out.transpose(1, 2).contiguous(), None

    return forward


for _name, _plain, _mask in (
    ("sdpa", attention, mask),
    ("eager", eager_attention_forward, eager_mask),
):
    AttentionInterface.register(f"laid_self_extend_{_name}", _attention(_plain))
    AttentionMaskInterface.register(f"laid_self_extend_{_name}", _mask)
