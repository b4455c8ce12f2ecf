"""Visual Haystacks questions: the official JSON, read, checked, written, and put in a stated image order.

Form of the files: visual-haystacks/vhs_benchmark (Wu et al., ICLR 2025), VHs_qa/. The official files differ among
themselves ("human" or "user" asks); what is accepted here is what occurs in them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from laid.errors import LaidError
from laid.io import UNPRINTABLE, path_problem, read_json, unprintable, write_json

# The official runner's words (visual-haystacks/vhs_benchmark, solvers/base_solver.py).
OFFICIAL_PROMPT = "You are given a set of images. Please answer the following question in Yes or No: "

# mode -> question, with "a {anchor}" / "a {target}" filled in with their articles. As in the official files.
TEMPLATES = {
    "single": "For the image with {anchor}, is there {target}?",
    "all": "For all images with {anchor}, do all of them contain {target}?",
    "any": "For all images with {anchor}, do any of them contain {target}?",
}


# What the official VHs_large files ask about: 71 anchors, 32 targets of COCO's 80 categories.
# fmt: off
OFFICIAL_ANCHORS = (
    "airplane", "apple", "backpack", "banana", "baseball bat", "baseball glove", "bed", "bench", "bicycle",
    "bird", "boat", "book", "bottle", "bowl", "broccoli", "bus", "cake", "car", "carrot", "cat",
    "cell phone", "chair", "clock", "couch", "cow", "cup", "dining table", "dog", "donut", "elephant",
    "fire hydrant", "fork", "frisbee", "giraffe", "handbag", "horse", "hot dog", "keyboard", "knife",
    "laptop", "microwave", "motorcycle", "mouse", "orange", "oven", "parking meter", "person",
    "potted plant", "refrigerator", "remote", "sheep", "sink", "skateboard", "snowboard", "spoon",
    "stop sign", "suitcase", "surfboard", "teddy bear", "tie", "toaster", "toilet", "toothbrush",
    "traffic light", "train", "truck", "tv", "umbrella", "vase", "wine glass", "zebra",
)
OFFICIAL_TARGETS = (
    "backpack", "bed", "bench", "book", "bottle", "bowl", "bus", "car", "cat", "cell phone", "chair",
    "clock", "couch", "cup", "dining table", "dog", "fork", "handbag", "knife", "laptop", "potted plant",
    "sink", "skateboard", "spoon", "sports ball", "surfboard", "tennis racket", "tie", "traffic light",
    "truck", "tv", "umbrella",
)
# fmt: on


@dataclass(frozen=True)
class Question:
    """One Visual Haystacks question. Paths are relative to the COCO root; `answer` is "yes" or "no".

    `anchor` and `target` are bare category names ("traffic light"); `mode` is "single", "all" or "any".
    """

    id: str
    text: str
    answer: str
    anchor: str
    target: str
    needles: tuple[str, ...]
    distractors: tuple[str, ...]
    mode: str = "single"

    @property
    def size(self) -> int:
        """Images in the haystack, needles included."""
        return len(self.needles) + len(self.distractors)

    @property
    def label(self) -> bool:
        """Whether the answer is yes."""
        return self.answer == "yes"

    def to_json(self) -> dict[str, Any]:
        """The official JSON entry."""
        return {
            "conversations": [{"from": "human", "value": self.text}, {"from": "gpt", "value": self.answer}],
            "id": self.id,
            "pos_image": list(self.needles),
            "neg_image": list(self.distractors),
            "needle": with_article(self.anchor),
            "target": with_article(self.target),
        }


def with_article(name: str) -> str:
    """ "a mouse", "an orange": the official files' rule, by the first letter."""
    return ("an " if name[:1].lower() in "aeiou" else "a ") + name


def question_text(mode: str, anchor: str, target: str) -> str:
    """The official question for bare category names."""
    return TEMPLATES[mode].format(anchor=with_article(anchor), target=with_article(target))


def ordered_images(question: Question, seed: int = 0) -> tuple[list[str], list[int]]:
    """(paths in the order shown, 0-based positions of the needles), a fixed shuffle of the haystack.

    The official runner shuffles without a seed; here the order follows from the question's id, its size and `seed`.
    Positions are uniform over seeds and over ids.
    """
    digest = hashlib.sha256(f"{question.id}\0{question.size}\0{seed}".encode()).digest()
    order = np.random.default_rng(list(np.frombuffer(digest, dtype="<u4"))).permutation(question.size)
    images = question.needles + question.distractors
    needles = len(question.needles)
    return [images[k] for k in order], [at for at, k in enumerate(order) if k < needles]


