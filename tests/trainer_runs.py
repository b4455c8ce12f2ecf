"""Trainings that several test files look at."""

import json

import torch

from laid.models.forward import last_logits

METHODS = ("sft", "kd", "laid", "laid_wo_kl", "laid_wo_laid")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def changed(config, training=None, method=None, **settings):
    return config.changed({"training": training or {}, "methods": {method: settings} if method else {}})


class Run:
    """One finished run: its trainer, its folder, and its logits before anything was folded or merged for export."""

    def __init__(self, trainer, out):
        self.trainer, self.out = trainer, out
        self.inputs, *_ = trainer._batch([0, 7, 11], 0)
        self.inputs.positions = trainer._batch([0, 7, 11], 0)[2]
        export = trainer._export

        def seen(folder):
            with torch.no_grad():
                self.logits = last_logits(trainer.model, self.inputs)
            self.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            export(folder)

        trainer._export = seen
        with torch.no_grad():
            self.before = last_logits(trainer.model, self.inputs)
        self.record = trainer.train()
        self.log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def bytes_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
