"""POPE's questions: the drawing against its definition, the files against POPE's own format."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from laid.cli import main
from laid.data.coco import load_coco
from laid.data.pope import STRATEGIES, build_pope, is_pope, poll, pope_file, questions_of, read_pope
from laid.errors import LaidError
from laid.settings import validate

CATEGORIES = ("person", "car", "dog", "cat", "bus", "cup")
# person 4, car 3, dog 3, cat 2, bus 1, cup 1 times; a sixth image holds too little to be asked about
LABELS = {
    "val2017/1.jpg": frozenset({"person", "car", "dog"}),
    "val2017/2.jpg": frozenset({"person", "car", "bus"}),
    "val2017/3.jpg": frozenset({"person", "dog", "cat"}),
    "val2017/4.jpg": frozenset({"car", "dog", "cat"}),
    "val2017/5.jpg": frozenset({"person", "cup"}),
    "val2017/6.jpg": frozenset({"cup"}),
}


def small(**more):
    return poll(LABELS, CATEGORIES, **{"images": 5, "objects": 2, "seed": 0, **more})


def test_absent_objects_by_hand():
    """Image 5 holds person and cup. Popular: car and dog (3 each, car first). Adversarial: beside person are car and
    dog (2 each), cat and bus (1 each), beside cup is nothing but person, so one is drawn from what is left."""
    polled = {item.path: item for item in small()}
    item = polled["val2017/5.jpg"]
    assert sorted(item.present) == ["cup", "person"]
    assert item.absent["popular"] == ("car", "dog")
    beside = dict(zip(item.present, item.absent["adversarial"], strict=True))
    if item.present[0] == "person":
        assert beside["person"] == "car" and beside["cup"] in {"dog", "cat", "bus"}
    else:
        assert beside["cup"] in {"car", "dog", "cat", "bus"} and beside["person"] in {"car", "dog"}
    # Image 4 holds car, dog and cat: person is the most frequent absent one and beside each of them, then bus before cup.
    item = polled["val2017/4.jpg"]
    assert item.absent["popular"] == ("person", "bus")
    assert item.absent["adversarial"][0] == "person"
    assert "val2017/6.jpg" not in polled


def check_by_definition(polled, labels, objects):
    """POPE's rules, told from counts over all pairs of objects of the images asked about."""
    asked = [labels[item.path] for item in polled]
    seen = Counter(name for held in asked for name in held)
    beside = Counter(pair for held in asked for pair in itertools.permutations(held, 2))
    for item in polled:
        held = labels[item.path]
        assert len(set(item.present)) == objects and set(item.present) <= held
        for strategy in STRATEGIES:
            absent = item.absent[strategy]
            assert len(set(absent)) == objects and not set(absent) & held and set(absent) <= set(seen)
            for at, (present, one) in enumerate(zip(item.present, absent, strict=True)):
                free = set(seen) - held - set(absent[:at])
                if strategy == "popular":
                    assert seen[one] == max(seen[other] for other in free)
                elif strategy == "adversarial":
                    assert beside[present, one] == max(beside[present, other] for other in free)
                assert one in free


@pytest.mark.parametrize("seed", range(5))
def test_absent_objects_are_those_that_the_definition_names(seed):
    check_by_definition(small(seed=seed), LABELS, 2)
    check_by_definition(small(seed=seed, images=4), LABELS, 2)


def test_absent_objects_of_real_images(shared):
    for split in ("val2017", "train2017"):
        coco = load_coco(shared / "coco_slice", split)
        check_by_definition(poll(coco.labels, coco.categories, images=100, objects=3, seed=0), coco.labels, 3)


def test_random_is_even_over_what_is_absent():
    """Image 5 lacks car, dog, cat and bus: each is the first drawn about as often as the others."""
    first = Counter(small(seed=seed)[4].absent["random"][0] for seed in range(400))
    assert set(first) == {"car", "dog", "cat", "bus"} and all(70 < n < 130 for n in first.values())


def test_the_same_seed_draws_the_same():
    assert small() == small() != small(seed=1)


def test_questions_in_turn():
    polled = small()
    for strategy in STRATEGIES:
        asked = questions_of(polled, strategy, "pope")
        assert [q.answer for q in asked] == ["yes", "no"] * 10
        assert [q.target for q in asked[::2]] == [name for item in polled for name in item.present]
        assert asked[0].text == f"Is there a {asked[0].target} in the image?"
        assert len({q.id for q in asked}) == 20


def test_no_anchor_tells_the_answer():
    """In the words of Visual Haystacks every anchor is in the image, is not the target, and stands with yes and no."""
    polled = small(objects=2)
    for strategy in STRATEGIES:
        asked = questions_of(polled, strategy, "haystack")
        for q in asked:
            assert q.anchor in LABELS[q.needles[0]] and q.anchor != q.target
            assert (q.target in LABELS[q.needles[0]]) == q.label
            assert q.text == f"For the image with a {q.anchor}, is there a {q.target}?"
        with_yes, with_no = (
            Counter((q.needles, q.anchor) for q in asked if q.label == y) for y in (True, False)
        )
        assert with_yes == with_no


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"images": 6}, "6 images asked for, 5 of 6 hold at least 2 objects"),
        (
            {"images": 1, "objects": 3},
            "the images asked about hold 3 kinds of objects and this one has 3 of them",
        ),
    ],
)
def test_too_few(more, says):
    with pytest.raises(LaidError, match=says):
        small(**more)


