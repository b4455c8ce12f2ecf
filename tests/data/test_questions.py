"""The reader against official files and against every kind of broken file; the order of images."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from laid.data.coco import load_labels
from laid.data.questions import (
    Question,
    check_haystacks,
    haystack_file,
    ordered_images,
    question_text,
    read_questions,
    with_article,
    write_questions,
)
from laid.errors import LaidError

# Two entries in the official files' two spellings (images made up).
SINGLE = {
    "conversations": [
        {"from": "human", "value": "For the image with an orange, is there a traffic light?"},
        {"from": "gpt", "value": "yes"},
    ],
    "id": "6FNt8aZCvN2AMUbR5WPVrQ",
    "pos_image": ["train2017/000000000001.jpg"],
    "neg_image": ["val2017/000000000002.jpg", "train2017/000000000003.jpg"],
    "needle": "an orange",
    "target": "a traffic light",
}
MULTI = {
    "conversations": [
        {"from": "user", "value": "For all images with a bird, do all of them contain a cell phone?"},
        {"from": "gpt", "value": "No"},
    ],
    "needle": "a bird",
    "target": "a cell phone",
    "pos_image": ["train2017/000000000004.jpg", "train2017/000000000005.jpg"],
    "neg_image": ["val2017/000000000006.jpg"],
    "id": "gUJAfLpzyWZatVUyWnaUfE",
}


def put(path, *entries):
    path.write_text(json.dumps(list(entries)))
    return path


def test_reads_both_spellings_by_hand(tmp_path):
    one, two = read_questions(put(tmp_path / "q.json", SINGLE, MULTI))
    assert (one.anchor, one.target, one.answer, one.label) == ("orange", "traffic light", "yes", True)
    assert (one.mode, one.size, len(one.needles)) == ("single", 3, 1)
    assert (two.anchor, two.target, two.answer, two.label) == ("bird", "cell phone", "no", False)
    assert (two.mode, two.size, two.needles) == ("all", 3, tuple(MULTI["pos_image"]))


def test_round_trip_writes_the_official_form(tmp_path):
    questions = read_questions(put(tmp_path / "q.json", SINGLE, MULTI))
    write_questions(tmp_path / "again.json", questions)
    assert json.loads((tmp_path / "again.json").read_text())[0] == SINGLE
    assert read_questions(tmp_path / "again.json") == questions


def changed(entry, key, value):
    entry = copy.deepcopy(entry)
    entry[key] = value
    return entry


def said(question=None, answer=None, asker="human"):
    entry = copy.deepcopy(SINGLE)
    turns = entry["conversations"]
    turns[0]["from"] = asker
    turns[0]["value"] = turns[0]["value"] if question is None else question
    turns[1]["value"] = turns[1]["value"] if answer is None else answer
    return entry


@pytest.mark.parametrize(
    "broken, says",
    [
        ("text", "expected an object, found str"),
        ({k: v for k, v in SINGLE.items() if k != "needle"}, "lacks needle"),
        (changed(SINGLE, "conversations", []), "not one question and one answer"),
        (said(asker="system"), "'system'"),
        (said(answer="maybe"), "'maybe', not yes or no"),
        (said(answer=3), "not text"),
        (said(question="Is there a traffic light?"), "not a question about needle 'orange'"),
        (changed(SINGLE, "target", "a cow"), "not a question about needle 'orange' and target 'cow'"),
        (changed(SINGLE, "target", 7), "target is '7', not a name"),
        (changed(SINGLE, "id", ""), "id is '', not a text"),
        (changed(SINGLE, "id", "a\ud800"), "id is .*, not a text of 1 to 200 printable"),
        (changed(SINGLE, "neg_image", ["val2017/\0.jpg"]), "not a path below"),
        (changed(SINGLE, "neg_image", ["val2017/./1.jpg"]), "names no file: not a path below"),
        (changed(SINGLE, "neg_image", ["val2017/" + "x" * 300]), "is 308 characters long"),
        (changed(SINGLE, "id", "x" * 200_000), "not a text of 1 to 200"),
        (
            changed(SINGLE, "needle", "a <|image_pad|>"),
            r"needle is .* holds the special token <\|image_pad\|>",
        ),
        (changed(SINGLE, "target", "a c\0w"), "target is .* holds a character that no name has"),
        (changed(SINGLE, "pos_image", []), "pos_image is empty"),
        (changed(SINGLE, "pos_image", "train2017/1.jpg"), "pos_image is not a list"),
        (changed(SINGLE, "pos_image", MULTI["pos_image"]), "asks about one image and has 2"),
        (
            changed(SINGLE, "neg_image", ["train2017/000000000001.jpg"]),
            "needle .*001.jpg is also a distractor",
        ),
        (
            changed(SINGLE, "neg_image", ["val2017/1.jpg", "val2017/1.jpg"]),
            "val2017/1.jpg is there twice",
        ),
        (changed(SINGLE, "neg_image", ["../secret/1.jpg"]), "not a path below the COCO root"),
        (changed(SINGLE, "neg_image", ["val2017/../../1.jpg"]), "not a path below"),
        (changed(SINGLE, "neg_image", ["/etc/passwd"]), "not a path below"),
        (changed(SINGLE, "neg_image", ["val2017\\1.jpg"]), "not a path below"),
        (changed(SINGLE, "neg_image", ["1.jpg"]), "not a path below"),
        (changed(MULTI, "id", "other"), "repeats question 0"),
    ],
)
def test_broken_questions_name_file_and_index(tmp_path, broken, says):
    path = put(tmp_path / "q.json", MULTI, broken)
    with pytest.raises(LaidError, match=says) as caught:
        read_questions(path)
    assert (
        str(path) in str(caught.value) and "question 1" in str(caught.value) and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "text, says", [("[]", "an empty list"), ("{}", "found dict"), ("[{", "not valid JSON")]
)
def test_broken_files(tmp_path, text, says):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(LaidError, match=says):
        read_questions(tmp_path / "q.json")


def test_every_cut_of_a_file_is_found(tmp_path):
    whole = json.dumps([SINGLE, MULTI])
    for length in range(0, len(whole) - 1, 17):
        (tmp_path / "q.json").write_text(whole[:length])
        with pytest.raises(LaidError):
            read_questions(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("needles", "ids", "said"),
    [
        ((2, 3), "aa", ["a", "a.2"]),  # as the official multi-needle files have it
        ((3, 2, 4), "aaa", ["a", "a.2", "a.3"]),
        ((2, 2), "aa", "questions 0 and 1 have the same id 'a': give each its own"),
        ((2, 3, 3), "aaa", "questions 1 and 2 have the same id"),
        ((2, 2, 3), ("a", "a.2", "a"), "question 2 has the id of question 0 and would be called 'a.2', which is the id of question 1"),
    ],
)  # fmt: skip
def test_an_id_is_of_one_question_or_of_one_for_each_number_of_needles(tmp_path, needles, ids, said):
    entries = []
    for at, (count, ident) in enumerate(zip(needles, ids)):
        paths = [f"val2017/{at}{k}.jpg" for k in range(count)]
        entries.append(changed(changed(MULTI, "pos_image", paths), "id", ident))
    file = put(tmp_path / "q.json", *entries)
    if isinstance(said, list):
        assert [q.id for q in read_questions(file)] == said
    else:
        with pytest.raises(LaidError, match=re.escape(f"{file}: {said}")):
            read_questions(file)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    good = read_questions(put(tmp_path / "q.json", SINGLE))[0]
    for bad, says in (
        (replace(good, anchor="orange  "), "not a question about needle|is another"),
        (replace(good, needles=("1.jpg",)), "cannot be written: pos_image: '1.jpg' has no folder"),
    ):
        with pytest.raises(LaidError, match=says):
            write_questions(tmp_path / "out.json", [good, bad])
    assert not (tmp_path / "out.json").exists()


def test_articles():
    for name in ("mouse", "traffic light", "bus", "tv", "hexagon"):
        assert with_article(name) == f"a {name}"
    for name in ("orange", "umbrella", "airplane", "oven", "apple", "elephant", "arrow"):
        assert with_article(name) == f"an {name}"
    assert question_text("any", "umbrella", "bus") == (
        "For all images with an umbrella, do any of them contain a bus?"
    )


def test_file_of_a_size(tmp_path):
    assert haystack_file(tmp_path, 1).name == "visual_haystack_1.json"
    put(tmp_path / "visual_haystack_oracle.json", SINGLE)
    assert haystack_file(tmp_path, 1).name == "visual_haystack_oracle.json"
    assert haystack_file(tmp_path, 5).name == "visual_haystack_5.json"


def make(ident, needles, distractors):
    names = [f"val2017/{k:012d}.jpg" for k in range(needles + distractors)]
    return Question(ident, "", "yes", "a", "b", tuple(names[:needles]), tuple(names[needles:]))


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=20), st.integers(1, 3), st.integers(0, 30), st.integers(0, 2**40))
def test_order_is_a_stated_permutation(ident, needles, distractors, seed):
    question = make(ident, needles, distractors)
    paths, where = ordered_images(question, seed)
    assert sorted(paths) == sorted(question.needles + question.distractors)
    assert [paths[k] for k in where] == [p for p in paths if p in question.needles] and len(where) == needles
    assert (paths, where) == ordered_images(question, seed)


def test_needle_positions_are_uniform():
    counts = Counter(ordered_images(make(f"q{k}", 1, 9), seed=4)[1][0] for k in range(3000))
    assert len(counts) == 10 and chisquare(list(counts.values())).pvalue > 0.001
    # Over seeds too, for one question; and the ranks of several needles together.
    counts = Counter(ordered_images(make("one", 1, 4), seed=k)[1][0] for k in range(2000))
    assert len(counts) == 5 and chisquare(list(counts.values())).pvalue > 0.001
    counts = Counter(p for k in range(1500) for p in ordered_images(make(f"m{k}", 3, 5))[1])
    assert len(counts) == 8 and chisquare(list(counts.values())).pvalue > 0.001


def test_check_finds_each_contradiction():
    labels = {"v/1": {"a", "b"}, "v/2": {"a"}, "v/3": {"b"}, "v/4": set()}

    def question(answer, needles, distractors, mode="single", target="b"):
        return Question("id", "", answer, "a", target, tuple(needles), tuple(distractors), mode)

    def problems(*args, partial=False, **kwargs):
        return " / ".join(check_haystacks([question(*args, **kwargs)], labels, partial))

    assert not problems("yes", ["v/1"], ["v/3", "v/4"])
    assert not problems("no", ["v/2"], ["v/3"])
    assert "labels say yes" in problems("no", ["v/1"], [])
    assert "labels say no" in problems("yes", ["v/2"], [])
    assert "needle v/3 holds no a" in problems("yes", ["v/3"], [])
    assert "distractor v/2 holds an a" in problems("yes", ["v/1"], ["v/2"])
    assert "both 'a'" in problems("yes", ["v/1"], [], target="a")
    assert "1 images have no annotations, first v/9" in problems("yes", ["v/1"], ["v/9"])
    assert not problems("yes", ["v/1"], ["v/9"], partial=True)
    assert not problems("no", ["v/1", "v/2"], [], mode="all")
    assert "labels say no" in problems("yes", ["v/1", "v/2"], [], mode="all")
    assert not problems("yes", ["v/1", "v/2"], [], mode="any")
    assert "labels say yes" in problems("no", ["v/1", "v/2"], [], mode="any")


def test_official_files_are_accepted_and_agree_with_coco(shared):
    """Each of the eight files, and each question of which an image is in the slice of COCO at hand."""
    labels, _ = load_labels(shared / "coco_slice")
    files = sorted((shared / "vhs_official/VHs_qa").rglob("*.json"))
    assert len(files) == 8
    judged = distractors = 0
    for path in files:
        raw = json.loads(path.read_text())
        questions = read_questions(path)
        assert [q.to_json()["needle"] for q in questions] == [e["needle"] for e in raw]
        assert [q.to_json()["target"] for q in questions] == [e["target"] for e in raw]
        assert [q.text for q in questions] == [e["conversations"][0]["value"] for e in raw]
        assert [list(q.needles + q.distractors) for q in questions] == [
            e["pos_image"] + e["neg_image"] for e in raw
        ]
        size = re.search(r"_(\d+|oracle)\.json", path.name)[1]
        assert {q.size for q in questions} == {1 if size == "oracle" else int(size)}
        assert check_haystacks(questions, labels, partial=True) == []
        judged += sum(all(p in labels for p in q.needles) for q in questions)
        distractors += sum(p in labels for q in questions for p in q.distractors)
    assert judged >= 30 and distractors >= 100
    # And it can fail: with every answer turned round, each judged question is a contradiction.
    flipped = [Question(**{**vars(q), "answer": "no" if q.label else "yes"}) for q in questions]
    assert len(check_haystacks(flipped, labels, partial=True)) == sum(
        all(p in labels for p in q.needles) for q in questions
    )
