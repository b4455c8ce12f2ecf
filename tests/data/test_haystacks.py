"""Synthesised questions against a checker that knows nothing of how they are made."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from laid.data.coco import load_coco, load_labels
from laid.data.haystacks import HaystackSampler, build_haystacks, read_questions, synthesise
from laid.data.questions import OFFICIAL_ANCHORS, OFFICIAL_TARGETS
from laid.errors import LaidError
from laid.io import sha256_folder
from laid.settings import validate

CONFIG = {
    "haystacks": {
        "hard_negatives": 0.8,
        "train": {"questions": 400, "min_size": 2, "max_size": 20},
        "validation": {"share": 0.25, "questions": 40, "sizes": [5, 20]},
        "test": {"questions": 60, "sizes": [1, 2, 5, 10, 50]},
    }
}


def with_settings(**changes):
    return validate({"haystacks": {**CONFIG["haystacks"], **changes}})


@pytest.fixture(scope="module")
def built(coco_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "haystacks"
    build_haystacks(with_settings(), coco_root, out)
    return out


@pytest.fixture(scope="module")
def built_multi(coco_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("multi") / "haystacks"
    sizes = {"questions": 60, "sizes": [2, 5, 20]}
    build_haystacks(with_settings(needles="multi", test=sizes), coco_root, out)
    return out


def brute_force(folder, coco):
    """Every rule of Visual Haystacks, on the raw JSON files alone. Returns file -> raw entries."""
    held = defaultdict(set)
    splits = {}
    for split in ("train2017", "val2017"):
        data = json.loads((coco / f"annotations/instances_{split}.json").read_text())
        names = {c["id"]: c["name"] for c in data["categories"]}
        paths = {i["id"]: f"{split}/{i['file_name']}" for i in data["images"]}
        splits[split] = set(paths.values())
        for annotation in data["annotations"]:
            held[paths[annotation["image_id"]]].add(names[annotation["category_id"]])
    files = {p.relative_to(folder).as_posix(): json.loads(p.read_text()) for p in folder.rglob("*.json")}
    files.pop("shortcuts.json")
    ids, used = [], defaultdict(set)
    for name, entries in files.items():
        area = name.split("/")[0]
        answers = Counter()
        for entry in entries:
            assert set(entry) == {"conversations", "id", "pos_image", "neg_image", "needle", "target"}
            ask, answer = entry["conversations"]
            assert (ask["from"], answer["from"]) == ("human", "gpt")
            single = re.fullmatch(r"For the image with (an? .+), is there (an? .+)\?", ask["value"])
            multi = re.fullmatch(
                r"For all images with (an? .+), do (any|all) of them contain (an? .+)\?", ask["value"]
            )
            anchor, target = (single[1], single[2]) if single else (multi[1], multi[3])
            assert (anchor, target) == (entry["needle"], entry["target"])
            anchor, target = anchor.split(" ", 1)[1], target.split(" ", 1)[1]
            assert anchor != target
            images = entry["pos_image"] + entry["neg_image"]
            assert len(set(images)) == len(images)
            if single:
                assert len(entry["pos_image"]) == 1
            else:
                assert len(entry["pos_image"]) in (2, 3)
            size = re.search(r"haystack_(\d+)\.json", name)
            assert len(images) == int(size[1]) if size else 2 <= len(images) <= 20
            assert all(anchor in held[p] for p in entry["pos_image"])
            assert not any(anchor in held[p] for p in entry["neg_image"])
            found = [target in held[p] for p in entry["pos_image"]]
            truth = any(found) if multi and multi[2] == "any" else all(found)
            assert answer["value"] == ("yes" if truth else "no")
            answers[answer["value"]] += 1
            used[area] |= set(images)
            ids.append(entry["id"])
        assert abs(answers["yes"] - answers["no"]) <= 1, name
    assert len(set(ids)) == len(ids)
    assert not used["train.json"] & used["validation"] and not used["train.json"] & used["test"]
    assert not used["validation"] & used["test"]
    assert (
        used["test"] <= splits["val2017"] and used["train.json"] | used["validation"] <= splits["train2017"]
    )
    return files


def test_brute_force_single(built, coco_root):
    files = brute_force(built, coco_root)
    assert set(files) == {
        "train.json",
        *(f"validation/visual_haystack_{s}.json" for s in (5, 20)),
        *(f"test/visual_haystack_{s}.json" for s in (1, 2, 5, 10, 50)),
    }
    sizes = Counter(len(e["pos_image"] + e["neg_image"]) for e in files["train.json"])
    assert set(sizes) == set(range(2, 21)) and max(sizes.values()) - min(sizes.values()) <= 1


def test_brute_force_multi(built_multi, coco_root):
    files = brute_force(built_multi, coco_root)
    texts = [e["conversations"][0]["value"] for e in files["test/visual_haystack_20.json"]]
    assert sum(" any of them " in t for t in texts) == 30
    assert Counter(len(e["pos_image"]) for e in files["test/visual_haystack_20.json"]) == {2: 30, 3: 30}
    assert Counter(len(e["pos_image"]) for e in files["test/visual_haystack_2.json"]) == {2: 60}


def test_targets_and_anchors_say_nothing(built):
    """Within every file each target is yes as often as no (but for one), anchors take turns."""
    for path in built.rglob("*.json"):
        if path.name == "shortcuts.json":
            continue
        tally = defaultdict(Counter)
        questions = read_questions(path)
        for question in questions:
            tally[question.target][question.answer] += 1
        assert all(abs(c["yes"] - c["no"]) <= 1 for c in tally.values()), path
        anchors = Counter(q.anchor for q in questions)
        assert max(anchors.values()) - min(anchors.values()) <= 1
        targets = Counter(q.target for q in questions)
        assert len(targets) == 16 and max(targets.values()) <= 2 * min(targets.values()) + 2


def test_distractors_are_independent_of_the_answer(coco_root):
    """Does a distractor hold the target? As often for yes as for no; and at least hard_negatives of the time."""
    coco = load_coco(coco_root, "train2017")
    questions = synthesise(coco.labels, coco.categories, [4] * 3000, seed=[5], hard_negatives=0.8)
    table = np.zeros((2, 2), dtype=int)
    for question in questions:
        table[
            int(question.label), int(any(question.target in coco.labels[p] for p in question.distractors))
        ] += 1
    assert chi2_contingency(table).pvalue > 0.01
    assert (table[:, 1] / table.sum(1) > 0.8).all()
    # The needle's place in the pool of images says nothing either: "yes" needles and "no" needles are both many.
    for answer in ("yes", "no"):
        assert len({q.needles[0] for q in questions if q.answer == answer}) > 60


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_share_of_hard_negatives(coco_root, share):
    coco = load_coco(coco_root, "train2017")
    questions = synthesise(coco.labels, coco.categories, [2] * 2000, seed=[1], hard_negatives=share)
    hard = np.mean([q.target in coco.labels[q.distractors[0]] for q in questions if not q.label])
    # One distractor holds about 2.5 of the 16 categories; where it holds nothing to ask about, none can be hard.
    base = np.mean([len(held) for held in coco.labels.values()]) / 16
    assert hard == pytest.approx(share + (1 - share) * base, abs=0.05)


def test_same_seed_same_bytes(built, coco_root, tmp_path):
    build_haystacks(with_settings(), coco_root, tmp_path / "again")
    build_haystacks(with_settings(seed=1), coco_root, tmp_path / "other")
    assert sha256_folder(tmp_path / "again") == sha256_folder(built) != sha256_folder(tmp_path / "other")
    # More questions of one size leave the other sizes as they are.
    build_haystacks(with_settings(test={"questions": 60, "sizes": [5]}), coco_root, tmp_path / "one")
    name = "test/visual_haystack_5.json"
    assert (tmp_path / "one" / name).read_bytes() == (built / name).read_bytes()


def test_too_few_images_is_one_error_with_both_numbers(coco_root, tmp_path):
    with pytest.raises(
        LaidError, match=r"visual_haystack_150.json: size 150: .*149 distractors.*100 images.*at most \d+"
    ):
        build_haystacks(with_settings(test={"questions": 4, "sizes": [5, 150]}), coco_root, tmp_path / "h")
    assert not (tmp_path / "h").exists()
    with pytest.raises(LaidError, match="1 images cannot hold 2 needles"):
        build_haystacks(with_settings(needles="multi"), coco_root, tmp_path / "h")
    with pytest.raises(LaidError, match="min_size: 5 is above max_size 4"):
        with_settings(train={"questions": 4, "min_size": 5, "max_size": 4})
    with pytest.raises(LaidError, match="no category of 1 can be an anchor"):
        synthesise({"v/1": frozenset("a"), "v/2": frozenset()}, ["a"], [1, 1], seed=[0])
    with pytest.raises(LaidError, match="no images"):
        synthesise({}, ["a"], [1], seed=[0])


def test_foreign_files_are_never_replaced(coco_root, tmp_path):
    (tmp_path / "h").mkdir()
    (tmp_path / "h/thesis.tex").write_text("precious")
    with pytest.raises(LaidError, match="thesis.tex"):
        build_haystacks(with_settings(), coco_root, tmp_path / "h")
    assert (tmp_path / "h/thesis.tex").read_text() == "precious"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(30, 120),
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 5),
    st.floats(0, 1),
)
def test_sampler_properties(kinds, count, seed, size, targets, hard):
    """On arbitrary labels: either a clear error or a haystack that keeps every rule."""
    rng = np.random.default_rng(seed)
    names = [f"c{k}" for k in range(kinds)]
    labels = {f"v/{k}": frozenset(n for n in names if rng.random() < 0.35) for k in range(count)}
    sampler = HaystackSampler(labels, names, hard, seed)
    try:
        sample = sampler.sample(size, targets)
    except LaidError:
        # Independently: no anchor with enough images without it and a pair that can be asked both ways.
        for a in names:
            free = sum(a not in held for held in labels.values())
            for t in names:
                both = sum(a in held and t in held for held in labels.values())
                alone = sum(a in held and t not in held for held in labels.values())
                assert a == t or free < size - 1 or not both or not alone
        return
    shown = [labels[sampler.paths[k]] for k in sample.images]
    assert len(set(sample.images.tolist())) == size == len(sample.images)
    assert [sample.anchor in held for held in shown] == [k == sample.needle for k in range(size)]
    assert set(sample.objects) == shown[sample.needle]
    asked = [t for t, _ in sample.targets]
    assert len(set(asked)) == len(asked) == min(targets, kinds - 1) and sample.anchor not in asked
    assert all((t in shown[sample.needle]) == yes for t, yes in sample.targets)


def test_sampler_is_fair_and_repeatable(coco_root):
    coco = load_coco(coco_root, "train2017")
    one, two = (HaystackSampler(coco.labels, coco.categories, 0.8, 7) for _ in range(2))
    samples = [one.sample(5, 4) for _ in range(1500)]
    for sample, again in zip(samples, (two.sample(5, 4) for _ in range(1500)), strict=True):
        assert sample.images.tolist() == again.images.tolist() and sample.targets == again.targets
    assert np.mean([s.targets[0][1] for s in samples]) == pytest.approx(0.5, abs=0.05)
    assert 0.35 < np.mean([a for s in samples for _, a in s.targets]) < 0.5
    assert chisquare(list(Counter(s.needle for s in samples).values())).pvalue > 0.001
    assert chisquare(list(Counter(s.anchor for s in samples).values())).pvalue > 0.001


def test_sampler_is_fast_enough_to_draw_while_training(coco_root):
    coco = load_coco(coco_root, "train2017")
    sampler = HaystackSampler(coco.labels, coco.categories, 0.8, 0)
    sampler.sample(60, 4)
    start = time.process_time()
    for _ in range(300):
        sampler.sample(60, 4)
    assert 300 / (time.process_time() - start) > 500  # about 5,000 on an idle core


def test_real_coco_labels(shared, tmp_path):
    """The 80 categories of real photographs; haystacks as large as the 206 images allow, and not larger."""
    root = shared / "coco_slice"
    config = with_settings(
        train={"questions": 300, "min_size": 2, "max_size": 20},
        validation={"share": 0.25, "questions": 40, "sizes": [5, 20]},
        test={"questions": 100, "sizes": [1, 2, 20, 150]},
    )
    scores = build_haystacks(config, root, tmp_path / "h")
    brute_force(tmp_path / "h", root)
    names = {
        n
        for p in (tmp_path / "h").rglob("visual*.json")
        for q in read_questions(p)
        for n in (q.anchor, q.target)
    }
    assert not names & {"skis", "scissors"} and len(names) > 60
    for name, score in scores.items():
        if name.startswith("test"):
            error = 3 * math.sqrt(0.25 / score["n"])
            for rule in ("target_rate", "pair_rate", "companion"):
                assert abs(score["accuracy"][rule] - 0.5) < error, (name, rule)
    with pytest.raises(LaidError, match="size 210: .*209 distractors.*206 images"):
        build_haystacks(
            config.changed({"haystacks": {"test": {"questions": 4, "sizes": [210]}}}),
            root,
            tmp_path / "h",
        )


def test_official_vocabulary_and_balance(shared, tmp_path):
    """The official files' 71 anchors and 32 targets; our balance is at least as good as theirs, on real labels."""
    entries = json.loads(
        (shared / "vhs_official/VHs_qa/single_needle/VHs_large/visual_haystack_10.json").read_text()
    )
    assert {e["needle"].split(" ", 1)[1] for e in entries} == set(OFFICIAL_ANCHORS) and len(
        OFFICIAL_ANCHORS
    ) == 71
    assert {e["target"].split(" ", 1)[1] for e in entries} == set(OFFICIAL_TARGETS) and len(
        OFFICIAL_TARGETS
    ) == 32
    labels, categories = load_labels(shared / "coco_slice")
    ours = synthesise(labels, categories, [10] * 1000, seed=[0], vocabulary="official")
    assert {q.anchor for q in ours} <= set(OFFICIAL_ANCHORS) and {q.target for q in ours} <= set(
        OFFICIAL_TARGETS
    )
    # Some of the 71 have no picture in the slice that serves; what the labels allow is used.
    assert len({q.anchor for q in ours}) > 55 and len({q.target for q in ours}) == 32

    def spread(pairs):
        tally = defaultdict(Counter)
        for key, answer in pairs:
            tally[key][answer] += 1
        return sum(abs(c["yes"] - c["no"]) for c in tally.values()) / sum(
            sum(c.values()) for c in tally.values()
        )

    theirs = [(e["target"], e["conversations"][1]["value"]) for e in entries]
    assert spread([(q.target, q.answer) for q in ours]) <= 32 / 1000 < spread(theirs)
    theirs = [(e["needle"], e["conversations"][1]["value"]) for e in entries]
    assert spread([(q.anchor, q.answer) for q in ours]) < spread(theirs)
    assert spread([(q.target, q.answer) for q in ours]) <= spread([(q.anchor, q.answer) for q in ours])


def test_min_needles_keeps_rare_pairs_out():
    rng = np.random.default_rng(0)
    labels = {f"v/{k}": frozenset(n for n in "abcd" if rng.random() < 0.4) for k in range(200)}
    labels |= {"v/rare": frozenset("ae"), "v/rarer": frozenset("e")}
    for least, there in ((1, True), (2, False)):
        questions = synthesise(labels, list("abcde"), [3] * 300, seed=[0], min_needles=least)
        assert any("e" in (q.anchor, q.target) for q in questions) == there
    with pytest.raises(LaidError, match="at least 150 images that hold both"):
        synthesise(labels, list("abcde"), [3] * 300, seed=[0], min_needles=150)
