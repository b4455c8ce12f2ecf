"""laid_plus_long: long haystacks without labels. What the file answers changes nothing that is trained."""

import json

import pytest
from safetensors.torch import load_file

from laid.data.haystacks import build_haystacks, build_long
from laid.data.questions import read_questions
from laid.errors import LaidError
from laid.training.recipe import Run, train
from laid.training.teacher_cache import build_cache


@pytest.fixture(scope="module")
def settings(micro):
    own = {"extends": "laid", "questions": "long", "lambda_sft": 0.0}
    return micro.changed({"methods": {"laid_plus_long": own}, "training": {"epochs": 1}})


@pytest.fixture(scope="module")
def questions(settings, coco_root, tmp_path_factory):
    file = tmp_path_factory.mktemp("long") / "long.json"
    build_long(settings, coco_root, file)
    return file


@pytest.fixture(scope="module")
def cached(settings, family, coco_root, tmp_path_factory):
    def cached(questions, **options):
        out = tmp_path_factory.mktemp("caches") / "cache"
        build_cache(settings, family["teacher"], coco_root, questions, out, **options)
        return out

    return cached


@pytest.fixture(scope="module")
def trained(family, coco_root, tmp_path_factory):
    def trained(settings, questions, cache):
        out = tmp_path_factory.mktemp("runs") / "seed0"
        train(Run(settings, "laid_plus_long", 0, "small", family["small"], coco_root, questions, out, cache))
        return out

    return trained


def test_long_haystacks_come_from_training_images_in_the_sizes_asked(
    settings, questions, coco_root, tmp_path
):
    found = read_questions(questions)
    assert [len(found), {q.size for q in found}] == [8, {4, 5, 6}]
    build_haystacks(settings, coco_root, tmp_path / "haystacks")
    held_out = read_questions(tmp_path / "haystacks/validation/visual_haystack_2.json")
    named, others = ({path for q in file for path in q.needles + q.distractors} for file in (found, held_out))
    assert not named & others and all(path.startswith("train2017/") for path in named)


def test_flipping_every_answer_changes_no_trained_byte(settings, questions, family, cached, trained):
    entries = json.loads(questions.read_text())
    for entry in entries:
        turn = entry["conversations"][1]
        turn["value"] = {"yes": "no", "no": "yes"}[turn["value"]]
    flipped = questions.with_name("flipped.json")
    flipped.write_text(json.dumps(entries))
    results = []
    for file in (questions, flipped):
        cache = cached(file, labelled=False)
        run = trained(settings, file, cache)
        shards = [path.read_bytes() for path in sorted(cache.glob("*.safetensors"))]
        logs = [(run / name).read_text() for name in ("log.jsonl", "learned.json")]
        results.append((shards, (run / "model/model.safetensors").read_bytes(), logs))
    assert results[0] == results[1]
    before, after = (
        load_file(family["small"] / "model.safetensors"),
        load_file(run / "model/model.safetensors"),
    )
    assert any(not before[key].equal(after[key]) for key in before)


def test_labels_would_change_the_cache(settings, questions, cached, trained):
    """The counterpart, without which the test above could not fail: with labels the teacher sees the answers."""
    with_labels, without = cached(questions), cached(questions, labelled=False)
    one, other = (load_file(cache / "shard-00000.safetensors") for cache in (with_labels, without))
    assert one["logits"][:, 0].equal(other["logits"][:, 0])  # what the teacher answers
    assert not one["logits"][:, 1].equal(other["logits"][:, 1])  # what follows another answer
    with pytest.raises(LaidError, match="was made with labels, method laid_plus_long learns without"):
        trained(settings, questions, with_labels)


def test_labels_are_refused(settings):
    with pytest.raises(LaidError, match="methods.laid_plus_long.lambda_sft: 0.5 weighs labels"):
        settings.changed({"methods": {"laid_plus_long": {"lambda_sft": 0.5}}})
