"""The language model's forward pass over encoded prompts: logits only where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from laid.methods.decoder import text_model
from laid.models.prompts import EncodedPrompt


@dataclass
class Batch:
    """Right-padded prompts.

    ids: (B, T); positions: (3, B, T); lengths: (B,); features: visual tokens of all samples in order (N, hidden),
    which go where `image_mask` (B, T) is true. Under causal attention nothing sees the padding at the right, so no
    attention mask is needed and attention stays in its fast causal form.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    image_mask: torch.Tensor
    features: torch.Tensor | None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        move = [t.to(device) for t in (self.ids, self.positions, self.lengths, self.image_mask)]
        return Batch(*move, self.features.to(device) if self.features is not None else None)

    @property
    def token_mask(self) -> torch.Tensor:
        """(B, T) bool, true where a token is not padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] < self.lengths[:, None]


def collate(prompts: Sequence[EncodedPrompt], features: Sequence[torch.Tensor], pad_id: int = 0) -> Batch:
    """Pad prompts at the right. features: per image, (tokens, hidden), images of all prompts in order."""
    longest = max(len(p.ids) for p in prompts)
    ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=bool)
    positions = np.zeros((3, len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        count = len(prompt.ids)
        ids[row, :count] = prompt.ids
        mask[row, :count] = prompt.image_mask
        positions[:, row, :count] = prompt.positions
        positions[:, row, count:] = prompt.positions[:, -1:]
    lengths = torch.tensor([len(p.ids) for p in prompts])
    joined = torch.cat(list(features)) if len(features) else None
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), lengths, torch.from_numpy(mask), joined)


def embed(model, batch: Batch) -> torch.Tensor:
    """(B, T, hidden): token embeddings with the visual features in their places."""
    embeds = text_model(model).embed_tokens(batch.ids)
    if batch.features is None:
        return embeds
    return embeds.masked_scatter(batch.image_mask[..., None], batch.features.to(embeds.dtype))


def hidden_states(model, batch: Batch) -> torch.Tensor:
    """(B, T, hidden) of the last layer, after the final norm."""
    mask = {"full_attention": None, "sliding_attention": None}
    # None asks sdpa and flash attention for their causal form; eager attention would see the future.
    if text_model(model).config._attn_implementation == "eager":
        mask = None
    return text_model(model)(
        inputs_embeds=embed(model, batch), position_ids=batch.positions, attention_mask=mask, use_cache=False
    ).last_hidden_state


def logits_at(model, hidden: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(N, vocabulary) logits at the N positions (rows, columns) of hidden (B, T, hidden), and nowhere else."""
    return model.get_output_embeddings()(hidden[rows, columns])


def last_logits(model, batch: Batch) -> torch.Tensor:
    """(B, vocabulary) logits at each prompt's last token: what the model would answer first."""
    hidden = hidden_states(model, batch)
    rows = torch.arange(len(batch.lengths), device=hidden.device)
    return logits_at(model, hidden, rows, batch.lengths - 1)
