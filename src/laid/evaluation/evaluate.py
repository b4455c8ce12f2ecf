"""Evaluation: a model, a method, question files of several sizes, and every answer kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laid import provenance
from laid.data.coco import SPLITS, annotation_file
from laid.data.images import require_images
from laid.data.pope import is_pope, read_pope
from laid.data.questions import Question, haystack_file, ordered_images, read_questions
from laid.errors import LaidError
from laid.evaluation.cells import make_cell, write_cell
from laid.evaluation.scoring import answer_tokens, is_right, pope_answer, probability_yes, spoken_answer
from laid.io import read_json, require_place, safe_join, write_json
from laid.methods.registry import Loaded, load_with_method
from laid.models.features import ImageFeatures
from laid.models.forward import collate, generate, last_logits
from laid.models.loading import parameter_label, parameters, source_of
from laid.models.prompts import OFFICIAL_PROMPT, EncodedPrompt
from laid.progress import Progress
from laid.settings import Settings
from laid.settings.measuring import Evaluation


@dataclass
class Asked:
    """One question made ready: its prompt, its images in the order shown, the needles' places among them."""

    question: Question
    paths: list[str]
    needles: list[int]
    prompt: EncodedPrompt


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one cell and the file they stand in.

    spoken: what a generated response says, by the rule of the benchmark.
    """

    file: Path
    questions: list[Question]
    spoken: Callable[[str], str] = spoken_answer

    @property
    def size(self) -> int:
        """Images per question."""
        return self.questions[0].size

    @property
    def images(self) -> list[str]:
        """The images that the questions name, sorted."""
        return sorted({p for q in self.questions for p in (*q.needles, *q.distractors)})


def read_set(file: Path, coco_root: str | Path, size: int | None = None) -> QuestionSet:
    """Read a file of haystacks (VHs JSON) or of POPE's questions; `size`: the images that each question must have.

    Raises LaidError for a file that is missing or broken, and for questions of several sizes.
    """
    if is_pope(file):
        return QuestionSet(file, read_pope(file, coco_root), pope_answer)
    questions = read_questions(file)
    expected = questions[0].size if size is None else size
    wrong = next((q for q in questions if q.size != expected), None)
    if wrong is not None:
        raise LaidError(f"{file}: question {wrong.id} has {wrong.size} images, expected {expected}")
    return QuestionSet(file, questions)


def question_sets(
    questions: Sequence[Path], sizes: Sequence[int], coco_root: str | Path
) -> list[QuestionSet]:
    """Question files, or one folder of visual_haystack_<size>.json and the sizes wanted, as sets. Raises LaidError."""
    if len(questions) == 1 and questions[0].is_dir():
        if not sizes:
            raise LaidError(
                f"{questions[0]}: a folder of question files: give the sizes with --sizes, or name one file"
            )
        return [read_set(haystack_file(questions[0], size), coco_root, size) for size in dict.fromkeys(sizes)]
    sets = [read_set(file, coco_root) for file in questions]
    found = [part.size for part in sets]
    if len(set(found)) < len(found):
        raise LaidError(
            f"{questions[0]}: {len(found)} question files for {len(set(found))} sizes: a cell holds one"
        )
    if sizes and set(sizes) != set(found):
        raise LaidError(
            f"--sizes {' '.join(map(str, sizes))}: the question files have {', '.join(map(str, sorted(found)))} images"
        )
    return sets


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
        """Order the images, compute their features ahead as far as memory allows, encode the prompts."""
        ordered = [ordered_images(q, self.settings.order_seed) for q in questions]
        prompts = ["" if q.mode == "object" else OFFICIAL_PROMPT for q in questions]
        for question, prompt in zip(questions, prompts):
            self.processor.encoder.ends(
                prompt + question.text
            )  # one that cannot be asked is told before the work
        label = None if self.features.computed else f"{self.label}: images"
        self.features.prepare((p for paths, _ in ordered for p in paths), label)
        encode = self.processor.encoder.encode
        return [
            Asked(
                question,
                paths,
                needles,
                encode(question.text, self.features.grids(paths), prompt),
            )
            for question, prompt, (paths, needles) in zip(questions, prompts, ordered)
        ]

    @torch.inference_mode()
    def answer(
        self, asked: Sequence[Asked], spoken: Callable[[str], str] = spoken_answer
    ) -> list[dict[str, Any]]:
        """One answer per question, in the order given: {"id", "label", "answer", "p_yes", "needles"}.

        spoken: what a generated response says, by the rule of the benchmark.
        """
        answers: dict[int, dict[str, Any]] = {}
        for batch in self._batches(asked):
            prompts = [asked[k].prompt for k in batch]
            features = [f for k in batch for f in self.features.get(asked[k].paths)]
            inputs = collate(prompts, features, self.processor.tokenizer.pad_token_id or 0).to(self.device)
            for k, (said, p_yes) in zip(batch, self._say(inputs, spoken)):
                item = asked[k]
                answers[k] = {
                    "id": item.question.id,
                    "label": item.question.answer,
                    "answer": said,
                    "p_yes": p_yes,
                    "needles": item.needles,
                }
        return [answers[k] for k in range(len(asked))]

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
    cost: file for time and memory (None: out/cost.json); jobs that share `out` take one each. Raises
    LaidError for a method without its runs, two runs of one seed, a broken image; nothing is written then.
    """
    start = time.perf_counter()
    require_place(Path(out) / f"{sets[0].size}.json", file=True)
    seeds = [seed_of(run) for run in runs]
    if len(set(seeds)) < len(seeds):
        raise LaidError(
            f"{student} {method}: two of the {len(seeds)} runs have the same seed: {sorted(seeds)}"
        )
    for run in runs:
        _check_run(run, method)
    named = sorted({path for part in sets for path in part.images})
    require_images(coco_root, named, [part.file for part in sets])
    answers: list[list[dict[str, Any]]] = [[] for _ in sets]
    tokens: list[list[int]] = [[] for _ in sets]
    spans: list[list[int]] = [[] for _ in sets]
    label = None
    for run, seed in [(run, seed_of(run)) for run in runs] or [(None, 0)]:
        loaded = load_with_method(config, method, model, run, device)
        label = config.models.labels.get(student) or parameter_label(parameters(loaded.model))
        evaluator = Evaluator(loaded, coco_root, config.evaluation, f"{student} {method}", features_folder)
        total = sum(len(part.questions) for part in sets)
        with Progress(total, f"{student} {method}: seed {seed}", unit="questions") as bar:
            for at in sorted(range(len(sets)), key=lambda k: sets[k].size):
                asked = evaluator.ask(sets[at].questions)
                found = evaluator.answer(asked, sets[at].spoken)
                answers[at] += [{**answer, "seed": seed} for answer in found]
                if run in (None, *runs[:1]):
                    tokens[at] = [len(a.prompt.ids) for a in asked]
                    spans[at] = [a.prompt.span for a in asked]
                right = sum(map(is_right, found)) / len(found)
                bar.update(len(found), size=sets[at].size, accuracy=right)
    labelled = {
        f"annotations_{split}": annotation_file(coco_root, split)
        for split in SPLITS
        if annotation_file(coco_root, split).is_file()  # official questions do without
    }
    cells = []
    for at, part in enumerate(sets):
        inputs: dict[str, Any] = {
            "questions": part.file,
            "images": (coco_root, part.images),
            "model": source_of(model),
            **labelled,
            **{f"run_seed{seed_of(run)}": Path(run) / "model" for run in runs},
        }
        cell = make_cell(
            scale=config.scale,
            student=student,
            label=label,
            role="teacher" if student == config.models.teacher else "student",
            method=method,
            size=part.size,
            answers=answers[at],
            tokens_mean=sum(tokens[at]) / len(tokens[at]),
            positions_mean=sum(spans[at]) / len(spans[at]),
            provenance=provenance.collect(
                "evaluate", config, inputs, student=student, method=method, size=part.size
            ),
        )
        write_cell(Path(out) / f"{part.size}.json", cell)
        cells.append(cell)
    write_json(Path(out) / "cost.json" if cost is None else cost, provenance.cost(start))
    return cells


def _check_run(run: str | Path, method: str) -> None:
    """Raise LaidError where a run folder says that it is of another method."""
    record = Path(run) / "run.json"
    theirs = read_json(record).get("method") if record.is_file() else method
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