def haystack_file(folder: str | Path, size: int) -> Path:
    """The question file of a size: visual_haystack_<size>.json, or the official name "oracle" for size 1."""
    named = Path(folder) / f"visual_haystack_{size}.json"
    oracle = Path(folder) / "visual_haystack_oracle.json"
    return oracle if size == 1 and not named.exists() and oracle.exists() else named


def write_questions(path: str | Path, questions: Sequence[Question]) -> None:
    """Write the official JSON, atomically. Raises LaidError for a question that could not be read back as it is."""
    entries = [question.to_json() for question in questions]
    for question, entry in zip(questions, entries):
        try:
            same = _parse(entry) == question
        except _Wrong as problem:
            raise LaidError(f"{path}: question {question.id} cannot be written: {problem}") from None
        if not same:
            raise LaidError(
                f"{path}: question {question.id} cannot be written: read back, its needle {question.anchor!r} or"
                f" target {question.target!r} is another: rename that category"
            )
    write_json(path, entries)


def read_questions(path: str | Path) -> list[Question]:
    """Read and validate a question file, ours or official.

    Raises LaidError with the file and the question's index for: a missing key, an answer that is not yes/no (any
    case), a question that does not ask about its needle and target, an image path that leaves the root or is not
    <split>2017/<file>, an image twice, a needle among the distractors, a question twice, an id twice, no questions at
    all. The official multi-needle files use an id for a two-needle and for a three-needle question: the later one of a
    file becomes "<id>.2", so that ids are unique here.
    """
    return parse_questions(read_json(path), path)


def parse_questions(data: Any, path: str | Path) -> list[Question]:
    """What `read_questions` makes of a file's content; `path` is named in errors."""
    if not isinstance(data, list) or not data:
        raise LaidError(f"{path}: expected a list of questions, found {_kind(data)}")
    questions: list[Question] = []
    asked: dict[tuple, int] = {}
    for at, entry in enumerate(data):
        try:
            question = _parse(entry)
        except _Wrong as problem:
            raise LaidError(f"{path}: question {at}: {problem}") from None
        key = (question.text, *question.needles, "", *question.distractors)
        if key in asked:
            raise LaidError(f"{path}: question {at} repeats question {asked[key]}: same text, same images")
        asked[key] = at
        questions.append(question)
    try:
        return _told_apart(questions)
    except _Wrong as problem:
        raise LaidError(f"{path}: {problem}") from None


def _told_apart(questions: list[Question]) -> list[Question]:
    """The same questions, the later of two with one id and another number of needles renamed."""
    first: dict[str, list[int]] = {}  # id -> where it stands
    for at, question in enumerate(questions):
        first.setdefault(question.id, []).append(at)
    told = list(questions)
    for ident, places in first.items():
        for k, at in enumerate(places[1:], 2):
            needles = len(questions[at].needles)
            same = next((p for p in places if p < at and len(questions[p].needles) == needles), None)
            if same is not None:
                raise _Wrong(f"questions {same} and {at} have the same id {ident!r:.80}: give each its own")
            if f"{ident}.{k}" in first:
                raise _Wrong(
                    f"question {at} has the id of question {places[0]} and would be called {ident + f'.{k}'!r:.80},"
                    f" which is the id of question {first[f'{ident}.{k}'][0]}: give each its own"
                )
            told[at] = replace(questions[at], id=f"{ident}.{k}")
    return told


class _Wrong(Exception):
    """What is wrong with one entry; the reader adds file and index."""


