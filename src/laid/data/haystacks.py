"""Building Visual Haystacks questions from image labels: one sampler for the files and for pretraining on the fly.

What leaves no shortcut: anchor, distractors and target are drawn first, without regard to the answer; only then is the
answer chosen and a needle taken that has, or has not, the target beside the anchor. So neither the target's frequency,
nor the anchor's usual companions, nor the distractors tell anything about the answer (see laid.data.shortcuts).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from laid.data.coco import CocoSplit, load_both, load_coco
from laid.data.questions import (
    OFFICIAL_ANCHORS,
    OFFICIAL_TARGETS,
    Question,
    check_haystacks,
    haystack_file,
    ordered_images,
    question_text,
    read_questions,
    write_questions,
)
from laid.data.shortcuts import markdown, shortcuts
from laid.errors import LaidError
from laid.io import atomic_path, write_json, write_text
from laid.settings import Settings
from laid.settings.data import Haystacks

__all__ = [
    "Haystack", "HaystackSampler", "Question", "build_haystacks", "check_haystacks", "haystack_file",
    "ordered_images", "question_text", "read_questions", "split_paths", "synthesise", "write_questions",
]  # fmt: skip

# Names that no article fits; the official questions leave them out as well.
PLURALS = frozenset({"skis", "scissors"})


class Haystack(NamedTuple):
    """One sampled haystack; images are indices into `HaystackSampler.paths`, in the order shown."""

    images: np.ndarray
    needle: int
    anchor: str
    targets: list[tuple[str, bool]]
    objects: tuple[str, ...]


@dataclass(frozen=True)
class _Context:
    anchor: int
    target: int
    distractors: np.ndarray


class HaystackSampler:
    """Draws haystacks from labels.

    labels: path -> names of the objects in the image. categories: names that may be anchors and targets.
    hard_negatives: with this probability the target is taken from objects that some distractor holds (for "yes" and
    "no" alike, so that its presence elsewhere tells nothing), otherwise from all that the anchor can be asked about.
    needles: the most images that hold the anchor in one haystack (1; for multi-needle questions 2 or 3).
    anchors, targets: which of the categories may serve as what (None: all).
    A pair (anchor, target) is used only where the labels offer at least `min_needles` images (and enough for `needles`)
    that answer yes, and as many that answer no.
    """

    def __init__(
        self,
        labels: Mapping[str, frozenset[str]],
        categories: Sequence[str],
        hard_negatives: float = 0.8,
        seed: int | Sequence[int] = 0,
        needles: int = 1,
        *,
        anchors: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        min_needles: int = 1,
    ):
        self.paths = list(labels)
        self.categories = [name for name in categories if name not in PLURALS]
        self.hard_negatives = hard_negatives
        self.needles = needles
        self.rng = np.random.default_rng(seed)
        number = {name: k for k, name in enumerate(self.categories)}
        self.has = np.zeros((len(self.paths), len(number)), dtype=bool)
        for row, path in enumerate(self.paths):
            self.has[row, [number[name] for name in labels[path] if name in number]] = True
        both = self.has.astype(np.float32).T @ self.has.astype(np.float32)  # images that hold both categories
        alone = both.diagonal()[:, None] - both
        self.least = max(needles, min_needles)
        self.askable = (both >= self.least) & (alone >= self.least)
        np.fill_diagonal(self.askable, False)
        for names, axis in ((anchors, 0), (targets, 1)):
            if names is not None:
                barred = [k for name, k in number.items() if name not in names]
                self.askable[(barred,) if axis == 0 else (slice(None), barred)] = False
        self.without = [np.flatnonzero(~self.has[:, k]) for k in range(len(number))]
        self._eligible: dict[int, np.ndarray] = {}
        self._pools: dict[tuple[int, int, bool], np.ndarray] = {}

    def anchors(self, distractors: int) -> np.ndarray:
        """Categories that can be anchors beside this many distractors. Raises LaidError when there is none."""
        if distractors not in self._eligible:
            free = np.array([len(pool) for pool in self.without], dtype=int)
            askable = self.askable.any(1) if len(free) else np.zeros(0, dtype=bool)
            found = np.flatnonzero(askable & (free >= distractors))
            if not len(found):
                most = int(free[askable].max()) if askable.any() else 0
                if not askable.any():
                    raise LaidError(
                        f"no category of {len(self.categories)} can be an anchor: {len(self.paths)} images offer no pair of"
                        f" objects with at least {self.least} images that hold both and {self.least} that hold one only;"
                        " give more images, or ask less (haystacks.min_needles, haystacks.vocabulary)"
                    )
                raise LaidError(
                    f"a haystack with {distractors} distractors is too large: {len(self.paths)} images offer at most {most}"
                    " without the anchor; give more images or ask for smaller sizes"
                )
            self._eligible[distractors] = found
        return self._eligible[distractors]

    def pool(self, anchor: int, target: int, holds: bool) -> np.ndarray:
        """Indices of images that hold the anchor and hold (or do not hold) the target."""
        key = (anchor, target, holds)
        if key not in self._pools:
            self._pools[key] = np.flatnonzero(self.has[:, anchor] & (self.has[:, target] == holds))
        return self._pools[key]

    def context(
        self, distractors: int, anchor: int | None = None, usage: np.ndarray | None = None
    ) -> _Context:
        """Anchor, distractors and target, drawn without regard to any answer.

        usage: how often each category has been a target so far; the least used of the candidates is then taken.
        """
        rng = self.rng
        if anchor is None:
            eligible = self.anchors(distractors)
            anchor = int(eligible[rng.integers(len(eligible))])
        free = self.without[anchor]
        others = free[rng.choice(len(free), distractors, replace=False, shuffle=False)]
        allowed = self.askable[anchor]
        candidates = np.flatnonzero(allowed)
        if distractors and rng.random() < self.hard_negatives:
            hard = np.flatnonzero(allowed & self.has[others].any(0))
            candidates = hard if len(hard) else candidates
        if usage is not None:
            candidates = candidates[usage[candidates] == usage[candidates].min()]
        return _Context(anchor, int(candidates[rng.integers(len(candidates))]), others)

    def draw_needles(self, context: _Context, holds: Sequence[bool]) -> list[int]:
        """Indices of distinct images with the anchor, one per entry of `holds`: with or without the target."""
        picked = []
        for wanted in (True, False):
            count = sum(bool(h) == wanted for h in holds)
            if count:
                pool = self.pool(context.anchor, context.target, wanted)
                picked += [
                    int(k) for k in pool[self.rng.choice(len(pool), count, replace=False, shuffle=False)]
                ]
        return picked

    def sample(self, size: int, targets_per_haystack: int = 1) -> Haystack:
        """One haystack of `size` images with one needle, and up to `targets_per_haystack` targets, for pretraining.

        The first target is drawn as in the question files, with a fair coin for its answer. Further targets ask about
        the same needle: a fair coin each between the needle's other objects and objects it lacks (the latter taken from
        the distractors with probability `hard_negatives`); where one side is used up the other is taken.
        Raises LaidError when the images cannot fill the size.
        """
        rng = self.rng
        context = self.context(size - 1)
        answer = bool(rng.random() < 0.5)
        needle = self.draw_needles(context, [answer])[0]
        targets = [(context.target, answer)]
        if targets_per_haystack > 1:
            held = self.has[needle]
            around = self.has[context.distractors].any(0)
            free = np.ones(len(self.categories), dtype=bool)
            free[[context.anchor, context.target]] = False
            while len(targets) < targets_per_haystack and free.any():
                answer = bool(rng.random() < 0.5)
                side = free & (held == answer)
                if not side.any():
                    answer = not answer
                    side = free & (held == answer)
                if not answer and rng.random() < self.hard_negatives and (side & around).any():
                    side &= around
                choice = np.flatnonzero(side)
                target = int(choice[rng.integers(len(choice))])
                free[target] = False
                targets.append((target, answer))
        position = int(rng.integers(size))
        images = np.empty(size, dtype=np.int64)
        images[:position] = context.distractors[:position]
        images[position] = needle
        images[position + 1 :] = context.distractors[position:]
        names = self.categories
        objects = tuple(names[k] for k in np.flatnonzero(self.has[needle]))
        return Haystack(images, position, names[context.anchor], [(names[t], a) for t, a in targets], objects)


def synthesise(
    labels: Mapping[str, frozenset[str]],
    categories: Sequence[str],
    sizes: Sequence[int],
    *,
    seed: Sequence[int],
    hard_negatives: float = 0.8,
    mode: str = "single",
    vocabulary: str = "all",
    min_needles: int = 1,
    name: str = "",
) -> list[Question]:
    """One file of questions, one per entry of `sizes`, half of them yes.

    Anchors take turns (each as often as the others where the size allows it), targets are the least used that fit, and
    yes and no are shared out within each target, so that no target and no anchor gives the answer away. `mode`: "single",
    or "multi" for two or three needles, asked with "all" or "any" in turn. `vocabulary`: "all" categories, or the anchors and targets of the "official" files.
    `min_needles`: as for HaystackSampler. `seed` and `name` enter the ids.
    Raises LaidError, with both numbers, when the images cannot fill a size.
    """
    if not labels:
        raise LaidError(f"{name or 'haystacks'}: no images to build questions from")
    least = 1 if mode == "single" else 2
    if min(sizes) < least:
        raise LaidError(
            f"{name}: a haystack of {min(sizes)} images cannot hold {least} needles: raise the smallest size"
        )
    official = {"anchors": OFFICIAL_ANCHORS, "targets": OFFICIAL_TARGETS} if vocabulary == "official" else {}
    sampler = HaystackSampler(
        labels,
        categories,
        hard_negatives,
        seed,
        needles=1 if mode == "single" else 3,
        min_needles=min_needles,
        **official,
    )
    rng = sampler.rng
    needles = [1 if mode == "single" else min(size, 2 + at % 2) for at, size in enumerate(sizes)]
    usage = np.zeros(len(sampler.categories), dtype=int)
    turns = np.zeros(len(sampler.categories), dtype=int)
    contexts = []
    for size, count in zip(sizes, needles):
        try:
            eligible = sampler.anchors(size - count)
        except LaidError as error:
            raise LaidError(f"{name}: size {size}: {error}") from None
        fewest = eligible[turns[eligible] == turns[eligible].min()]
        anchor = int(fewest[rng.integers(len(fewest))])
        turns[anchor] += 1
        context = sampler.context(size - count, anchor, usage)
        usage[context.target] += 1
        contexts.append(context)
    answers = _balanced_answers([(c.target, c.anchor) for c in contexts], rng)
    questions, used = [], set()
    for at, (context, answer, count) in enumerate(zip(contexts, answers, needles)):
        asked = "single" if mode == "single" else ("all", "any")[at // 2 % 2]
        for _ in range(
            20
        ):  # the same needle asked the same thing twice is no new question; seldom, and not at any price
            picked = sampler.draw_needles(context, _holds(asked, bool(answer), count, rng))
            if (key := (context.anchor, context.target, *sorted(picked))) not in used:
                break
        used.add(key)
        paths = [tuple(sampler.paths[k] for k in group) for group in (picked, context.distractors)]
        anchor, target = sampler.categories[context.anchor], sampler.categories[context.target]
        ident = _short_id(name, list(seed), at, anchor, target, paths)
        text = question_text(asked, anchor, target)
        questions.append(Question(ident, text, "yes" if answer else "no", anchor, target, *paths, mode=asked))
    return questions


def _holds(asked: str, answer: bool, count: int, rng: np.random.Generator) -> list[bool]:
    """Which of `count` needles hold the target, for a question of this mode with this answer."""
    if asked == "all":
        some = count if answer else int(rng.integers(0, count))
    elif asked == "any":
        some = int(rng.integers(1, count + 1)) if answer else 0
    else:
        some = int(answer)
    return [k < some for k in range(count)]


def _balanced_answers(groups: Sequence[tuple[int, int]], rng: np.random.Generator) -> np.ndarray:
    """Answers (bool, one per question), half yes in all and, as nearly as can be, half within each target.

    Questions are put in the order (target, anchor), each target's run in a random order of anchors; then every second is
    yes. So targets differ by at most one, and anchors are split at random but for equal pairs, which alternate.
    """
    shuffle = {key: rng.random() for key in sorted(set(groups))}
    order = sorted(range(len(groups)), key=lambda at: (groups[at][0], shuffle[groups[at]], at))
    answers = np.zeros(len(groups), dtype=bool)
    first = rng.random() < 0.5
    for place, at in enumerate(order):
        answers[at] = (place % 2 == 0) == first
    return answers


_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def _short_id(*parts: Any) -> str:
    """22 characters without look-alikes, as the official ids are; the same parts give the same id."""
    number = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "big")
    text = ""
    for _ in range(22):
        number, digit = divmod(number, len(_ALPHABET))
        text += _ALPHABET[digit]
    return text


def split_paths(train: CocoSplit, share: float, seed: int) -> tuple[list[str], list[str]]:
    """(training paths, validation paths): a fixed random share of the train2017 images is kept for validation."""
    paths = list(train.images)
    chosen = np.random.default_rng([seed, 9]).permutation(len(paths))[: round(share * len(paths))]
    kept = {paths[k] for k in chosen}
    return [p for p in paths if p not in kept], [p for p in paths if p in kept]


def training_paths(settings: Haystacks, train: CocoSplit) -> list[str]:
    """The train2017 images that models are trained on: those not kept for validation."""
    return split_paths(train, settings.validation.share, settings.seed)[0]


def build_haystacks(config: Settings, coco_root: str | Path, out: str | Path) -> dict[str, dict[str, Any]]:
    """Write train.json, validation/, test/ and shortcuts.{json,md} below `out`, as `config.haystacks` asks.

    Training and validation come from train2017 (disjoint images), test from val2017. Either everything is written or
    nothing; a folder that holds anything else is not replaced. Returns what shortcuts score, by file name relative to
    `out`. Raises LaidError as `synthesise` does.
    """
    settings = config.haystacks
    out = Path(out)
    foreign = [
        p for p in out.rglob("*") if p.is_file() and not _OURS.fullmatch(p.relative_to(out).as_posix())
    ]
    if foreign:
        raise LaidError(f"{out}: holds {foreign[0]}, which is no haystack file: choose another folder")
    train, test = load_both(coco_root)
    files = _synthesise_all(settings, train, test)
    labels = {**train.labels, **test.labels}
    scores = {}
    for name, questions in files.items():
        if problems := check_haystacks(questions, labels):
            raise AssertionError(f"{name}: {problems[0]}")
        own = test.labels if name.startswith("test") else train.labels
        scores[name] = shortcuts(questions, own, None if name == "train.json" else files["train.json"])
    with atomic_path(out) as fresh:
        for name, questions in files.items():
            write_questions(fresh / name, questions)
        write_json(fresh / "shortcuts.json", {"format": "laid-shortcuts/1", "files": scores})
        write_text(fresh / "shortcuts.md", markdown(scores))
    return scores


def build_beyond(config: Settings, coco_root: str | Path, out: str | Path) -> list[Question]:
    """Write visual_haystack_<size>.json below `out` for `config.beyond.sizes`, from the test images; returns all.

    Raises LaidError as `synthesise` does.
    """
    settings, test = config.haystacks, load_coco(coco_root, "val2017")
    files = {}
    for size in config.beyond.sizes:
        name, sizes = f"visual_haystack_{size}.json", [size] * config.beyond.questions
        seed = [settings.seed, 4, size]
        files[name] = synthesise(
            test.labels, test.categories, sizes, seed=seed, name=f"beyond/{name}", **_common(settings)
        )
        if problems := check_haystacks(files[name], test.labels):
            raise AssertionError(f"{name}: {problems[0]}")
    for name, questions in files.items():
        write_questions(Path(out) / name, questions)
    return [question for questions in files.values() for question in questions]


_OURS = re.compile(
    r"(train|laid)\.json|shortcuts\.(json|md)|(validation|test)/visual_haystack_\d+\.json|images\.checked"
)


def _synthesise_all(settings: Haystacks, train: CocoSplit, test: CocoSplit) -> dict[str, list[Question]]:
    seed, common = settings.seed, _common(settings)
    choose = split_paths(train, settings.validation.share, seed)[1]
    files = {"train.json": _from_training_images(settings, train)}
    held_out = {path: train.labels[path] for path in choose}
    for size in settings.validation.sizes:
        name = f"validation/visual_haystack_{size}.json"
        sizes = [size] * settings.validation.questions
        files[name] = synthesise(held_out, test.categories, sizes, seed=[seed, 1, size], name=name, **common)
    for size in settings.test.sizes:
        files[f"test/visual_haystack_{size}.json"] = questions_of_size(settings, test, size)
    return files


def questions_of_size(settings: Haystacks, images: CocoSplit, size: int) -> list[Question]:
    """The test questions of one size over `images`, as `settings` (config.haystacks) ask.

    Raises LaidError as `synthesise` does.
    """
    return synthesise(
        images.labels,
        images.categories,
        [size] * settings.test.questions,
        seed=[settings.seed, 2, size],
        name=f"test/visual_haystack_{size}.json",
        **_common(settings),
    )


def _common(settings: Haystacks) -> dict[str, Any]:
    return {
        "hard_negatives": settings.hard_negatives,
        "vocabulary": settings.vocabulary,
        "min_needles": settings.min_needles,
        "mode": settings.needles,
    }


def _from_training_images(settings: Haystacks, train: CocoSplit) -> list[Question]:
    """The training questions, every size from min_size to max_size as often, in a random order."""
    seed, asked = settings.seed, settings.train
    sizes = np.resize(np.arange(asked.min_size, asked.max_size + 1), asked.questions)
    sizes = np.random.default_rng([seed, 8]).permutation(sizes).tolist()
    labels = {path: train.labels[path] for path in training_paths(settings, train)}
    return synthesise(labels, train.categories, sizes, seed=[seed, 0], name="train.json", **_common(settings))
