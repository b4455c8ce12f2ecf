"""`laid ask`: one question about a few images, the answer's probability, and which images each head looks at as it reads the question.

As in laid.analysis.attention a head is taken at the token of the question where it sees most of an image: what the answer rests on
is often fetched before the last token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from laid.analysis.attention import LayerVisitor
from laid.analysis.attention_rows import attention_rows
from laid.data.questions import OFFICIAL_PROMPT, special_token
from laid.errors import LaidError
from laid.evaluation.scoring import answer_tokens, probability_yes, spoken_answer
from laid.io import half_character
from laid.methods.registry import Loaded
from laid.models.capture import LayerQK
from laid.models.decoder import geometry
from laid.models.features import ImageFeatures
from laid.models.forward import Batch, collate, generate, hidden_states
from laid.models.prompts import TURN_END, EncodedPrompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# A question of this form is asked in the benchmark's words, which the models of this project are trained on.
_YES_OR_NO = re.compile(r"(^|,\s*)(is|are|was|were|do|does|did|has|have|can)\b", re.IGNORECASE)


@dataclass
class Answer:
    """text: greedy. probability: of just these words. yes: the share of yes among yes and no, None where neither is said.

    shares: (layers, heads, images) the largest share of its attention that a token of the question gives an image; words: which
    token that is.
    """

    text: str
    probability: float
    yes: float | None
    shares: np.ndarray
    words: np.ndarray

    def head_of(self, image: int) -> tuple[int, int, float, str]:
        """(layer, head, share, word) of the head that looks most at an image."""
        layer, head = np.unravel_index(self.shares[:, :, image].argmax(), self.shares.shape[:2])
        return (
            int(layer),
            int(head),
            float(self.shares[layer, head, image]),
            str(self.words[layer, head, image]),
        )


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name. Raises LaidError where there are none."""
    if not folder.is_dir():
        raise LaidError(f"{folder}: no such folder of images")
    named = (file for file in folder.iterdir() if not file.name.startswith("."))  # ._a.jpg is macOS's own
    found = sorted(file for file in named if file.suffix.lower() in SUFFIXES)
    if not found:
        raise LaidError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return found


@torch.inference_mode()
def ask(loaded: Loaded, images: Sequence[Path], question: str, most: int = 64) -> Answer:
    """most: tokens of an answer. Raises LaidError for an image that is missing or broken, and for what is no question."""
    if not question.strip():
        raise LaidError("the question is blank")
    if half_character(question):
        raise LaidError(
            "the question holds half a character: is the terminal's encoding another than the locale's?"
        )
    if token := special_token(question):
        raise LaidError(f"the question holds {token}, which a model would not read as text: take it out")
    model, processor = loaded.model, loaded.processor
    device, head, tokenizer = (
        next(model.parameters()).device,
        model.get_output_embeddings(),
        processor.tokenizer,
    )
    features = ImageFeatures(model, processor, Path)
    paths = [str(path) for path in images]
    words = OFFICIAL_PROMPT if _YES_OR_NO.search(question) else ""
    prompt = processor.encoder.encode(question, features.grids(paths), words)
    inputs = collate([prompt], features.get(paths)).to(device)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    (said,) = generate(model, inputs, most, sorted({end, tokenizer.eos_token_id} - {None}))
    text = tokenizer.decode(said, skip_special_tokens=True).strip()

    whole = collate([_with(prompt, said)], features.get(paths)).to(device)
    states = hidden_states(model, whole)[0, len(prompt.ids) - 1 :]
    chances = head(states).float().log_softmax(-1)
    named = torch.tensor([*said, end] if len(said) < most else said, device=device)
    probability = float(chances[: len(named)].gather(-1, named[:, None]).double().sum().exp())
    yes = None
    if spoken_answer(text) in ("yes", "no"):
        yes = float(probability_yes(chances[:1], *answer_tokens(tokenizer)))
    asked = len(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else 0
    shares, rows = _shares(model, inputs, prompt, asked)
    tokens = np.array([tokenizer.decode([token]).strip() for token in prompt.ids.tolist()], dtype=object)[
        rows
    ]
    return Answer(text, probability, yes, shares, tokens)


def _with(prompt: EncodedPrompt, said: Sequence[int]) -> EncodedPrompt:
    """The prompt and the answer behind it."""
    more = prompt.positions[:, -1:] + 1 + np.arange(len(said))
    return EncodedPrompt(
        np.append(prompt.ids, np.asarray(said, dtype=np.int64)),
        np.concatenate([prompt.positions, more], axis=1),
        prompt.block_starts,
        np.append(prompt.image_mask, np.zeros(len(said), dtype=bool)),
    )


def _shares(
    model: torch.nn.Module, inputs: Batch, prompt: EncodedPrompt, skip: int
) -> tuple[np.ndarray, np.ndarray]:
    """(layers, heads, images): the largest share over the question's tokens, and at which token of the prompt.

    skip: tokens between the last image and the question.
    """
    shape, starts = geometry(model), prompt.block_starts
    end = int(np.flatnonzero(prompt.image_mask)[-1]) + 2
    edges = torch.tensor([*starts.tolist(), end], device=inputs.ids.device)
    rows = torch.arange(end + skip, len(prompt.ids), device=inputs.ids.device)
    found, at = np.zeros((2, shape.layers, shape.heads, len(starts)))

    def visit(layer: int, qk: LayerQK) -> None:
        seen = attention_rows(*qk.rotated(), rows[None]).exp()[0].double()
        seen = torch.nn.functional.pad(seen.cumsum(-1), (1, 0))[..., edges].diff(
            dim=-1
        )  # (heads, rows, images)
        most = seen.max(1)
        found[layer], at[layer] = most.values.cpu().numpy(), rows[most.indices].cpu().numpy()

    with LayerVisitor(model, range(shape.layers), visit):
        hidden_states(model, inputs)
    return found, at.astype(int)
