"""Cells with chosen accuracies, for tests only."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from laid.evaluation.cells import Cells, make_cell
from laid.evaluation.intervals import wilson
from laid.settings import Settings, merge, validate

PROVENANCE = {
    "code": {"version": "0", "commit": "0" * 40, "dirty": False},
    "config": "c" * 64,
    "data": {"haystacks/test/visual_haystack_1.json": "d" * 64},
    "model": "m" * 64,
    "libraries": {"torch": "0"},
}

CONFIG: dict[str, Any] = {
    "scale": "test",
    "models": {"teacher": "32B", "students": ["7B", "3B"]},
    "haystacks": {"test": {"sizes": [1, 5, 10, 20, 50, 100, 150], "questions": 10000}},
    "methods": {name: {} for name in ("sft", "kd", "laid", "laid_wo_kl", "laid_wo_laid")},
    "tables": {
        "methods": ["base", "yarn", "self_extend", "sft", "laid"],
        "ablations": ["base", "laid_wo_kl", "laid_wo_laid", "laid"],
        "omit": [2],
        "table3_omit": [2, 150],
        "short_max": 20,
        "threshold": 0.8,
    },
}


def config(*, sizes: list[int] | None = None, more: dict[str, Any] | None = None, **tables: Any) -> Settings:
    """The settings that tables read, with some `tables` keys changed, other test sizes, and `more` sections over them."""
    result = merge(CONFIG, {"tables": tables, **(more or {})})
    if sizes:
        result["haystacks"]["test"]["sizes"] = sizes
    return validate(result)


def answers(right: Any, size: int, seeds: list[int] | None = None) -> list[dict[str, Any]]:
    """Answers from right[seed][question]; labels alternate yes and no, the needle walks through the haystack."""
    out = []
    for s, row in enumerate(np.atleast_2d(right)):
        for q, good in enumerate(row):
            label = "yes" if q % 2 == 0 else "no"
            answer = label if good else ("no" if label == "yes" else "yes")
            out.append(
                {
                    "id": q,
                    "seed": seeds[s] if seeds else s,
                    "label": label,
                    "answer": answer,
                    "p_yes": 0.9 if answer == "yes" else 0.1,
                    "needles": [(q // 2) % size],
                }
            )
    return out


def cell(student: str, method: str, size: int, right: Any, **more: Any) -> dict[str, Any]:
    """A cell of make_cell from right[seed][question]."""
    values = {
        "scale": "test",
        "label": student,
        "role": "teacher" if student in ("32B", "teacher") else "student",
        "tokens_mean": 40.0 + 350 * size,
        "positions_mean": 40.0 + 24 * size,
        "provenance": copy.deepcopy(PROVENANCE),
    }
    values.update(more)
    return make_cell(student=student, method=method, size=size, answers=answers(right, size), **values)


def exact(accuracy: float, n: int) -> np.ndarray:
    """(1, n) of which exactly accuracy * n are right, which must be whole."""
    right = round(accuracy * n)
    assert abs(right - accuracy * n) < 1e-6, (accuracy, n)
    return (np.arange(n) < right).astype(int)[None]


def grid_of(curves: dict[tuple[str, str], dict[int, float]], n: int) -> Cells:
    """Cells with exactly the accuracies of `curves`[student, method][size]."""
    return {
        (student, method, size): (cell if n <= 1000 else unchecked)(student, method, size, exact(accuracy, n))
        for (student, method), curve in curves.items()
        for size, accuracy in curve.items()
    }


def unchecked(student: str, method: str, size: int, right: np.ndarray) -> dict[str, Any]:
    """A cell as `cell` makes it, without its checks and digest, which take long for 10,000 answers."""
    low, high = wilson(int(right.sum()), right.size)
    small = cell(student, method, size, [[0, 1]])
    return small | {
        "answers": answers(right, size),
        "n": right.size,
        "questions": right.size,
        "accuracy": right.mean(),
        "interval": [low, high],
    }
