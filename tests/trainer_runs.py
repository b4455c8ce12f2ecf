"""Trainings that several test files look at."""

import json
from unittest import mock

import torch

from laid.models.forward import last_logits
from laid.training import engine, recipe
from laid.training.data import Piece
from laid.training.step import forward_backward, lesson_of, training_step

METHODS = ("sft", "kd", "laid", "laid_wo_kl", "laid_wo_laid", "laid_plus")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def changed(config, training=None, method=None, **settings):
    return config.changed({"training": training or {}, "methods": {method: settings} if method else {}})


class Ready:
    """A run before its first step: `t` is what its steps need, `model` the student in it."""

    def __init__(self, run):
        self.t, self.model = recipe.prepare(run, engine.start(run.settings.training))
        self.data, self.lesson = self.t.data, self.t.lesson

    def step(self, indices, at=0):
        return training_step(self.t, indices, at)

    def losses(self, indices, at=0):
        """By part; with gradients where they are wanted."""
        piece = self.data.piece(indices, at, self.t.steps)
        return forward_backward(self.lesson, piece, at / self.t.steps)


class Finished:
    """A finished run: its folder, and the student before anything was folded or merged for export."""

    def __init__(self, run):
        self.run, self.out, made = run, run.out, []

        def prepare(run, engine):
            self.t, self.model = recipe_prepare(run, engine)
            self.inputs = self.t.data.inputs([0, 7, 11])
            made.append(self._logits())
            return self.t, self.model

        def export(*args):
            made.append(self._logits())
            self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            return recipe_export(*args)

        recipe_prepare, recipe_export = recipe.prepare, recipe._export
        with mock.patch.multiple(recipe, prepare=prepare, _export=export):
            self.record = recipe.train(run)
        self.before, self.logits = made
        self.log = [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]

    @torch.no_grad()
    def _logits(self):
        training = self.model.training
        try:
            return last_logits(self.model.eval(), self.inputs)
        finally:
            self.model.train(training)


def bytes_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Losses:
    """A model under a method, against a teacher: called, it gives the losses by part, and "" for all together.

    Backward has then been, where gradients are wanted.
    """

    def __init__(self, model, method, teacher=None):
        self.model, self.teacher = model, teacher
        self.lesson = lesson_of(model, method, teacher)
        self.alignments = self.lesson.distillation.alignments

    def __call__(self, inputs, labels, indices, progress):
        return forward_backward(self.lesson, Piece.of(indices, inputs, labels), progress)
