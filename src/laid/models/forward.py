"""The language model's forward pass over encoded prompts: logits only where they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from laid.errors import LaidError
from laid.models.attention import SDPA, cache_for, needs_no_mask
from laid.models.decoder import text_model
from laid.models.families import family_of
from laid.models.prompts import EncodedPrompt


@dataclass
class Batch:
    """Right-padded prompts.

    ids: (B, T); positions: (3, B, T); lengths: (B,); features: visual tokens of all samples in order (N,
    hidden, or k times that: Family.image_features), which go where `image_mask` (B, T) is true. Under causal attention nothing sees the padding at
    the right, so no attention mask is needed and attention stays in its fast causal form.
    score_bias: (B, T) added to the scores that tokens after the last image give each key (laid.distill.dilution); None adds
    nothing.
    packed: `lengths`, known to Python; the decoder is then given the prompts one behind the other, without padding.
    answers: (rows, columns) of the N tokens that predict answers; None stands for the last two of each prompt.
    images: instead of features, what `with_features` makes them from: (pixels, grid_thw) of the images, each once,
    and (images of all samples in order,) which of them it is.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    image_mask: torch.Tensor
    features: torch.Tensor | None
    images: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    score_bias: torch.Tensor | None = None
    packed: Sequence[int] | None = None
    answers: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        move = [t.to(device) for t in (self.ids, self.positions, self.lengths, self.image_mask)]
        features = self.features.to(device) if self.features is not None else None
        images = tuple(t.to(device) for t in self.images) if self.images is not None else None
        bias = self.score_bias.to(device) if self.score_bias is not None else None
        answers = (
            (self.answers[0].to(device), self.answers[1].to(device)) if self.answers is not None else None
        )
        return Batch(*move, features, images, bias, self.packed, answers)

    @property
    def answer_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, columns), (N,) each, of the tokens that predict answers, prompt by prompt."""
        if self.answers is not None:
            return self.answers
        rows = torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(2)
        return rows, torch.stack([self.lengths - 2, self.lengths - 1], 1).flatten()

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


def answers_at(at: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) of Batch.answers: at has, for each prompt, the tokens that predict its answers."""
    rows = np.repeat(np.arange(len(at)), [len(columns) for columns in at])
    return torch.from_numpy(rows), torch.from_numpy(np.concatenate(at).astype(np.int64))


def with_features(model, batch: Batch) -> Batch:
    """`batch` with the features of its images, computed here and now, with gradients where the tower is trained."""
    if batch.images is None:
        return batch
    pixels, grid, order = batch.images
    found = family_of(text_model(model).config).image_features(model, pixels, grid)
    return replace(batch, features=torch.cat([found[k] for k in order.tolist()]), images=None)


def embed(model, batch: Batch) -> torch.Tensor:
    """(B, T, hidden): token embeddings with the visual features in their places."""
    embeds = text_model(model).embed_tokens(batch.ids)
    if batch.features is None:
        return embeds
    first = batch.features[:, : embeds.shape[-1]]
    mask = batch.image_mask[..., None].to(embeds.device)
    return embeds.masked_scatter(mask, first.to(embeds.device, embeds.dtype))