def _parse(entry: Any) -> Question:
    if not isinstance(entry, dict):
        raise _Wrong(f"expected an object, found {_kind(entry)}")
    missing = [
        key
        for key in ("conversations", "id", "pos_image", "neg_image", "needle", "target")
        if key not in entry
    ]
    if missing:
        raise _Wrong(f"lacks {', '.join(missing)}")
    turns = entry["conversations"]
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, dict) for t in turns):
        raise _Wrong("conversations is not one question and one answer")
    if turns[0].get("from") not in ("human", "user") or turns[1].get("from") not in ("gpt", "assistant"):
        raise _Wrong(
            f"conversations is from {turns[0].get('from')!r} and {turns[1].get('from')!r}, not human and gpt"
        )
    text, answer = turns[0].get("value"), turns[1].get("value")
    if not isinstance(text, str) or not isinstance(answer, str):
        raise _Wrong("conversations has a value that is not text")
    answer = answer.strip().rstrip(".").lower()
    if answer not in ("yes", "no"):
        raise _Wrong(f"the answer is {turns[1]['value'][:40]!r}, not yes or no")
    anchor, target = (_bare(entry[key], key) for key in ("needle", "target"))
    ident = entry["id"]
    if not isinstance(ident, str) or not ident.isprintable() or not 0 < len(ident) <= LONGEST:
        raise _Wrong(f"id is {ident!r:.40}, not a text of 1 to {LONGEST} printable characters")
    needles, distractors = (_paths(entry[key], key) for key in ("pos_image", "neg_image"))
    if not needles:
        raise _Wrong("pos_image is empty")
    both = set(needles) & set(distractors)
    if both:
        raise _Wrong(f"needle {min(both)} is also a distractor")
    mode = next((m for m in TEMPLATES if text.strip() == question_text(m, anchor, target)), None)
    if mode is None:
        raise _Wrong(f"{text[:80]!r} is not a question about needle {anchor!r} and target {target!r}")
    if mode == "single" and len(needles) != 1:
        raise _Wrong(f"asks about one image and has {len(needles)} in pos_image")
    return Question(entry["id"], text.strip(), answer, anchor, target, needles, distractors, mode)


def _bare(value: Any, key: str) -> str:
    match = re.fullmatch(r"(?:an?\s+)?(\S.*?)\s*", value) if isinstance(value, str) else None
    if not match:
        raise _Wrong(f"{key} is {str(value)[:40]!r}, not a name")
    if problem := name_problem(match[1]):
        raise _Wrong(f"{key} is {value[:40]!r}, which {problem}")
    return match[1]


LONGEST = 200  # characters of a name or an id
_SPECIAL = re.compile(r"<\|.*?\|>")


def special_token(text: str) -> str | None:
    """What in `text` a tokenizer would read as one of its special tokens, <|vision_start|> as an image that is not there."""
    found = _SPECIAL.search(text)
    return found[0] if found else None


def name_problem(name: str) -> str | None:
    """Why `name` cannot be one of an object in a question, or None."""
    if not name.strip():
        return "is blank"
    if unprintable(name):
        return UNPRINTABLE
    if len(name) > LONGEST:
        return f"is {len(name):,} characters long, more than {LONGEST}"
    if token := special_token(name):
        return f"holds the special token {token}"
    return None


def _paths(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
        raise _Wrong(f"{key} is not a list of image paths")
    for path in value:
        if problem := path_problem(path) or ("has no folder" if "/" not in path else None):
            raise _Wrong(
                f"{key}: {path!r:.80} {problem}: not a path below the COCO root, like val2017/000000000139.jpg"
            )
    if len(set(value)) < len(value):
        twice = next(path for path in value if value.count(path) > 1)
        raise _Wrong(f"{key}: {twice} is there twice")
    return tuple(value)


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def check_haystacks(
    questions: Sequence[Question], labels: Mapping[str, frozenset[str]], partial: bool = False
) -> list[str]:
    """Every way in which the questions contradict the labels, one line each; empty when there is none.

    Asked: every image is labelled (partial=True skips those that are not), every needle holds the anchor, no
    distractor does, target and anchor differ, the answer is what the needles' labels say.
    """
    problems = []
    for at, question in enumerate(questions):
        who = f"question {at} ({question.id})"
        unknown = [path for path in question.needles + question.distractors if path not in labels]
        if unknown and not partial:
            problems.append(f"{who}: {len(unknown)} images have no annotations, first {unknown[0]}")
            continue
        if question.anchor == question.target:
            problems.append(f"{who}: anchor and target are both {question.anchor!r}")
        for path in question.needles:
            if path in labels and question.anchor not in labels[path]:
                problems.append(f"{who}: needle {path} holds no {question.anchor}")
        for path in question.distractors:
            if path in labels and question.anchor in labels[path]:
                problems.append(f"{who}: distractor {path} holds {with_article(question.anchor)}")
        if all(path in labels for path in question.needles):
            held = [question.target in labels[path] for path in question.needles]
            truth = "yes" if (any(held) if question.mode == "any" else all(held)) else "no"
            if truth != question.answer:
                problems.append(f"{who}: answered {question.answer}, the labels say {truth}")
    return problems
