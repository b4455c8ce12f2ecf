"""Any conversations asked of a model: does it say the given answer, and how likely does it find it."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from laid.data.chat import Chat, answered, image_file
from laid.distill.distillation import ROWS
from laid.methods.registry import Loaded
from laid.models.features import ImageFeatures
from laid.models.forward import Batch, collate, generate, hidden_states
from laid.models.prompts import TURN_END, EncodedChat, EncodedPrompt
from laid.progress import Progress
from laid.settings.measuring import Evaluation

ROOM = 8  # tokens that a said answer may have beyond twice those of the given one


def normalised(text: str) -> str:
    """As SQuAD's evaluate-v1.1.py compares answers: lower case, without punctuation, articles and surplus blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


class ChatEvaluator:
    """Asks one loaded model; each image is seen once."""

    def __init__(
        self, loaded: Loaded, coco_root: str | Path, settings: Evaluation, label: str = "evaluate"
    ) -> None:
        self.model, self.processor, self.settings, self.label = (
            loaded.model,
            loaded.processor,
            settings,
            label,
        )
        limit = int(settings.feature_cache_gb * 2**30)
        self.features = ImageFeatures(self.model, self.processor, image_file(coco_root), limit_bytes=limit)
        self.device = next(self.model.parameters()).device

    @torch.no_grad()  # inference mode's tensors would not serve a training that goes on
    def ask(self, chats: Sequence[Chat]) -> list[dict[str, Any]]:
        """For every answer: {"id", "images", "given", "said", "right", "log_likelihood", "tokens"}.

        What stands before an answer is as the data has it. right: exact match of `normalised`. log_likelihood: of the given
        answer and the end of the turn, a sum over its tokens.
        """
        found = []
        asked = [part for chat in chats for part in answered(chat)]
        with Progress(len(asked), self.label, unit="answers") as bar:
            for chat in asked:
                made = self.processor.encoder.chat(chat, self.features.grids(chat.images))
                likelihood, tokens = self._likelihood(chat, made)
                said, given = self._said(chat, made), chat.turns[-1].text
                found.append(
                    {
                        "id": chat.id,
                        "images": chat.size,
                        "given": given,
                        "said": said,
                        "right": normalised(said) == normalised(given),
                        "log_likelihood": likelihood,
                        "tokens": tokens,
                    }
                )
                bar.update(1)
        return found

    def _batch(self, chat: Chat, prompt: EncodedPrompt) -> Batch:
        return collate([prompt], self.features.get(chat.images)).to(self.device)

    def _likelihood(self, chat: Chat, made: EncodedChat) -> tuple[float, int]:
        states = hidden_states(self.model, self._batch(chat, made.prompt))[0]
        labels = torch.from_numpy(made.labels[made.at >= made.answer_at]).to(states.device)
        total, head = 0.0, self.model.get_output_embeddings()
        for rows, named in zip(states[made.answer_at :].split(ROWS), labels.split(ROWS), strict=True):
            chances = head(rows).float().log_softmax(-1)
            total += float(chances.gather(-1, named[:, None]).double().sum())
        return total, len(labels)

    def _said(self, chat: Chat, made: EncodedChat) -> str:
        tokenizer = self.processor.tokenizer
        stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)} - {None}
        most = 2 * int((made.at >= made.answer_at).sum()) + ROOM
        inputs = self._batch(chat, made.asked)
        (ids,) = generate(self.model, inputs, most, sorted(stops), self.settings.chunk_tokens)
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
