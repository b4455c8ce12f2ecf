"""An exported student whose queries know how many keys they see: plain weights, one registered attention function.

`export_` folds the per-frequency gains into q_proj and writes the length part into the text config:

    "laid_length": {"reference": 1024.0, "exponent": [[b per head] per layer]}

After `import laid.methods.length_gain`, `enable(model)` (or `attn_implementation={"text_config": "laid_length_sdpa"}`
in from_pretrained) gives the trained model at every length. Cost: one multiplication of Q per layer, heads * head_dim per
token, and a sum over the mask where there is padding; no parameter, no extra memory that grows with keys. Loaded
without it, the checkpoint is the student with its length factor fixed at 1 (as if every query saw `reference` keys).
On CUDA, sdpa without padding runs the flash kernel as before: the scaled query is all that differs.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

from laid.distill.gain import RopeGain, visible_keys
from laid.errors import LaidError
from laid.models.decoder import text_model


@torch.no_grad()
def export_(model: nn.Module, gain: RopeGain) -> None:
    """Fold `gain` into `model` in place and write its length part, if any, into the config, for every layer.

    Raises LaidError as RopeGain.fold_ does.
    """
    gain.fold_(model, tokens=gain.reference)
    if not gain.length_aware:
        return
    exponent = torch.zeros(gain.geometry.layers, gain.geometry.heads)
    exponent[list(gain.layers)] = gain.exponent.detach().float().cpu()
    text_model(model).config.laid_length = {"reference": gain.reference, "exponent": exponent.tolist()}


def enable(model: nn.Module, attention: str = "sdpa") -> nn.Module:
    """Switch a model whose config holds `laid_length` to the length-aware attention; others are left alone.

    attention: "sdpa" or "eager". Returns the model. Raises LaidError when the stored exponents do not fit it.
    """
    text = text_model(model)
    stored = getattr(text.config, "laid_length", None)
    if stored is None:
        return model
    if attention not in ("sdpa", "eager"):
        raise LaidError(f"length-aware attention runs on sdpa or eager, not {attention!r}")
    shape = (len(stored["exponent"]), *{len(row) for row in stored["exponent"]})
    wanted = (text.config.num_hidden_layers, text.config.num_attention_heads)
    if shape != wanted:
        raise LaidError(
            f"laid_length in the config holds exponents for (layers, heads) {shape}, the model has {wanted}"
        )
    text.set_attn_implementation(f"laid_length_{attention}")
    return model


def scaled(module: nn.Module, query: torch.Tensor, keys: int, mask: torch.Tensor | None) -> torch.Tensor:
    """query (batch, heads, tokens, head_dim) times (visible keys / reference) ** b of this layer."""
    stored = module.config.laid_length
    exponent = torch.tensor(stored["exponent"][module.layer_idx], device=query.device)
    tokens = query.shape[2]
    # Without a mask transformers means "causal": from an empty cache, or one token that sees every key.
    counts = visible_keys(mask, tokens, keys - 1 if tokens == 1 else 0, query.device)
    logs = (counts.float().clamp_min(1.0) / stored["reference"]).log()
    factor = (exponent[:, None] * logs[:, None, :]).exp()
    return query * factor[..., None].to(query.dtype)


def _sdpa(module, query, key, value, attention_mask, **kwargs):
    query = scaled(module, query, key.shape[2], attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _eager(module, query, key, value, attention_mask, **kwargs):
    query = scaled(module, query, key.shape[2], attention_mask)
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("laid_length_sdpa", _sdpa)
AttentionInterface.register("laid_length_eager", _eager)
AttentionMaskInterface.register("laid_length_sdpa", sdpa_mask)
AttentionMaskInterface.register("laid_length_eager", eager_mask)
