"""laid_long: long haystacks without labels. What the file answers changes nothing that is trained."""

import json

import pytest
from safetensors.torch import load_file

from laid import config as configuration
from laid.data.haystacks import build_haystacks, build_long
from laid.data.questions import read_questions
from laid.data.render import render
from laid.distill.teacher_cache import build_cache
from laid.distill.trainer import Trainer
from laid.errors import LaidError
from laid.models.family import build_config, build_model, build_processor

OVERLAY = """\
haystacks: {long: {questions: 6, min_size: 5, max_size: 8}, train: {questions: 6},
            validation: {questions: 2, sizes: [2]}, test: {questions: 2, sizes: [1]}}
family: {members: {teacher: {hidden_size: 64, heads: 2, kv_heads: 1, layers: 2},
                   small: {hidden_size: 32, heads: 1, kv_heads: 1, layers: 2, intermediate_size: 16}}}
training: {batch_size: 3, per_device_batch: 3, epochs: 2}
teacher_cache: {layers: [-1]}
methods: {laid: {alignment: {pairs: [[-1, -1]]}}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with coco/, long.json, models/ and the configuration they were made with."""
    root = tmp_path_factory.mktemp("unlabelled")
    (root / "overlay.yaml").write_text(OVERLAY)
    settings = configuration.load(["config.yaml", root / "overlay.yaml"])
    render(root / "coco", train=80, val=60, seed=1)
    build_haystacks(settings, root / "coco", root / "haystacks")
    build_long(settings, root / "coco", root / "haystacks/long.json")
    names = sorted({q.anchor for q in read_questions(root / "haystacks/long.json")})
    processor = build_processor([*names, "thing"], settings["family"]["image_pixels"])
    for seed, member in enumerate(("teacher", "small")):
        built = build_config(processor, settings["family"], settings["family"]["members"][member])
        build_model(built, seed).save_pretrained(root / "models" / member)
        processor.save(root / "models" / member)
    return root, settings


def cached(root, settings, questions, name, **options):
    build_cache(settings, root / "models/teacher", root / "coco", questions, root / name, **options)
    return root / name


def trained(root, settings, questions, cache, name):
    student = root / "models/small"
    run = Trainer(settings, "laid_long", 0, "small", student, cache, root / "coco", questions, root / name)
    run.train()
    return root / name


def test_long_haystacks_come_from_training_images_in_the_sizes_asked(world):
    root, settings = world
    questions = read_questions(root / "haystacks/long.json")
    assert {q.size for q in questions} <= set(range(5, 9)) and len(questions) == 6
    held_out = {
        path
        for q in read_questions(root / "haystacks/validation/visual_haystack_2.json")
        for path in q.needles + q.distractors
    }
    named = {path for q in questions for path in q.needles + q.distractors}
    assert not named & held_out and all(path.startswith("train2017/") for path in named)


def test_flipping_every_answer_changes_no_trained_byte(world):
    root, settings = world
    entries = json.loads((root / "haystacks/long.json").read_text())
    for entry in entries:
        turn = entry["conversations"][1]
        turn["value"] = {"yes": "no", "no": "yes"}[turn["value"]]
    (root / "flipped.json").write_text(json.dumps(entries))
    results = []
    for questions, name in ((root / "haystacks/long.json", "true"), (root / "flipped.json", "flipped")):
        cache = cached(root, settings, questions, f"cache_{name}", labelled=False)
        run = trained(root, settings, questions, cache, f"{name}/seed0")
        shards = [path.read_bytes() for path in sorted(cache.glob("*.safetensors"))]
        log = (run / "log.jsonl").read_text()
        results.append((shards, (run / "model/model.safetensors").read_bytes(), log))
    assert results[0] == results[1]
    before = load_file(root / "models/small/model.safetensors")
    after = load_file(root / "true/seed0/model/model.safetensors")
    assert any(not before[key].equal(after[key]) for key in before)


def test_labels_would_change_the_cache(world):
    """The counterpart, without which the test above could not fail: with labels the teacher sees the answers."""
    root, settings = world
    questions = root / "haystacks/long.json"
    with_labels = cached(root, settings, questions, "cache_with")
    without = cached(root, settings, questions, "cache_without", labelled=False)
    one, other = (load_file(cache / "shard-00000.safetensors") for cache in (with_labels, without))
    assert one["logits"][:, 0].equal(other["logits"][:, 0])  # what the teacher answers
    assert not one["logits"][:, 1].equal(other["logits"][:, 1])  # what follows another answer
    with pytest.raises(LaidError, match="was made with labels, method laid_long learns without"):
        trained(root, settings, questions, with_labels, "refused/seed0")


def test_labels_are_refused(world):
    root, settings = world
    weighed = configuration.merge(settings, {"methods": {"laid_long": {"lambda_sft": 0.5}}})
    with pytest.raises(LaidError, match="lambda_sft is 0.5, but questions: long are used without"):
        trained(root, weighed, root / "haystacks/long.json", None, "refused/seed0")
    with pytest.raises(LaidError, match="methods.laid_long.lambda_sft: 0.5 weighs labels"):
        configuration.validate(weighed)
