"""Evaluation: a model, a method, question files of several sizes, and every answer kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laid import provenance
from laid.data.coco import annotation_file
from laid.data.questions import Question, haystack_file, ordered_images, read_questions
from laid.errors import LaidError
from laid.evaluation.scoring import answer_tokens, probability_yes, spoken_answer
from laid.io import safe_join, write_json
from laid.methods.registry import Loaded, load_with_method
from laid.models.features import ImageFeatures
from laid.models.forward import collate, generate, last_logits
from laid.models.loading import parameter_label, parameters
from laid.models.prompts import EncodedPrompt
from laid.progress import Progress
from laid.results.cells import make_cell, write_cell


@dataclass
class Asked:
    """One question made ready: its prompt, its images in the order shown, the needles' places among them."""

    question: Question
    paths: list[str]
    needles: list[int]
    prompt: EncodedPrompt


class Evaluator:
    """Answers questions with one loaded model. Features are kept between sizes; every image is seen once."""

    def __init__(
        self,
        loaded: Loaded,
        coco_root: str | Path,
        settings: Mapping[str, Any],
        label: str = "evaluate",
        features_folder: str | Path | None = None,
    ):
        self.model, self.processor, self.settings, self.label = (
            loaded.model,
            loaded.processor,
            settings,
            label,
        )
        self.features = ImageFeatures(
            self.model,
            self.processor,
            lambda path: safe_join(coco_root, path),
            limit_bytes=int(settings["feature_cache_gb"] * 2**30),
            store=features_folder,
        )
        self.device = next(self.model.parameters()).device
        self.by_logits = settings["scoring"] == "logits"
        if self.by_logits:
            self.yes, self.no = answer_tokens(self.processor.tokenizer)

    def ask(self, questions: Sequence[Question]) -> list[Asked]:
        """Order the images, compute their features ahead as far as memory allows, encode the prompts."""
        ordered = [ordered_images(q, self.settings["order_seed"]) for q in questions]
        label = None if self.features.computed else f"{self.label}: images"
        self.features.prepare((p for paths, _ in ordered for p in paths), label)
        encode = self.processor.encoder.encode
        return [
            Asked(question, paths, needles, encode(question.text, self.features.grids(paths)))
            for question, (paths, needles) in zip(questions, ordered)
        ]

    @torch.inference_mode()
    def answer(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """One answer per question, in the order given: {"id", "label", "answer", "p_yes", "needles"}."""
        answers: dict[int, dict[str, Any]] = {}
        for batch in self._batches(asked):
            prompts = [asked[k].prompt for k in batch]
            features = [f for k in batch for f in self.features.get(asked[k].paths)]
            inputs = collate(prompts, features, self.processor.tokenizer.pad_token_id or 0).to(self.device)
            for k, (said, p_yes) in zip(batch, self._say(inputs)):
                item = asked[k]
                answers[k] = {
                    "id": item.question.id,
                    "label": item.question.answer,
                    "answer": said,
                    "p_yes": p_yes,
                    "needles": item.needles,
                }
        return [answers[k] for k in range(len(asked))]

    def _say(self, inputs) -> list[tuple[str, float | None]]:
        chunk = self.settings["chunk_tokens"]
        if self.by_logits:
            chances = probability_yes(last_logits(self.model, inputs, chunk), self.yes, self.no)
            return [("yes" if p > 0.5 else "no", round(p, 6)) for p in chances.tolist()]
        tokenizer = self.processor.tokenizer
        stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")} - {None}
        said = generate(self.model, inputs, self.settings["max_new_tokens"], sorted(stops), chunk)
        return [(spoken_answer(tokenizer.decode(ids, skip_special_tokens=True)), None) for ids in said]

    def _batches(self, asked: Sequence[Asked]) -> Iterator[list[int]]:
        """Indices in batches of at most `batch_tokens` tokens; for generation, of one length each."""
        order = sorted(range(len(asked)), key=lambda k: (len(asked[k].prompt.ids), k))
        batch: list[int] = []
        for k in order:
            length = len(asked[k].prompt.ids)
            full = (len(batch) + 1) * length > self.settings["batch_tokens"]
            mixed = batch and not self.by_logits and length != len(asked[batch[0]].prompt.ids)
            if batch and (full or mixed):
                yield batch
                batch = []
            batch.append(k)
        if batch:
            yield batch


def evaluate_cells(
    config: Mapping[str, Any],
    student: str,
    method: str,
    model: str | Path,
    runs: Sequence[str | Path],
    coco_root: str | Path,
    questions: str | Path,
    sizes: Sequence[int],
    out: str | Path,
    device: str = "cpu",
    features_folder: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Measure one student under one method at every size; write out/<size>.json each and out/cost.json.

    model: the checkpoint of the student as it is. runs: for a trained method, one run folder per seed. Raises
    LaidError for a method without its runs, two runs of one seed, a missing question file, a broken image;
    nothing is written then.
    """
    start = time.perf_counter()
    settings = config["evaluation"]
    sizes, seeds = list(dict.fromkeys(sizes)), [seed_of(run) for run in runs]
    if len(set(seeds)) < len(seeds):
        raise LaidError(f"{student} {method}: two of the {len(seeds)} runs have one seed: {sorted(seeds)}")
    asked_of = {size: read_questions(haystack_file(questions, size)) for size in sizes}
    for size, entries in asked_of.items():
        wrong = next((q for q in entries if q.size != size), None)
        if wrong is not None:
            raise LaidError(
                f"{haystack_file(questions, size)}: question {wrong.id} has {wrong.size} images,"
                f" expected {size}"
            )
    answers: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    tokens: dict[int, list[int]] = {size: [] for size in sizes}
    spans: dict[int, list[int]] = {size: [] for size in sizes}
    label = None
    for run, seed in [(run, seed_of(run)) for run in runs] or [(None, 0)]:
        loaded = load_with_method(config, method, model, run, device)
        label = config["models"]["labels"].get(student) or parameter_label(parameters(loaded.model))
        evaluator = Evaluator(loaded, coco_root, settings, f"{student} {method}", features_folder)
        total = sum(len(entries) for entries in asked_of.values())
        with Progress(total, f"{student} {method}: seed {seed}", unit="questions") as bar:
            for size in sorted(sizes):
                asked = evaluator.ask(asked_of[size])
                found = evaluator.answer(asked)
                answers[size] += [{**answer, "seed": seed} for answer in found]
                if run in (None, *runs[:1]):
                    tokens[size] = [len(a.prompt.ids) for a in asked]
                    spans[size] = [a.prompt.span for a in asked]
                right = sum(a["answer"] in (a["label"], "both") for a in found) / len(found)
                bar.update(len(found), size=size, accuracy=right)
    cells = []
    for size in sizes:
        inputs: dict[str, Any] = {
            "questions": haystack_file(questions, size),
            "images": (coco_root, sorted({p for q in asked_of[size] for p in (*q.needles, *q.distractors)})),
            "model": source_of(model),
            **{
                f"annotations_{split}": annotation_file(coco_root, split)
                for split in ("train2017", "val2017")
            },
            **{f"run_seed{seed_of(run)}": Path(run) / "model" for run in runs},
        }
        cell = make_cell(
            scale=config["scale"],
            student=student,
            label=label,
            role="teacher" if student == config["models"]["teacher"] else "student",
            method=method,
            size=size,
            answers=answers[size],
            tokens_mean=sum(tokens[size]) / len(tokens[size]),
            positions_mean=sum(spans[size]) / len(spans[size]),
            provenance=provenance.collect(
                "evaluate", config, inputs, student=student, method=method, size=size
            ),
        )
        write_cell(Path(out) / f"{size}.json", cell)
        cells.append(cell)
    write_json(Path(out) / "cost.json", provenance.cost(start))
    return cells


def source_of(model: str | Path) -> str | Path:
    """A checkpoint as provenance names it: a local folder, or "hub:owner/name"."""
    return Path(model) if Path(model).is_dir() else f"hub:{model}"


def seed_of(run: str | Path) -> int:
    """The seed a run folder is named for. Raises LaidError for another name."""
    name = Path(run).name
    if not (name.startswith("seed") and name[4:].isdigit()):
        raise LaidError(f"{run}: expected a run folder named seed<K>")
    return int(name[4:])
