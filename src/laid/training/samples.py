"""Training samples: a question, its images in a fixed order, and the answer to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from laid.data.questions import Question, ordered_images
from laid.errors import LaidError
from laid.models.features import ImageFeatures
from laid.models.prompts import OFFICIAL_PROMPT, EncodedPrompt


@dataclass
class Sample:
    """One training sample.

    index: the question's place in its file. paths: its images, in the order shown. prompt: the encoded prompt
    with the answer token appended, T tokens. labels: (2,) token ids, the answer and the end of the turn,
    predicted at the last two tokens. text_start: index of the first text token after the last
    image. needles: places of the needles among the images.
    """

    index: int
    paths: list[str]
    prompt: EncodedPrompt
    labels: np.ndarray
    text_start: int
    needles: list[int]

    @property
    def answer_at(self) -> int:
        """Index of the token that predicts the answer."""
        return len(self.prompt.ids) - 2


def build_samples(
    questions: Sequence[Question],
    features: ImageFeatures,
    order_seed: int,
    ahead: bool = True,
) -> list[Sample]:
    """Encode questions and compute the features of their images ahead, as far as memory allows.

    ahead=False leaves features to when they are asked for.
    Raises LaidError where an answer is not one token, or an image is missing or broken.
    """
    tokenizer, encoder = features.processor.tokenizer, features.processor.encoder
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ordered = [ordered_images(question, order_seed) for question in questions]
    for question in questions:
        encoder.ends(OFFICIAL_PROMPT + question.text)  # one that cannot be asked is told before the work
    if ahead:
        features.prepare((path for paths, _ in ordered for path in paths), "images")
    samples = []
    for index, (question, (paths, needles)) in enumerate(zip(questions, ordered, strict=True)):
        prompt = encoder.encode(question.text, features.grids(paths))
        answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        if len(answer) != 1:
            raise LaidError(
                f"the tokenizer splits the answer {question.answer!r} into {len(answer)} tokens, expected 1:"
                " use the tokenizer of a Qwen vision-language model"
            )
        last = prompt.positions[:, -1:] + 1
        text_start = int(np.flatnonzero(prompt.ids == encoder.end_id)[-1]) + 1
        full = EncodedPrompt(
            np.append(prompt.ids, answer[0]),
            np.concatenate([prompt.positions, last], axis=1),
            prompt.block_starts,
            np.append(prompt.image_mask, False),
        )
        samples.append(Sample(index, paths, full, np.array([answer[0], end]), text_start, needles))
    return samples


def batches_of(lengths: Sequence[int], batch: int, seed: Sequence[int], group: int = 8) -> list[list[int]]:
    """A shuffled order in batches of similar length, so that padding wastes little.

    Indices are shuffled, taken `group` batches at a time, sorted by length within that, and the batches
    shuffled. What does not fill a last batch is left out, whatever its length, so that every step weighs the
    same.
    """
    rng = np.random.default_rng(list(seed))
    order = rng.permutation(len(lengths))[: len(lengths) // batch * batch]
    batches = []
    for start in range(0, len(order), batch * group):
        part = sorted(order[start : start + batch * group].tolist(), key=lambda k: (lengths[k], k))
        batches += [part[at : at + batch] for at in range(0, len(part) - batch + 1, batch)]
    return [batches[k] for k in rng.permutation(len(batches))]