def test_files_are_read_back(coco_root, tmp_path):
    settings = validate({"scale": "x", "pope": {"images": 20, "wording": "pope"}})
    made = build_pope(settings, coco_root, tmp_path / "questions")
    for strategy in STRATEGIES:
        file = pope_file(tmp_path / "questions", strategy)
        assert is_pope(file) and read_pope(file, coco_root) == made[strategy]
        first = json.loads(file.read_text().splitlines()[0])
        assert sorted(first) == ["image", "label", "question_id", "text"] and first["question_id"] == 1
    assert not is_pope(coco_root / "annotations/instances_val2017.json") and not is_pope(tmp_path / "none")


def test_popes_own_files_name_images_of_2014(tmp_path):
    inside = "000000000139.jpg"
    (tmp_path / "annotations").mkdir()
    image = {"id": 139, "file_name": inside, "width": 640, "height": 426}
    (tmp_path / "annotations/instances_val2017.json").write_text(
        json.dumps({"images": [image], "annotations": [], "categories": []})
    )
    file = tmp_path / "coco_pope_random.json"
    lines = [
        {"question_id": 1, "image": f"COCO_val2014_{inside}", "text": "Is there an umbrella in the image?", "label": "yes"},
        {"question_id": 2, "image": "COCO_val2014_000000999999.jpg", "text": "Is there a hot dog in the image?", "label": "no"},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_pope(file, tmp_path)
    assert first.needles == (f"val2017/{inside}",) and first.target == "umbrella" and first.label
    assert (
        second.needles == ("train2017/000000999999.jpg",) and second.target == "hot dog" and not second.label
    )


GOOD = {"question_id": 1, "image": "val2017/1.jpg", "text": "Is there a dog in the image?", "label": "no"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no questions"),
        ('{"question_id": 1, "ima', "line 1: not valid JSON"),
        (
            json.dumps(GOOD) + "\n" + json.dumps(GOOD),
            "line 2: asks about 'dog' in val2017/1.jpg a second time",
        ),
        (json.dumps(GOOD | {"label": "maybe"}), "line 1: the label is 'maybe', not yes or no"),
        (json.dumps(GOOD | {"text": "A dog?"}), "line 1: 'A dog\\?' asks in none of the known forms"),
        (
            json.dumps(GOOD | {"text": "Is there a <|image_pad|> in the image?"}),
            "line 1: asks about a name that holds",
        ),
        (json.dumps(GOOD | {"image": "val2017/\0.jpg"}), "line 1: 'val2017/.*' is not an image of COCO"),
        ("[" * 100_000, "line 1: not valid JSON"),
        (json.dumps(GOOD | {"image": "../1.jpg"}), "line 1: '../1.jpg' is not an image of COCO"),
        (json.dumps(GOOD | {"image": 7}), "line 1: expected an object with the texts image, text and label"),
    ],
)
def test_broken_files_are_one_line(tmp_path, text, says):
    file = tmp_path / "coco_pope_random.json"
    file.write_text(text)
    with pytest.raises(LaidError, match=says) as caught:
        read_pope(file, tmp_path)
    assert "\n" not in str(caught.value)


def test_older_releases_are_read(tmp_path):
    """A line of one reads "imange"; Windows tools put a byte-order mark before the first."""
    file = tmp_path / "coco_pope_random.json"
    older = GOOD | {"text": "Is there a dog in the imange?", "image": "val2017/2.jpg"}
    file.write_text("\ufeff" + json.dumps(GOOD) + "\r\n" + json.dumps(older) + "\n")
    assert is_pope(file)
    one, two = read_pope(file, tmp_path)
    assert (one.target, two.target, two.text) == ("dog", "dog", older["text"])


def test_one_object_has_no_anchor():
    settings = {"scale": "x", "pope": {"objects": 1, "wording": "haystack"}}
    with pytest.raises(LaidError, match="pope.objects: 1: the wording 'haystack' names a second object"):
        validate(settings)
    validate({"scale": "x", "pope": {"objects": 1, "wording": "pope"}})


def test_images_of_the_questions_are_checked(coco_root, tmp_path, capsys):
    """`laid data --questions` takes POPE's files beside those of Visual Haystacks."""
    settings = tmp_path / "x.yaml"
    settings.write_text(f"scale: x\ndata: {{source: local, root: {coco_root}}}\npope: {{images: 20}}\n")
    words = ["--config", str(settings)]
    assert main(["pope", "questions", *words, "--coco", str(coco_root), "--out", str(tmp_path / "q")]) == 0
    assert "120 random, 120 popular, 120 adversarial questions about 20 images" in capsys.readouterr().out
    file = pope_file(tmp_path / "q", "random")
    assert main(["data", *words, "--out", str(tmp_path / "coco"), "--questions", str(file)]) == 0
    file.write_text(json.dumps(GOOD | {"image": "val2017/none.jpg"}))
    capsys.readouterr()
    assert main(["data", *words, "--out", str(tmp_path / "coco"), "--questions", str(file)]) == 2
    assert (
        f"{file}: 1 images of the questions are not annotated in {tmp_path}/coco, first val2017/none.jpg"
        in capsys.readouterr().err
    )
