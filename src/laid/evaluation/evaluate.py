"""Evaluation: a model, a method, question files of several sizes, and every answer kept."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from laid import provenance
from laid.data.images import require_images
from laid.data.questions import Question, ordered_images
from laid.errors import LaidError
from laid.evaluation.measure import measure
from laid.evaluation.scoring import answer_tokens, probability_yes, spoken_answer
from laid.evaluation.sets import QuestionSet, prompt_of
from laid.io import read_record, require_place, safe_join
from laid.methods.registry import Loaded, load_with_method, require_method
from laid.models import parallel
from laid.models.features import ImageFeatures
from laid.models.forward import collate, generate, last_logits
from laid.models.loading import empty_model, parameter_label, parameters, source_of
from laid.models.prompts import EncodedPrompt
from laid.settings import Settings
from laid.settings.measuring import Evaluation


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
        settings: Evaluation,
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
            limit_bytes=int(settings.feature_cache_gb * 2**30),
            store=features_folder,
        )
        self.device = next(self.model.parameters()).device
        self.by_logits = settings.scoring == "logits"
        if self.by_logits:
            self.yes, self.no = answer_tokens(self.processor.tokenizer)

    def ask(self, questions: Sequence[Question]) -> list[Asked]:
        """Order the images, encode the prompts, compute the images' features ahead as far as memory allows."""
        asked = self._encoded(questions)
        self._prepare(asked)
        return asked

    def answer(
        self, asked: Sequence[Asked], spoken: Callable[[str], str] = spoken_answer
    ) -> list[dict[str, Any]]:
        """One answer per question, in the order given: {"id", "label", "answer", "p_yes", "needles"}.

        spoken: what a generated response says, by the rule of the benchmark.
        """
        answers: dict[int, dict[str, Any]] = {}
        for batch in self._batches(asked):
            answers |= zip(batch, self._answered([asked[k] for k in batch], spoken), strict=True)
        return [answers[k] for k in range(len(asked))]

    def answers(self, part: QuestionSet, done: Container[Any] = ()) -> Iterator[list[dict[str, Any]]]:
        """Answers of a set as their batches end, with the prompts' "tokens" and "positions". done: ids that are not asked again.

        Batches are those of the whole set: numbers differ in the last digits with what else is in a batch.
        """
        asked = self._encoded(part.questions)
        batches = [[asked[k] for k in batch] for batch in self._batches(asked)]
        left = [batch for batch in batches if any(item.question.id not in done for item in batch)]
        ids = {item.question.id for batch in left for item in batch}
        self._prepare([item for item in asked if item.question.id in ids])
        for batch in left:
            found = self._answered(batch, part.spoken)
            yield [
                {**answer, "tokens": len(item.prompt.ids), "positions": item.prompt.span}
                for item, answer in zip(batch, found, strict=True)
            ]

    def _encoded(self, questions: Sequence[Question]) -> list[Asked]:
        ordered = [ordered_images(q, self.settings.order_seed) for q in questions]
        encoder = self.processor.encoder
        for question in questions:  # one that cannot be asked is told before the work
            encoder.ends(prompt_of(question) + question.text)
        return [
            Asked(q, paths, needles, encoder.encode(q.text, self.features.grids(paths), prompt_of(q)))
            for q, (paths, needles) in zip(questions, ordered, strict=True)
        ]

    def _prepare(self, asked: Sequence[Asked]) -> None:
        label = None if self.features.computed else f"{self.label}: images"
        self.features.prepare((path for item in asked for path in item.paths), label)

    @torch.no_grad()  # inference mode's tensors would not serve a training that goes on
    def _answered(self, batch: Sequence[Asked], spoken: Callable[[str], str]) -> list[dict[str, Any]]:
        features = [f for item in batch for f in self.features.get(item.paths)]
        pad = self.processor.tokenizer.pad_token_id or 0
        inputs = collate([item.prompt for item in batch], features, pad).to(self.device)
        return [
            {
                "id": item.question.id,
                "label": item.question.answer,
                "answer": said,
                "p_yes": p_yes,
                "needles": item.needles,
            }
            for item, (said, p_yes) in zip(batch, self._say(inputs, spoken), strict=True)
        ]

    def _say(self, inputs, spoken: Callable[[str], str]) -> list[tuple[str, float | None]]:
        chunk = self.settings.chunk_tokens
        if self.by_logits:
            chances = probability_yes(last_logits(self.model, inputs, chunk), self.yes, self.no)
            if not chances.isfinite().all():
                raise LaidError(
                    f"{self.label}: an answer's logits are not finite numbers: damaged weights, or too large for evaluation.dtype"
                )
            return [("yes" if p > 0.5 else "no", round(p, 6)) for p in chances.tolist()]
        tokenizer = self.processor.tokenizer
        stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")} - {None}
        said = generate(self.model, inputs, self.settings.max_new_tokens, sorted(stops), chunk)
        return [(spoken(tokenizer.decode(ids, skip_special_tokens=True)), None) for ids in said]

    def _batches(self, asked: Sequence[Asked]) -> Iterator[list[int]]:
        """Indices in batches of at most `batch_tokens` tokens; for generation, of one length each."""
        order = sorted(range(len(asked)), key=lambda k: (len(asked[k].prompt.ids), k))
        batch: list[int] = []
        for k in order:
            length = len(asked[k].prompt.ids)
            full = (len(batch) + 1) * length > self.settings.batch_tokens
            mixed = batch and not self.by_logits and length != len(asked[batch[0]].prompt.ids)
            if batch and (full or mixed):
                yield batch
                batch = []
            batch.append(k)
        if batch:
            yield batch


