"""Why windows shrink: distance in positions and dilution by more keys, taken apart at evaluation.

    ordinary    n images at their own positions: both causes at once
    stretched   few images, with random gaps opened between them so that they span the positions of n images: distance alone
    packed      n images at the positions of few: the i-th of n stands where the floor(few i / n)-th would, so that several
                share their positions and only their order in the sequence tells them apart: dilution alone

All of a question's images stay whole. Packing is clean where an image is one visual token (the small scale); where images
have several, tokens of images that share positions are also neighbours of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laid import provenance
from laid.analysis.attention import same_vision
from laid.data.questions import haystack_file, read_questions
from laid.distill.gaps import open_gaps
from laid.errors import LaidError
from laid.evaluation.evaluate import Asked, Evaluator
from laid.evaluation.scoring import is_right
from laid.methods.registry import load_with_method
from laid.models.loading import source_of
from laid.models.prompts import EncodedPrompt
from laid.progress import Progress
from laid.settings import Settings

FORMAT = "laid-why/1"
CONDITIONS = ("ordinary", "stretched", "packed")


def text_start(prompt: EncodedPrompt) -> int:
    """Token index of the text after the last image block."""
    return int(np.flatnonzero(prompt.image_mask)[-1]) + 2


def stretched(prompt: EncodedPrompt, span: int, rng: np.random.Generator) -> EncodedPrompt:
    """The prompt with gaps before its images and its text, so that it covers `span` positions (unchanged if it does)."""
    positions = torch.from_numpy(prompt.positions)
    starts = prompt.block_starts.tolist()
    moved = open_gaps(positions, starts, text_start(prompt), span, rng, exact=True)
    return replace(prompt, positions=moved.numpy())


def packed(prompt: EncodedPrompt, slots: int) -> EncodedPrompt:
    """The prompt with its n images at the positions of `slots` images, floor(slots i / n) for image i.

    A slot is as wide as the widest image in it; tokens, and positions within an image, stay as they are.
    """
    edges = [*prompt.block_starts.tolist(), text_start(prompt)]
    n = len(edges) - 1
    if n <= slots:
        return prompt
    at = prompt.positions[0, edges]
    extent, slot = np.diff(at), slots * np.arange(n) // n
    wide = np.zeros(slots, dtype=np.int64)
    np.maximum.at(wide, slot, extent)
    begin = at[0] + np.concatenate(([0], np.cumsum(wide)))
    shift = np.zeros(prompt.positions.shape[1], dtype=np.int64)
    for image in range(n):
        shift[edges[image] : edges[image + 1]] = begin[slot[image]] - at[image]
    shift[edges[-1] :] = begin[-1] - at[-1]
    return replace(prompt, positions=prompt.positions + shift)


def measure(
    config: Settings,
    student: str,
    model: str | Path,
    runs: Mapping[str, str | Path | None],
    coco_root: str | Path,
    questions: str | Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """One student under several methods in all conditions; returns the record that `laid why` writes.

    runs: method -> run folder, None for a method without training. Sizes are the test sizes from beyond.few on.
    Raises LaidError when there is no test file of beyond.few images, or none that is larger.
    """
    settings = config.beyond
    few = settings.few
    sizes = sorted(size for size in config.haystacks.test.sizes if size >= few)
    if few not in sizes or len(sizes) < 2:
        raise LaidError(
            f"beyond.few is {few}: it must be a test size with a larger one (haystacks.test.sizes"
            f" {config.haystacks.test.sizes})"
        )
    files = {size: haystack_file(questions, size) for size in sizes}
    entries = {size: read_questions(file)[: settings.questions] for size, file in files.items()}
    methods: dict[str, Any] = {}
    inputs: dict[str, Any] = {
        "model": source_of(model),
        **{f"questions_{size}": file for size, file in files.items()},
    }
    features = None
    with Progress(len(runs) * len(sizes) * len(CONDITIONS), f"why {student}", unit="conditions") as bar:
        for method, run in runs.items():
            loaded = load_with_method(config, method, model, run, device)
            evaluator = Evaluator(loaded, coco_root, config.evaluation, f"{student} {method}")
            if features is not None and same_vision(features.model, loaded.model):
                evaluator.features = features
            features = features or evaluator.features
            asked = {size: evaluator.ask(entries[size]) for size in sizes}
            spans = {size: round(np.mean([a.prompt.span for a in asked[size]])) for size in sizes}
            found: dict[str, dict[str, Any]] = {condition: {} for condition in CONDITIONS}
            for size in sizes:
                # Gaps follow from the question and the span alone: the same for every model.
                wide = [
                    replace(
                        a, prompt=stretched(a.prompt, spans[size], np.random.default_rng([0, size, number]))
                    )
                    for number, a in enumerate(asked[few])
                ]
                tight = [replace(a, prompt=packed(a.prompt, few)) for a in asked[size]]
                for condition, prompts in zip(CONDITIONS, (asked[size], wide, tight), strict=True):
                    found[condition][str(size)] = _answers(evaluator, prompts)
                    bar.update(1)
            methods[method] = found
            if run is not None:
                inputs[f"run_{method}"] = Path(run) / "model"
    return {
        "format": FORMAT,
        "student": student,
        "role": "teacher" if student == config.models.teacher else "student",
        "few": few,
        "sizes": sizes,
        "methods": methods,
        "provenance": provenance.collect("why", config, inputs, student=student),
    }


def _answers(evaluator: Evaluator, prompts: Sequence[Asked]) -> dict[str, Any]:
    answers = evaluator.answer(prompts)
    return {
        "right": [int(is_right(a)) for a in answers],
        "images": len(prompts[0].paths),
        "span": round(float(np.mean([p.prompt.span for p in prompts])), 3),
    }
