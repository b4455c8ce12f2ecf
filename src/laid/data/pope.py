"""POPE's object questions about single images: built from COCO labels, written and read in POPE's own format.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023); RUCAIBox/POPE, main.py and
utils.py. Of each image a few objects that it holds are asked about, and as many that it does not hold: drawn at random,
the most frequent ones ("popular"), or those most often seen beside the object asked about before ("adversarial").
Frequencies are those of the images asked about, as there. Positive questions are the same under all three strategies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laid.data.coco import load_coco
from laid.data.questions import TEMPLATES, Question, name_problem, with_article
from laid.errors import LaidError
from laid.io import atomic_path, path_problem, read_text
from laid.settings import Settings

STRATEGIES = ("random", "popular", "adversarial")
# "pope": POPE's words. "haystack": the question of Visual Haystacks on one image, for models that know no other words;
# the anchor is another object of the image.
WORDINGS = {"pope": "Is there {target} in the image?", "haystack": TEMPLATES["single"]}
_ASKED = {
    "object": re.compile(
        r"Is there an? (?P<target>.+) in the i(?:mage|mange)\?"
    ),  # an older release has both
    "single": re.compile(r"For the image with an? (?P<anchor>.+), is there an? (?P<target>.+)\?"),
}
_COCO_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")


@dataclass(frozen=True)
class Polled:
    """One image with the objects asked about; `absent` has, by strategy, one object for each one that is present."""

    path: str
    present: tuple[str, ...]
    absent: Mapping[str, tuple[str, ...]]


def pope_file(folder: str | Path, strategy: str) -> Path:
    """The question file of a strategy, named as POPE names it."""
    return Path(folder) / f"coco_pope_{strategy}.json"


def poll(
    labels: Mapping[str, frozenset[str]], categories: Sequence[str], *, images: int, objects: int, seed: int
) -> list[Polled]:
    """Draw `images` images that hold at least `objects` objects, and the objects to ask about.

    labels: path -> names of the objects in the image. Where counts are equal, the earlier category is taken first.
    Where no popular or adversarial object is left, one is drawn at random, as in POPE. Raises LaidError, with both
    numbers, where images or absent objects do not suffice.
    """
    eligible = [path for path in sorted(labels) if len(labels[path]) >= objects]
    if len(eligible) < images:
        raise LaidError(
            f"pope.images: {images} images asked for, {len(eligible)} of {len(labels)} hold at least {objects} objects"
            " (pope.objects): ask for fewer, or give more images"
        )
    rng = np.random.default_rng([seed, 0])
    paths = [eligible[k] for k in sorted(rng.choice(len(eligible), images, replace=False).tolist())]
    number = {name: k for k, name in enumerate(categories)}
    has = np.zeros((images, len(categories)), dtype=np.int64)
    for row, path in enumerate(paths):
        has[row, [number[name] for name in labels[path]]] = 1
    seen = has.sum(0)
    popular = _by_count(seen)
    beside = has.T @ has
    np.fill_diagonal(beside, 0)
    companions = [_by_count(row) for row in beside]
    occurring = np.flatnonzero(seen).tolist()
    chance = {strategy: np.random.default_rng([seed, 1 + k]) for k, strategy in enumerate(STRATEGIES)}
    found = []
    for row, path in enumerate(paths):
        held = np.flatnonzero(has[row])
        present = rng.permutation(held)[:objects].tolist()
        absent = {}
        for strategy in STRATEGIES:
            taken = set(held.tolist())
            picked = []
            for one in present:
                order = {"random": [], "popular": popular, "adversarial": companions[one]}[strategy]
                choice = next((k for k in order if k not in taken), None)
                if choice is None:
                    free = [k for k in occurring if k not in taken]
                    if not free:
                        raise LaidError(
                            f"{path}: {objects} absent objects asked for (pope.objects), the images asked about hold"
                            f" {len(occurring)} kinds of objects and this one has {len(held)} of them: ask for fewer"
                        )
                    choice = free[chance[strategy].integers(len(free))]
                taken.add(choice)
                picked.append(categories[choice])
            absent[strategy] = tuple(picked)
        found.append(Polled(path, tuple(categories[k] for k in present), absent))
    return found


def _by_count(counts: np.ndarray) -> list[int]:
    """Indices of the counts above zero, the largest first, equal ones in order."""
    order = np.argsort(-counts, kind="stable")
    return order[counts[order] > 0].tolist()


def questions_of(polled: Sequence[Polled], strategy: str, wording: str) -> list[Question]:
    """A present and an absent object in turn, as POPE lists them.

    With "haystack", an absent object is asked about beside the present one that it was chosen for, a present one beside
    the next: so every anchor stands once in a question with yes and once in one with no.
    """
    found = []
    for item in polled:
        for at, (present, absent) in enumerate(zip(item.present, item.absent[strategy], strict=True)):
            following = item.present[(at + 1) % len(item.present)]
            for target, answer, anchor in ((present, "yes", following), (absent, "no", present)):
                found.append(_question(item.path, target, answer, anchor, wording))
    return found


def _question(path: str, target: str, answer: str, anchor: str, wording: str) -> Question:
    text = WORDINGS[wording].format(anchor=with_article(anchor), target=with_article(target))
    mode = "object" if wording == "pope" else "single"
    return Question(
        id=f"{Path(path).stem}:{target}",
        text=text,
        answer=answer,
        anchor="" if wording == "pope" else anchor,
        target=target,
        needles=(path,),
        distractors=(),
        mode=mode,
    )


def build_pope(config: Settings, coco_root: str | Path, out: str | Path) -> dict[str, list[Question]]:
    """Build and write the three question files from the val2017 labels; returns the questions by strategy.

    Raises LaidError where the images do not suffice.
    """
    settings = config.pope
    coco = load_coco(coco_root, "val2017")
    polled = poll(
        coco.labels,
        coco.categories,
        **settings.model_dump(include={"images", "objects", "seed"}),
    )
    found = {strategy: questions_of(polled, strategy, settings.wording) for strategy in STRATEGIES}
    with atomic_path(out) as folder:
        folder.mkdir()
        for strategy, questions in found.items():
            write_pope(pope_file(folder, strategy), questions)
    return found


def write_pope(path: Path, questions: Sequence[Question]) -> None:
    """Write POPE's format: a JSON object a line."""
    lines = (
        json.dumps({"question_id": at, "image": q.needles[0], "text": q.text, "label": q.answer}) + "\n"
        for at, q in enumerate(questions, 1)
    )
    path.write_text("".join(lines), encoding="utf-8")


