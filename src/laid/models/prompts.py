"""From a question and its images to token ids and M-RoPE positions, without building them image by image.

A prompt is `prefix + image blocks + suffix`, where a block is <|vision_start|>, one <|image_pad|> per merged
visual token, <|vision_end|>. Both ends come from the model's own chat template, rendered once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laid.data.chat import Chat, Turn
from laid.data.questions import OFFICIAL_PROMPT
from laid.errors import LaidError

TURN_END = "<|im_end|>"


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
class EncodedChat:
    """A conversation of T tokens, up to the last token that predicts one, and its A answer tokens.

    at: (A,) int64, ascending, the tokens that predict them; labels: (A,) int64, their ids, each answer's last being the end of the
    turn. answer_at: the token that predicts the last answer's first token.
    """

    prompt: EncodedPrompt
    at: np.ndarray
    labels: np.ndarray
    answer_at: int

    @property
    def asked(self) -> EncodedPrompt:
        """What stands before the last answer."""
        whole, end = self.prompt, self.answer_at + 1
        return EncodedPrompt(
            whole.ids[:end], whole.positions[:, :end], whole.block_starts, whole.image_mask[:end]
        )


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
            self._require_plain(text)
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
        none = np.zeros(0, dtype=np.int64)
        texts = [before, *[none] * (len(grids) - 1), after] if grids else [np.concatenate([before, after])]
        return self._assembled(texts, grids)

    def chat(self, chat: Chat, grids: Sequence[tuple[int, int]]) -> EncodedChat:
        """Encode a conversation whose images are of these merged grids; the text is what the chat template makes of it.

        Answers are encoded apart from what stands before them, as they are when a model gives them.
        Raises LaidError for a template that does not render a conversation's beginning as the beginning of the whole.
        """
        texts: list[list[np.ndarray]] = [[]]
        learned: list[tuple[int, int, np.ndarray]] = []  # (text, place in it, tokens) of each answer
        for piece, is_answer in self._pieces(chat.turns):
            if is_answer:
                tokens = np.append(self._tokens(piece), self.tokenizer.convert_tokens_to_ids(TURN_END))
                learned.append((len(texts) - 1, sum(map(len, texts[-1])), tokens))
                texts[-1].append(tokens)
                continue
            for number, text in enumerate(piece):
                if number:
                    texts.append([])
                texts[-1].append(text)
        joined = [np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in texts]
        begins = [0, *np.cumsum([len(t) + h * w + 2 for t, (h, w) in zip(joined, grids)]).tolist()]
        joined[-1] = joined[-1][:-1]  # what the last token would predict, nobody learns
        prompt = self._assembled(joined, grids)
        at = [begins[text] + place + np.arange(len(tokens)) - 1 for text, place, tokens in learned]
        labels = [tokens for _, _, tokens in learned]
        return EncodedChat(
            prompt, np.concatenate(at), np.concatenate(labels).astype(np.int64), int(at[-1][0])
        )

    def _pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[Any, bool]]:
        """The rendered conversation: (token ids between its images, False), and (an answer's text, True)."""
        if len(turns) == 2 and turns[0].role == "user" and turns[1].learned:
            *images, text = turns[0].content
            if (
                images and not any(images) and text is not None
            ):  # images, then a text: rendered once for all questions
                before, after = self.ends(text)
                yield [before, *[np.zeros(0, np.int64)] * (len(images) - 1), after], False
                yield turns[1].text, True
                return
        for turn in turns:
            self._require_plain(turn.text)
        messages = [_message(turn) for turn in turns]
        block, done = self.vision_start + self.image_pad + self.vision_end, ""
        for k, turn in enumerate(turns):
            if not turn.learned:
                continue
            before = self.tokenizer.apply_chat_template(
                messages[:k], tokenize=False, add_generation_prompt=True
            )
            whole = self.tokenizer.apply_chat_template(messages[: k + 1], tokenize=False)
            answer, end, _ = whole[len(before) :].partition(TURN_END)
            if not before.startswith(done) or not whole.startswith(before) or not end or block in answer:
                raise LaidError(
                    "the chat template does not render a conversation turn by turn (its beginning changes as it goes on):"
                    " laid cannot tell the answers' tokens"
                )
            yield [self._tokens(part) for part in before[len(done) :].split(block)], False
            yield answer, True
            done = before + answer + end

    def _require_plain(self, text: str) -> None:
        if special := next((token for token in self._special if token in text), None):
            raise LaidError(f"the question {text[-60:]!r} holds the special token {special}: rename it")

    def _tokens(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def _assembled(self, texts: Sequence[np.ndarray], grids: Sequence[tuple[int, int]]) -> EncodedPrompt:
        """texts: token ids before the first image, between images, and after the last one."""
        visual = np.array([h * w for h, w in grids], dtype=np.int64)
        words = np.array([len(text) for text in texts], dtype=np.int64)
        begins = np.concatenate([[0], np.cumsum(words[:-1] + visual + 2)]).astype(np.int64)  # of the texts
        starts = begins[:-1] + words[:-1]
        ids = np.full(int(begins[-1] + words[-1]), self.pad_id, dtype=np.int64)
        mask = np.ones(len(ids), dtype=bool)
        for begin, text in zip(begins.tolist(), texts):
            if len(text):
                ids[begin : begin + len(text)] = text
                mask[begin : begin + len(text)] = False
        for places, token in ((starts, self.start_id), (starts + visual + 1, self.end_id)):
            ids[places], mask[places] = token, False
        positions = mrope_positions(
            int(words[0]), grids, int(words[-1]) if len(grids) else 0, words[1:-1].tolist()
        )
        return EncodedPrompt(ids, positions, starts, mask)


def _message(turn: Turn) -> dict[str, Any]:
    if None not in turn.content:
        return {"role": turn.role, "content": turn.text}
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.content]
    return {"role": turn.role, "content": parts}


def mrope_positions(
    prefix: int, grids: Sequence[tuple[int, int]], suffix: int, between: Sequence[int] = ()
) -> np.ndarray:
    """M-RoPE positions (3, T) of `prefix` text tokens, one block per merged grid (h, w), `suffix` text
    tokens. between: text tokens after each image but the last, where there are any.

    Text advances all three axes by one a token. A still image holds its time position, spreads (row, column)
    over height and width, and moves what follows on by max(h, w) (transformers,
    Qwen2_5_VLModel.get_rope_index).
    """
    parts = [np.broadcast_to(np.arange(prefix), (3, prefix))]
    at = prefix
    if grids and set(grids) == {(1, 1)}:  # one token an image: text and images advance alike
        total = prefix + 3 * len(grids) + sum(between) + suffix
        return np.broadcast_to(np.arange(total), (3, total)).copy()
    for (height, width), words in zip(grids, [*between, *[0] * (len(grids) - len(between))]):
        parts.append(np.full((3, 1), at))
        rows, columns = np.divmod(np.arange(height * width), width)
        parts.append(np.stack([np.full(height * width, at + 1), at + 1 + rows, at + 1 + columns]))
        at += 1 + max(height, width)
        parts.append(np.full((3, 1), at))
        at += 1
        if words:
            parts.append(np.broadcast_to(at + np.arange(words), (3, words)))
            at += words
    parts.append(np.broadcast_to(at + np.arange(suffix), (3, suffix)))
    return np.concatenate(parts, axis=1).astype(np.int64)
