"""From a question and its images to token ids and M-RoPE positions, without building them image by image.

A prompt is `prefix + image blocks + suffix`, where a block is <|vision_start|>, one <|image_pad|> per merged
visual token, <|vision_end|>. Both ends come from the model's own chat template, rendered once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from laid.errors import LaidError

# The official runner's words (visual-haystacks/vhs_benchmark, solvers/base_solver.py).
OFFICIAL_PROMPT = "You are given a set of images. Please answer the following question in Yes or No: "


@dataclass
class EncodedPrompt:
    """One prompt of T tokens with N images.

    ids: (T,) int64; positions: (3, T) int64, the rows time, height, width; block_starts: (N,) int64, the
    index of each image's <|vision_start|>; image_mask: (T,) bool, True where a visual token stands.
    """

    ids: np.ndarray
    positions: np.ndarray
    block_starts: np.ndarray
    image_mask: np.ndarray

    @property
    def span(self) -> int:
        """Number of M-RoPE positions the prompt covers."""
        return int(self.positions.max()) + 1


@dataclass
class PromptEncoder:
    """Encodes prompts for one tokenizer.

    tokenizer: a Hugging Face tokenizer with a chat template; merge_size: patches per side of a visual token;
    system: replaces the template's default system message where given.
    """

    tokenizer: object
    merge_size: int = 2
    vision_start: str = "<|vision_start|>"
    image_pad: str = "<|image_pad|>"
    vision_end: str = "<|vision_end|>"
    _ends: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        ids = self.tokenizer.convert_tokens_to_ids([self.vision_start, self.image_pad, self.vision_end])
        unknown = self.tokenizer.unk_token_id
        for token, value in zip((self.vision_start, self.image_pad, self.vision_end), ids):
            if value is None or value == unknown:
                raise LaidError(f"the tokenizer has no token {token}: not a Qwen vision-language tokenizer")
        self.start_id, self.pad_id, self.end_id = ids
        added = self.tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special]

    def ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids before the first image and after the last one, for the user message `images + text`.

        Raises LaidError for a text that holds one of the tokenizer's special tokens: it would be read as that.
        """
        if text not in self._ends:
            if special := next((token for token in self._special if token in text), None):
                raise LaidError(f"the question {text[-60:]!r} holds the special token {special}: rename it")
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
            rendered = self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
            block = self.vision_start + self.image_pad + self.vision_end
            if rendered.count(block) != 1:
                raise LaidError(
                    f"the chat template renders {rendered.count(block)} image blocks for 1 image: "
                    "use the template of a Qwen vision-language model"
                )
            before, after = rendered.split(block)
            self._ends[text] = tuple(
                np.asarray(self.tokenizer(part, add_special_tokens=False)["input_ids"], dtype=np.int64)
                for part in (before, after)
            )
        return self._ends[text]

    def encode(
        self, question: str, grids: Sequence[tuple[int, int]], prompt: str = OFFICIAL_PROMPT
    ) -> EncodedPrompt:
        """Encode `prompt + question` after images of merged grids (height, width), in visual tokens."""
        before, after = self.ends(prompt + question)
        sizes = np.array([h * w for h, w in grids], dtype=np.int64)
        lengths = sizes + 2
        starts = (
            len(before) + np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(sizes) else np.zeros(0, int)
        )
        total = len(before) + int(lengths.sum()) + len(after)
        ids = np.full(total, self.pad_id, dtype=np.int64)
        ids[: len(before)] = before
        ids[starts] = self.start_id
        ids[starts + lengths - 1] = self.end_id
        ids[total - len(after) :] = after
        mask = np.zeros(total, dtype=bool)
        mask[len(before) : total - len(after)] = True
        mask[starts] = mask[starts + lengths - 1] = False
        return EncodedPrompt(
            ids, mrope_positions(len(before), grids, len(after)), starts.astype(np.int64), mask
        )


def mrope_positions(prefix: int, grids: Sequence[tuple[int, int]], suffix: int) -> np.ndarray:
    """M-RoPE positions (3, T) of `prefix` text tokens, one block per merged grid (h, w), `suffix` text
    tokens.

    Text advances all three axes by one a token. A still image holds its time position, spreads (row, column)
    over height and width, and moves what follows on by max(h, w) (transformers,
    Qwen2_5_VLModel.get_rope_index).
    """
    parts = [np.broadcast_to(np.arange(prefix), (3, prefix))]
    at = prefix
    if grids and set(grids) == {(1, 1)}:  # one token an image: text and images advance alike
        return np.broadcast_to(
            np.arange(prefix + 3 * len(grids) + suffix), (3, prefix + 3 * len(grids) + suffix)
        ).copy()
    for height, width in grids:
        parts.append(np.full((3, 1), at))
        rows, columns = np.divmod(np.arange(height * width), width)
        parts.append(np.stack([np.full(height * width, at + 1), at + 1 + rows, at + 1 + columns]))
        at += 1 + max(height, width)
        parts.append(np.full((3, 1), at))
        at += 1
    parts.append(np.broadcast_to(at + np.arange(suffix), (3, suffix)))
    return np.concatenate(parts, axis=1).astype(np.int64)