def is_pope(path: str | Path) -> bool:
    """Whether a file's first line is a question in POPE's format; False where there is no such file."""
    if not Path(path).is_file():
        return False
    try:
        with open(path, encoding="utf-8-sig") as handle:
            first = json.loads(handle.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "question_id" in first


def read_pope(path: str | Path, coco_root: str | Path) -> list[Question]:
    """Read and check a file in POPE's format: ours, or one of POPE's own for COCO.

    POPE's own files name images of COCO 2014; the same image lies in COCO 2017 under its number, in the split that the
    val2017 annotations below `coco_root` tell. Ids are "<image>:<object>". Raises LaidError, naming file and line.
    """
    text = read_text(path)
    lines = text.removesuffix("\n").split("\n") if text else []
    validation: Mapping[str, Any] | None = None
    questions: dict[str, Question] = {}
    for at, line in enumerate(lines, 1):
        where = f"{path}, line {at}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise LaidError(f"{where}: not valid JSON (cut short or edited? make it again)") from None
        if not isinstance(entry, dict) or any(
            not isinstance(entry.get(key), str) for key in ("image", "text", "label")
        ):
            raise LaidError(f"{where}: expected an object with the texts image, text and label")
        image, text, label = entry["image"], entry["text"], entry["label"]
        if label not in ("yes", "no"):
            raise LaidError(f"{where}: the label is {label[:40]!r}, not yes or no")
        matches = ((mode, pattern.fullmatch(text)) for mode, pattern in _ASKED.items())
        mode, match = next(((m, found) for m, found in matches if found), (None, None))
        if match is None:
            raise LaidError(
                f"{where}: {text[:80]!r} asks in none of the known forms: {', '.join(WORDINGS.values())}"
            )
        older = _COCO_2014.fullmatch(image)
        if older:
            if validation is None:
                validation = load_coco(coco_root, "val2017").images
            name = older[1]
            image = f"val2017/{name}" if f"val2017/{name}" in validation else f"train2017/{name}"
        elif path_problem(image) or not re.fullmatch(r"(train|val)2017/[^/]+", image):
            raise LaidError(f"{where}: {image!r:.80} is not an image of COCO, like val2017/000000000139.jpg")
        words = match.groupdict()
        if problem := next(filter(None, map(name_problem, words.values())), None):
            raise LaidError(f"{where}: asks about a name that {problem}")
        question = _question(
            image, words["target"], label, words.get("anchor", ""), "pope" if mode == "object" else "haystack"
        )
        if question.id in questions:
            raise LaidError(f"{where}: asks about {words['target']!r} in {image} a second time")
        questions[question.id] = replace(question, text=text)  # the file's own article
    if not questions:
        raise LaidError(f"{path}: holds no questions")
    return list(questions.values())
