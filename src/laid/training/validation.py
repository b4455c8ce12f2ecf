"""Validation: held-out questions, asked every so many steps; which student so far is the best, and when to stop.

What was found stands in the log, in the lines of the steps it follows, and nowhere else: a run that goes on from a checkpoint
knows it from there.

    validation_accuracy          share of right answers, over all
    validation_accuracy_20       of those with 20 images
    validation_likelihood        mean log-likelihood of a token of the given answers, where answers may be any text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from laid.evaluation.held_out import HeldOut, Scores
from laid.settings.training import Validation as ValidationSettings
from laid.training.engine import Engine

ACCURACY, LIKELIHOOD = "validation_accuracy", "validation_likelihood"
Line = Mapping[str, Any]


class Validation:
    """The held-out questions of a run, and who asks them.

    asker: makes what asks this process's share of them; steps: of the whole run. train_vision: features change as training goes.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        held_out: HeldOut,
        asker: Callable[[HeldOut], Callable[[], Scores]],
        engine: Engine,
        steps: int,
        train_vision: bool,
    ) -> None:
        self.settings, self.engine, self.steps = settings, engine, steps
        # Where no process holds the whole student, all wait for one another in every layer: they ask the same questions.
        rank, world = (0, 1) if engine.sharded else (engine.rank, engine.world)
        self.sizes = sorted({chat.size for chat in held_out.chats})
        self.free, self.every_time = held_out.free, train_vision
        self.asker, self.share = asker, held_out.share(rank, world)
        self.ask: Callable[[], Scores] | None = None

    def after(self, step: int) -> bool:
        """Whether the questions are asked after `step` steps: every so many, and after the last."""
        return step > 0 and (step % self.settings.every == 0 or step == self.steps)

    def due(self, step: int, log: Sequence[Line]) -> bool:
        """Whether they are, and have not been yet."""
        return self.after(step) and log[-1]["step"] == step and ACCURACY not in log[-1]

    def measure(self, student: nn.Module, model: nn.Module) -> dict[str, float]:
        """Ask; returns what the log says of it. student: the pass as it is laid out over the processes; model: inside it."""
        if self.ask is None or self.every_time:
            self.ask = self.asker(self.share)
        model.eval()
        scores = self.engine.within(student, lambda _: self.ask())
        model.train()
        return self._line(scores)

    def _line(self, scores: Scores) -> dict[str, float]:
        right = [n for size in self.sizes for n in scores.right.get(size, [0, 0])]
        likely = [sum(column) for column in zip([0.0, 0], *scores.likely.values(), strict=True)]
        *right, likelihood, tokens = self.engine.sum([*right, *likely])
        line = {ACCURACY: sum(right[::2]) / sum(right[1::2])}
        line |= {f"{ACCURACY}_{size}": right[2 * k] / right[2 * k + 1] for k, size in enumerate(self.sizes)}
        if self.free:
            line[LIKELIHOOD] = likelihood / tokens
        return {name: round(value, 6) for name, value in line.items()}

    def over(self, log: Sequence[Line]) -> bool:
        """Whether patience has run out: so many validations in a row brought nothing better."""
        found = validations(log)
        if self.settings.patience is None or not found:
            return False
        return len(found) - 1 - found.index(best(log)) >= self.settings.patience


def validations(log: Sequence[Line]) -> list[Line]:
    """The lines of a log that hold one."""
    return [line for line in log if ACCURACY in line]


def best(log: Sequence[Line]) -> Line:
    """The line of the best one: of the highest accuracy, then the highest likelihood, then the earliest."""
    return max(validations(log), key=lambda line: (line[ACCURACY], line.get(LIKELIHOOD, 0.0)))
