"""Shortcut scores on questions small enough to count by hand."""

from __future__ import annotations

import pytest

from laid.data.questions import Question
from laid.data.shortcuts import SHORTCUTS, companions, markdown, shortcuts

LABELS = {
    "v/1": frozenset({"cup", "dog"}),
    "v/2": frozenset({"cup"}),
    "v/3": frozenset({"dog"}),
    "v/4": frozenset({"cat"}),
    "v/5": frozenset({"cup", "dog", "cat"}),
}


def ask(anchor, target, answer, needle, *others):
    return Question("i", "", answer, anchor, target, (needle,), others)


def test_by_hand():
    questions = [
        ask("cup", "dog", "yes", "v/1", "v/4"),  # dog in the needle
        ask("cup", "dog", "no", "v/2", "v/3"),  # dog in a distractor only: "anywhere" is fooled
        ask("cup", "cat", "no", "v/2", "v/3"),  # cat nowhere
        ask("cup", "dog", "yes", "v/5"),
    ]
    # Of the three images with a cup two hold a dog, one a cat.
    assert companions(questions, LABELS) == {
        ("cup", "dog"): pytest.approx(2 / 3),
        ("cup", "cat"): pytest.approx(1 / 3),
    }
    own = shortcuts(questions, LABELS)
    assert own["accuracy"] == {
        "always_yes": 0.5,
        "target_anywhere": 0.75,
        "target_rate": 0.75,  # dog: yes; cat: no
        "pair_rate": 0.75,
        "companion": 0.5,  # the median pair is dog itself: nobody is above it, all no
    }
    assert (own["n"], own["yes"], own["anchors"], own["targets"], own["sizes"]) == (4, 2, 1, 2, [1, 2])
    # Learned from elsewhere, where dog was mostly no and cat unknown (then yes).
    training = [
        ask("cup", "dog", "no", "v/2"),
        ask("cat", "dog", "no", "v/4"),
        ask("cup", "dog", "yes", "v/1"),
    ]
    learned = shortcuts(questions, LABELS, training)
    assert learned["accuracy"]["target_rate"] == 0.25  # dog: no -> 1 of 3; cat: yes -> wrong
    assert (
        learned["accuracy"]["pair_rate"] == 0.5
    )  # (cup, dog) is a tie -> yes -> 2 of 3; (cup, cat) unknown -> wrong


def test_a_shortcut_in_the_data_would_show():
    """Questions made the careless way (target taken from the needle for yes) are given away, and the scores say so."""
    biased = [ask("cup", "dog", "yes", "v/1", "v/4")] * 10 + [ask("cup", "cat", "no", "v/1", "v/3")] * 10
    scores = shortcuts(biased, LABELS, biased)["accuracy"]
    assert scores["target_rate"] == scores["pair_rate"] == scores["target_anywhere"] == 1.0
    assert scores["companion"] == 1.0 and scores["always_yes"] == 0.5


def test_table():
    questions = [ask("cup", "dog", "yes", "v/1"), ask("cup", "dog", "no", "v/2")]
    text = markdown({"train.json": shortcuts(questions, LABELS)})
    row = next(line for line in text.splitlines() if line.startswith("| train.json"))
    assert row == "| train.json | 2 | 50.0% | 1 | 1 | 50.0 | 100.0 | 50.0 | 50.0 | 50.0 |"
    assert all(title in text for title, _ in SHORTCUTS.values())
