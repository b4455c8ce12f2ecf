"""From logits or from words to yes and no."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from laid.errors import LaidError

if TYPE_CHECKING:  # tables score answers without loading torch
    import torch

_YES, _NO = ("yes", "Yes", " yes", " Yes", "YES"), ("no", "No", " no", " No", "NO")
# Where nltk.word_tokenize, which the official runner uses (vhs_benchmark, utils.py), parts words. Marks that
# it keeps within a word ("/", "_", "|", a full stop inside) keep it whole here too: "yes/no" is neither yes
# nor no. A full stop ends a word only before a blank or one of the marks that may follow a sentence's end.
_INSIDE = re.compile(r"(?<!\.)\.(?![\s.)\";}\]*:@'({\[!?\u00bb\u2019\u201d]|$)")
_APART = re.compile(
    r"(''|[;@#$%&?!*\"()\[\]{}<>`\u201c\u201d\u201e\u00ab\u00bb\u2018\u2019\u2012-\u2015]"
    r"|[,:](?!\d)|\.\.+|--+|(?<!\w)'(?=\w)|n't\b|'(?:s|m|d|ll|re|ve)\b)"
)


def answer_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """(token ids that say yes, token ids that say no): those spellings that are one token."""
    found = []
    for words in (_YES, _NO):
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        single = sorted({i[0] for i in ids if len(i) == 1})
        if not single:
            raise LaidError(
                f"the tokenizer has no single token for {words[0]!r}: use evaluation.scoring: generate"
            )
        found.append(single)
    return found[0], found[1]


def probability_yes(logits: torch.Tensor, yes: list[int], no: list[int]) -> torch.Tensor:
    """(B,) share of yes among yes and no, summed over spellings; logits: (B, vocabulary)."""
    logits = logits.float()
    return (logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)).sigmoid()


def probability_listed(tokens: Iterable[tuple[str, float]]) -> float | None:
    """The same from the likeliest tokens that a server lists, (text, log-probability); None where neither is among them.

    What is not listed counts as nothing.
    """
    chances = {_YES: 0.0, _NO: 0.0}
    for token, chance in tokens:
        for spellings in chances:
            if re.sub("[\u0120\u2581]", " ", token) in spellings:  # how some tokenizers write a blank
                chances[spellings] += math.exp(chance)
    total = sum(chances.values())
    return chances[_YES] / total if total else None


def words(text: str) -> list[str]:
    """Lower-case word tokens, as the official scorer sees them."""
    text = _INSIDE.sub("\0", text.lower())
    pieces = _APART.sub(r" \1 ", text).split()
    return [word for piece in pieces if (word := piece.rstrip(".").strip("'").replace("\0", "."))]


def spoken_answer(text: str) -> str:
    """What a response says: "yes", "no", "both" or "none" (which the official runner calls non-compliant)."""
    found = set(words(text)) & {"yes", "no"}
    return "both" if len(found) == 2 else found.pop() if found else "none"


def is_right(answer: Mapping[str, Any]) -> bool:
    """Whether {"answer": yes|no|both|none, "label": yes|no} counts as correct.

    The official runner (vhs_benchmark, utils.py) looks for the label among the words of a response: one that says
    both is right either way, and one that says neither is wrong.
    """
    return answer["answer"] in (answer["label"], "both")


def official_bootstrap(
    answers: Sequence[dict[str, Any]], seed: int = 0, resamples: int = 100
) -> dict[str, tuple[float, float]]:
    """What the official runner reports (vhs_benchmark, utils.py, run_eval): (mean, standard deviation) of "accuracy"
    and of "compliance", as fractions, over `resamples` draws of as many answers with replacement.

    There the draws have no seed; here they do, so that the same answers give the same digits.
    """
    drawn = np.random.default_rng(seed).integers(len(answers), size=(resamples, len(answers)))
    right = np.array([is_right(a) for a in answers], dtype=float)
    said = np.array([a["answer"] != "none" for a in answers], dtype=float)
    means = {"accuracy": right[drawn].mean(axis=1), "compliance": said[drawn].mean(axis=1)}
    return {name: (float(values.mean()), float(values.std())) for name, values in means.items()}


def pope_answer(text: str) -> str:
    """What a response says by POPE's rule (RUCAIBox/POPE, evaluate.py): "no" if its first sentence has the word no
    (or No, or not), else "yes"."""
    said = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(said) else "yes"