def deep_inputs(text, batch: Batch, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Arguments of the decoder `text` for tokens start to stop: visual features that are not for the embeddings."""
    hidden = text.config.hidden_size
    if batch.features is None or batch.features.shape[-1] == hidden:
        return {}
    mask = batch.image_mask[:, start:stop]
    row = batch.image_mask.flatten().cumsum(0).view_as(batch.image_mask)[:, start:stop][mask] - 1
    deep = batch.features[row, hidden:].split(hidden, dim=-1)
    return family_of(text.config).deep_inputs(deep, mask)


def biased_mask(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T) causal mask to be added to scores, with `batch.score_bias` in the rows after the last image."""
    at = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    # behind the last visual token stands <|vision_end|>
    question = at > (batch.image_mask * at).amax(1, keepdim=True) + 1
    # Rows of a multiple of 16 elements, which fused attention reads as they are; others it copies in every layer.
    bias = F.pad(batch.score_bias.to(dtype), (0, -len(at) % 16))
    mask = (question[:, :, None] * bias[:, None])[..., : len(at)]
    return mask.masked_fill_(at > at[:, None], torch.finfo(dtype).min)[:, None]


def hidden_states(model, batch: Batch) -> torch.Tensor:
    """(B, T, hidden) of the last layer, after the final norm.

    Raises LaidError where a batch has a score_bias and the model's attention takes no mask.
    """
    text = text_model(model)
    if packs(text, batch):
        return packed_states(model, text, batch)
    embeds = embed(model, batch)
    family, attention = family_of(text.config), text.config._attn_implementation
    mask: Any = family.no_mask
    if batch.score_bias is not None:
        if attention.startswith("flash"):
            raise LaidError(
                f"dilution adds to attention scores, which {attention} does not take: set evaluation.attention to sdpa"
            )
        mask = family.mask(biased_mask(batch, _computed_in(embeds)))
    # No mask asks sdpa and flash attention for their causal form; eager attention would see the future.
    elif attention.endswith("eager"):  # also our variants of it
        mask = None
    return text(
        inputs_embeds=embeds,
        position_ids=batch.positions,
        attention_mask=mask,
        use_cache=False,
        **deep_inputs(text, batch),
    ).last_hidden_state


def _computed_in(embeds: torch.Tensor) -> torch.dtype:
    """The format that attention computes in: autocast would make every layer a copy of its own of a mask in another."""
    device = embeds.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else embeds.dtype


def packed_states(model, text, batch: Batch) -> torch.Tensor:
    """(B, T, hidden) as `hidden_states`, of prompts read one behind the other; 0 where padding is."""
    needs_no_mask(text)
    place = places(batch)
    one = replace(
        batch,
        ids=batch.ids.flatten()[None, place],
        positions=batch.positions.flatten(1)[:, None, place],
        image_mask=batch.image_mask.flatten()[None, place],
    )
    embeds = embed(model, one)
    masks: list[torch.Tensor] = []
    if batch.score_bias is not None:
        dtype = _computed_in(embeds)
        for row, length in enumerate(batch.packed):
            alone = [x[row : row + 1, :length] for x in (batch.ids, batch.image_mask, batch.score_bias)]
            masks.append(
                biased_mask(replace(batch, ids=alone[0], image_mask=alone[1], score_bias=alone[2]), dtype)
            )
    ends = torch.tensor([0, *itertools.accumulate(batch.packed)], dtype=torch.int32)
    ends = ends.to(embeds.device, non_blocking=True)
    hidden = text(
        inputs_embeds=embeds,
        position_ids=one.positions,
        attention_mask=family_of(text.config).no_mask,
        use_cache=False,
        laid_packed=(tuple(batch.packed), ends, masks),
        **deep_inputs(text, one),
    ).last_hidden_state
    return padded(hidden, batch)


def packs(text, batch: Batch) -> bool:
    """Whether the prompts are packed. Only sdpa keeps them apart; for other attention they are padded, to the same effect."""
    several = batch.packed is not None and len(batch.packed) > 1
    return several and text.config._attn_implementation in ("sdpa", SDPA)


def places(batch: Batch) -> torch.Tensor:
    """(N,) where the tokens that are no padding lie in B x T."""
    width, device = batch.ids.shape[1], batch.ids.device
    return torch.cat(
        [torch.arange(row * width, row * width + n, device=device) for row, n in enumerate(batch.packed)]
    )


def padded(x: torch.Tensor, batch: Batch, dim: int = 1) -> torch.Tensor:
    """Packed x, one row whose tokens lie along `dim`, as a padded batch: (B, ...) with T tokens there and 0 in the padding."""
    count, width = batch.ids.shape
    flat = x[0].movedim(dim - 1, 0)
    wide = flat.new_zeros(count * width, *flat.shape[1:]).index_copy(0, places(batch), flat)
    return wide.view(count, width, *flat.shape[1:]).movedim(1, dim)


def logits_at(model, hidden: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(N, vocabulary) logits at N places (rows, columns) of hidden (B, T, hidden), and nowhere else."""
    return model.get_output_embeddings()(hidden[rows.to(hidden.device), columns.to(hidden.device)])


def last_logits(model, batch: Batch, chunk: int = 0, cache=None) -> torch.Tensor:
    """(B, vocabulary) logits at each prompt's last token: what the model would answer first.

    chunk: read prompts longer than this many tokens piece by piece, so that activations stay small; 0 reads
    them whole. cache: a transformers Cache to fill, for generation (all prompts of the batch then have one
    length).
    """
    rows = torch.arange(len(batch.lengths), device=batch.ids.device)
    total = batch.ids.shape[1]
    if cache is None and not 0 < chunk < total:
        return logits_at(model, hidden_states(model, batch), rows, batch.lengths - 1)
    cache = cache_for(total) if cache is None else cache
    text, embeds = text_model(model), embed(model, batch)
    needs_no_mask(text)
    last = torch.zeros(embeds.shape[0], embeds.shape[2], dtype=embeds.dtype, device=embeds.device)
    for start in range(0, total, chunk or total):
        stop = min(total, start + (chunk or total))
        hidden = text(
            inputs_embeds=embeds[:, start:stop],
            position_ids=batch.positions[:, :, start:stop],
            past_key_values=cache,
            use_cache=True,
            **deep_inputs(text, batch, start, stop),
        ).last_hidden_state.to(embeds.device)
        here = (batch.lengths > start) & (batch.lengths <= stop)
        last[here] = hidden[rows[here], batch.lengths[here] - 1 - start]
    return model.get_output_embeddings()(last)


def generate(
    model,
    batch: Batch,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    chunk: int = 0,
    seen: Callable[[torch.Tensor], Any] = id,
) -> list[list[int]]:
    """Greedy answers, token ids without the stop token. All prompts of the batch must have one length.

    seen: is given the logits (B, vocabulary) of every token, the stop token's as well.

    Written out because `generate` of the library would run the vision tower again for every question.
    """
    if len(set(batch.lengths.tolist())) != 1:
        raise ValueError("generation takes prompts of one length at a time")
    cache = cache_for(batch.ids.shape[1] + max_new_tokens - 1)
    text = text_model(model)
    logits = last_logits(model, batch, chunk, cache)
    seen(logits)
    token = logits.argmax(-1)
    position = batch.positions.amax(dim=(0, 2)) + 1
    answers: list[list[int]] = [[] for _ in token]
    going = torch.ones(len(token), dtype=torch.bool, device=token.device)
    stops = torch.tensor(list(stop_ids), device=token.device)
    for step in range(max_new_tokens):
        going &= ~torch.isin(token, stops)
        if not bool(going.any()):
            break
        for row in torch.nonzero(going).flatten().tolist():
            answers[row].append(int(token[row]))
        if step == max_new_tokens - 1:
            break
        hidden = text(
            inputs_embeds=text.embed_tokens(token[:, None]),
            position_ids=position[None, :, None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, -1])
        seen(logits)
        token = logits.argmax(-1)
        position = position + 1
    return answers
