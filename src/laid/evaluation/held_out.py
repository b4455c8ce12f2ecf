"""Held-out conversations or questions, answered to see how good a model is: by `laid distill --eval`, and while training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laid.data.chat import Chat, are_questions, named_images, read_chats
from laid.data.questions import Question, read_questions
from laid.errors import LaidError
from laid.evaluation.chats import ChatEvaluator
from laid.evaluation.evaluate import Evaluator
from laid.evaluation.scoring import is_right
from laid.methods.registry import Loaded
from laid.settings.measuring import Evaluation


@dataclass(frozen=True)
class Scores:
    """By number of images. right: [right, answers]. likely: [log-likelihood of the given answers, their tokens], of free answers."""

    right: dict[int, list[int]]
    likely: dict[int, list[float]]


@dataclass(frozen=True)
class HeldOut:
    """Conversations. questions: what they are where all are Visual Haystacks questions, whose answers are scored as in cells."""

    chats: list[Chat]
    questions: list[Question]

    @classmethod
    def read(cls, files: Sequence[str | Path], order_seed: int, most: int | None = None) -> HeldOut:
        """most: of each file, its first ones. Raises LaidError for files of both kinds, whose scores do not compare."""
        asked = [are_questions(file) for file in files]
        if len(set(asked)) > 1:
            raise LaidError(
                f"{files[0]} and {files[asked.index(not asked[0])]}: Visual Haystacks questions and other conversations"
                " are scored differently: give files of one kind"
            )
        chats = [chat for file in files for chat in read_chats(file, order_seed)[:most]]
        questions = [q for file in files if asked[0] for q in read_questions(file)[:most]]
        return cls(chats, questions)

    @property
    def free(self) -> bool:
        """Whether answers may be any text."""
        return not self.questions

    @property
    def images(self) -> list[str]:
        """The images that are named by their path, sorted."""
        return named_images(self.chats)

    def share(self, number: int, of: int) -> HeldOut:
        """Every `of`-th one, from `number` on."""
        return HeldOut(self.chats[number::of], self.questions[number::of])

    def asker(
        self,
        loaded: Loaded,
        coco: str | Path,
        settings: Evaluation,
        label: str,
        features: str | Path | None = None,
    ) -> Callable[[], Scores]:
        """What asks all of them. It keeps visual features from one time to the next, which a trained tower makes wrong.

        features: a folder that keeps those of Visual Haystacks questions on disk.
        """
        if self.free:
            chat_evaluator = ChatEvaluator(loaded, coco, settings, label)
            return lambda: self._free(chat_evaluator)
        evaluator = Evaluator(loaded, coco, settings, label, features)
        return lambda: self._yes_no(evaluator)

    def _free(self, evaluator: ChatEvaluator) -> Scores:
        right: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        likely: dict[int, list[float]] = defaultdict(lambda: [0.0, 0])
        for answer in evaluator.ask(self.chats):
            size = answer["images"]
            right[size] = [right[size][0] + answer["right"], right[size][1] + 1]
            likely[size][0] += answer["log_likelihood"]
            likely[size][1] += answer["tokens"]
        return Scores(_by_size(right), _by_size(likely))

    def _yes_no(self, evaluator: Evaluator) -> Scores:
        right: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        found = evaluator.answer(evaluator.ask(self.questions))
        for question, answer in zip(self.questions, found, strict=True):
            right[question.size][0] += is_right(answer)
            right[question.size][1] += 1
        return Scores(_by_size(right), {})


def _by_size(found: dict) -> dict:
    return {size: found[size] for size in sorted(found)}
