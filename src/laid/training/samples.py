"""Training samples: a conversation, its images in the order shown, and the answers to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from laid.data.chat import Chat
from laid.errors import LaidError
from laid.models.features import ImageFeatures
from laid.models.prompts import EncodedPrompt


@dataclass
class Sample:
    """One training sample.

    index: the conversation's place in its file. paths: its images, in the order shown. prompt: the encoded conversation, T tokens,
    up to the last that predicts one. at, labels: (A,) the tokens that predict answers, and what they predict; of a one-word answer
    the last two, which predict it and the end of the turn. answer_at: the token that predicts the last answer's first.
    text_start: index of the first text token after the last image, None without images. needles: places of the needles
    among the images, None where the data does not say.
    """

    index: int
    paths: list[str]
    prompt: EncodedPrompt
    at: np.ndarray
    labels: np.ndarray
    answer_at: int
    text_start: int | None
    needles: list[int] | None


def build_samples(chats: Sequence[Chat], features: ImageFeatures, ahead: bool = True) -> list[Sample]:
    """Encode conversations and compute the features of their images ahead, as far as memory allows.

    ahead=False leaves features to when they are asked for.
    Raises LaidError where an image is missing or broken, or the chat template does not serve.
    """
    encoder = features.processor.encoder
    samples = []
    for index, chat in enumerate(chats):
        paths = list(chat.images)
        made = encoder.chat(chat, features.grids(paths))
        text_start = int(np.flatnonzero(made.prompt.ids == encoder.end_id)[-1]) + 1 if paths else None
        needles = None if chat.needles is None else list(chat.needles)
        samples.append(
            Sample(index, paths, made.prompt, made.at, made.labels, made.answer_at, text_start, needles)
        )
    if ahead:  # after what cannot be asked was told
        features.prepare((path for sample in samples for path in sample.paths), "images")
    return samples


def mislabelled(samples: Sequence[Sample], share: float, seed: Sequence[int]) -> list[Sample]:
    """The samples, each with probability `share` under the other label: of two, as yes and no are; prompts stay as they are.

    Raises LaidError where answers are not of two kinds of equal length.
    """
    kinds = {tuple(sample.labels.tolist()) for sample in samples}
    if len(kinds) != 2 or len({len(kind) for kind in kinds}) != 1:
        raise LaidError(
            f"label_noise turns one of two answers of equal length into the other, and the data has {len(kinds)}"
            " different answers: leave it out"
        )
    wrong = np.random.default_rng(list(seed)).random(len(samples)) < share
    both = np.array(sorted(kinds)).sum(axis=0)
    return [
        replace(sample, labels=both - sample.labels) if turned else sample
        for sample, turned in zip(samples, wrong, strict=True)
    ]


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