def evaluate_cells(
    config: Settings,
    student: str,
    method: str,
    model: str | Path,
    runs: Sequence[str | Path],
    coco_root: str | Path,
    sets: Sequence[QuestionSet],
    out: str | Path,
    device: str = "cpu",
    features_folder: str | Path | None = None,
    cost: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Measure one student under one method on every set; write out/<size>.json each.

    model: the checkpoint of the student as it is. runs: for a trained method, one run folder per seed.
    cost: file for time and memory (None: out/cost.json); jobs that share `out` take one each. What a killed call
    has answered is not asked again (laid.evaluation.kept). Raises LaidError for a method without its runs, two runs
    of one seed, a broken image; nothing is written then. Of processes that share a model
    (laid.models.parallel) the first alone writes cells and returns them; the others follow what it asks.
    """
    for part in sets:
        require_place(Path(out) / f"{part.size}.json", file=True)
    seeds = [seed_of(run) for run in runs]
    if len(set(seeds)) < len(seeds):
        raise LaidError(
            f"{student} {method}: two of the {len(seeds)} runs have the same seed: {sorted(seeds)}"
        )
    for run in runs or [None]:
        _check_run(run, method)
        require_method(config, method, run)
    named = sorted({path for part in sets for path in part.images})
    require_images(coco_root, named, [part.file for part in sets])
    label = config.models.labels.get(student) or parameter_label(parameters(empty_model(model)))
    by_seed = dict(zip(seeds, runs, strict=True)) or {0: None}

    @lru_cache(maxsize=1)
    def evaluator(seed: int) -> Evaluator:
        loaded = load_with_method(config, method, model, by_seed[seed], device)
        return Evaluator(loaded, coco_root, config.evaluation, f"{student} {method}", features_folder)

    def ask_here(seed: int, part: QuestionSet, done: set[Any]) -> Iterator[list[dict[str, Any]]]:
        if any(question.id not in done for question in part.questions):
            yield from evaluator(seed).answers(part, done)

    def ask(seed: int, part: QuestionSet, done: set[Any]) -> Iterator[list[dict[str, Any]]]:
        parallel.agree(lambda: (seed, sets.index(part), done))
        yield from ask_here(seed, part, done)

    if not parallel.first():
        while asked := parallel.agree(lambda: None):
            seed, at, done = asked
            for _batch in ask_here(seed, sets[at], done):
                pass
        return []
    records = [
        provenance.collect(
            "evaluate",
            config,
            {
                **part.inputs(coco_root),
                "model": source_of(model),
                **{f"run_seed{seed_of(run)}": Path(run) / "model" for run in runs},
            },
            student=student,
            method=method,
            size=part.size,
        )
        for part in sets
    ]
    cells = measure(
        config, student, method, sets, out, ask, label=label, records=records, by=_hardware(device),
        seeds=list(by_seed), cost=cost,
    )  # fmt: skip
    parallel.agree(lambda: None)  # nothing more is asked
    return cells


def _hardware(device: str) -> list[Any]:
    """What the last digits of an answer depend on, beside all that stands in a cell's record."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else provenance.cpu_name()
    shared = [parallel.world()] if parallel.world() > 1 else []
    return [name, torch.get_num_threads(), *shared]


def _check_run(run: str | Path | None, method: str) -> None:
    """Raise LaidError where a run folder says that it is of another method."""
    record = Path(run or "") / "run.json"
    theirs = read_record(record).get("method") if record.is_file() else method
    if theirs != method:
        raise LaidError(
            f"{record}: a run of {theirs}, not of {method}: give the runs of {method} with --runs"
        )


def seed_of(run: str | Path) -> int:
    """The seed a run folder is named for. Raises LaidError for another name."""
    name = Path(run).name
    if not (name.startswith("seed") and name[4:].isdigit()):
        raise LaidError(f"{run}: expected a run folder named seed<K>")
    return int(name[4:])
