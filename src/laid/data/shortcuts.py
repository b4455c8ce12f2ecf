"""What answering without looking for the needle would score, so that a reader knows what an accuracy means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laid.data.questions import Question

# key -> (column heading, what the rule does), in the order of the table
SHORTCUTS = {
    "always_yes": ("always yes", "answers yes to everything"),
    "target_anywhere": ("target in any image", "answers yes if any image of the haystack holds the target"),
    "target_rate": (
        "target's base rate",
        "gives each target its most frequent answer in the training questions",
    ),
    "pair_rate": (
        "pair's base rate",
        "gives each pair of anchor and target its most frequent answer in training",
    ),
    "companion": (
        "usual companion",
        "answers yes if the target is found beside the anchor more often than the median pair",
    ),
}


def shortcuts(
    questions: Sequence[Question],
    labels: Mapping[str, frozenset[str]],
    reference: Sequence[Question] | None = None,
) -> dict[str, Any]:
    """Accuracy (fractions) of each rule in SHORTCUTS on the questions, with n, yes, anchors, targets and sizes.

    Rates are learned from `reference` (the training questions); without it from `questions` themselves, which is the
    most that any constant answer per target or pair can score there. A rule that knows nothing, or a tie, says yes. "Companion" is read off `labels`: the share of the
    anchor's images that hold the target. Every image of the questions must be in `labels`.
    """
    truth = np.array([question.label for question in questions])
    anywhere = np.array([any(q.target in labels[p] for p in q.needles + q.distractors) for q in questions])
    share = companions(questions, labels)
    usual = np.array([share[q.anchor, q.target] for q in questions])
    rules = {
        "always_yes": np.ones(len(questions), dtype=bool),
        "target_anywhere": anywhere,
        "target_rate": _by_rate(questions, reference, lambda q: q.target),
        "pair_rate": _by_rate(questions, reference, lambda q: (q.anchor, q.target)),
        "companion": usual > np.median(usual),
    }
    sizes = [question.size for question in questions]
    return {
        "n": len(questions),
        "yes": int(truth.sum()),
        "anchors": len({question.anchor for question in questions}),
        "targets": len({question.target for question in questions}),
        "sizes": [min(sizes), max(sizes)],
        "accuracy": {key: round(float((rules[key] == truth).mean()), 4) for key in SHORTCUTS},
        "rates_from": "training questions" if reference is not None else "the file itself",
    }


def companions(
    questions: Sequence[Question], labels: Mapping[str, frozenset[str]]
) -> dict[tuple[str, str], float]:
    """(anchor, target) -> share of the labelled images with the anchor that hold the target, for the pairs asked."""
    pairs = {(q.anchor, q.target) for q in questions}
    wanted = defaultdict(set)
    for anchor, target in pairs:
        wanted[anchor].add(target)
    images: dict[str, int] = defaultdict(int)
    beside: dict[tuple[str, str], int] = defaultdict(int)
    for held in labels.values():
        for anchor in held & wanted.keys():
            images[anchor] += 1
            for target in held & wanted[anchor]:
                beside[anchor, target] += 1
    return {pair: beside[pair] / max(1, images[pair[0]]) for pair in pairs}


def _by_rate(questions: Sequence[Question], reference: Sequence[Question] | None, key) -> np.ndarray:
    votes: dict[Any, int] = defaultdict(int)
    for question in questions if reference is None else reference:
        votes[key(question)] += 1 if question.label else -1
    return np.array([votes.get(key(question), 0) >= 0 for question in questions])


def markdown(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of shortcut accuracies, in percent, one row a file, with a legend."""
    head = ["questions", "n", "yes", "anchors", "targets"] + [title for title, _ in SHORTCUTS.values()]
    rows = [
        [name, str(s["n"]), f"{s['yes'] / s['n']:.1%}", str(s["anchors"]), str(s["targets"])]
        + [f"{100 * s['accuracy'][key]:.1f}" for key in SHORTCUTS]
        for name, s in scores.items()
    ]
    lines = ["# What answering by shortcut scores (accuracy, %)", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += [""] + [f"- **{title}**: {text}." for title, text in SHORTCUTS.values()]
    lines += [
        "- Base rates are learned from train.json; for train.json itself they are therefore upper bounds.",
        "",
    ]
    return "\n".join(lines)
