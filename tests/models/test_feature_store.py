"""Features on disk: the same numbers, found by content, never another model's, whole or not at all."""

import shutil

import pytest
import torch

from laid.cli import main
from laid.data.questions import haystack_file
from laid.errors import LaidError
from laid.io import safe_join
from laid.models.feature_store import FeatureStore, tower_key
from laid.models.features import ImageFeatures
from laid.models.loading import load_model
from laid.models.processing import Processor


@pytest.fixture(scope="module")
def student(family):
    return load_model(family["small"]), Processor.load(family["small"])


@pytest.fixture(scope="module")
def paths(coco_root):
    return [f"train2017/{file.name}" for file in sorted((coco_root / "train2017").iterdir())[:12]]


def features(student, root, store=None, batch=64):
    model, processor = student
    return ImageFeatures(model, processor, lambda path: safe_join(root, path), batch, store=store)


def test_what_is_kept_is_what_was_computed(student, coco_root, paths, tmp_path):
    plain = features(student, coco_root).get(paths)
    first, second = features(student, coco_root, tmp_path), features(student, coco_root, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.get(paths), plain))
    assert first.computed == len(paths)
    assert all(torch.equal(a, b) for a, b in zip(second.get(paths), plain))
    assert (second.computed, second.store.found) == (0, len(paths))


def test_one_pass_before_all_jobs(family, coco_root, haystacks, micro_file, tmp_path, capsys):
    """`laid features`, then an evaluation that finds every image where the configuration has them kept."""
    kept = tmp_path / "kept.yaml"
    kept.write_text(f"results: {tmp_path}\nevaluation: {{keep_features: true}}\n")
    config = ["--config", str(micro_file), str(kept)]
    common = ["--model", str(family["small"]), "--coco", str(coco_root)]
    asked = ["--questions", str(haystacks / "train.json"), str(haystack_file(haystacks / "test", 5))]
    for computed in (True, False):
        assert main(["features", *config, *common, *asked]) == 0
        words = capsys.readouterr().out.split()
        assert int(words[1]) > 20 and (int(words[3]) == int(words[1])) is computed
    packs = set(tmp_path.rglob("*.safetensors"))
    assert packs and all(tmp_path / "micro/features" in pack.parents for pack in packs)
    answer = ["--student-name", "small", "--method", "base", "--out", str(tmp_path / "cells")]
    assert main(["evaluate", *config, *common, "--questions", asked[-1], *answer]) == 0
    assert set(tmp_path.rglob("*.safetensors")) == packs


def test_only_what_is_missing_is_computed(student, coco_root, paths, tmp_path):
    features(student, coco_root, tmp_path).get(paths[:5])
    more = features(student, coco_root, tmp_path)
    found = more.get(paths)
    assert (more.computed, more.store.found) == (len(paths) - 5, 5)
    plain = features(student, coco_root).get(paths)
    assert all(torch.equal(a, b) for a, b in zip(found, plain))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("batch", [1, 2, 5, 12])
def test_a_stored_feature_does_not_depend_on_its_batch(student, coco_root, paths, batch, tmp_path):
    """Else the bytes of a run would depend on which run filled the store."""
    one = features(student, coco_root, tmp_path / "one")
    other = features(student, coco_root, tmp_path / "other", batch)
    assert all(torch.equal(a, b) for a, b in zip(one.get(paths), other.get(paths)))


def test_images_are_known_by_content_not_by_name(student, coco_root, paths, tmp_path):
    features(student, coco_root, tmp_path / "store").get(paths[:3])
    root = tmp_path / "moved/train2017"
    root.mkdir(parents=True)
    shutil.copy(coco_root / paths[0], root / "renamed.png")
    shutil.copy(coco_root / paths[5], root / paths[1].split("/")[1])  # another image by a known name
    moved = features(student, tmp_path / "moved", tmp_path / "store")
    found = moved.get(["train2017/renamed.png", paths[1]])
    assert (moved.computed, moved.store.found) == (1, 1)
    same, other = features(student, coco_root).get([paths[0], paths[5]])
    torch.testing.assert_close(found, [same, other], rtol=1e-5, atol=1e-5)


def test_another_tower_or_setting_has_another_key(student, family):
    model, processor = student
    key = tower_key(model, processor)
    assert tower_key(load_model(family["small"]), Processor.load(family["small"])) == key
    assert tower_key(load_model(family["teacher"]), processor) != key
    assert tower_key(load_model(family["small"], torch.bfloat16), processor) != key
    assert tower_key(model, Processor.load(family["small"], max_pixels=1568)) != key
    tuned = load_model(family["small"])
    with torch.no_grad():
        tuned.model.language_model.embed_tokens.weight.add_(1)  # the language model is none of its business
    assert tower_key(tuned, processor) == key
    with torch.no_grad():
        next(tuned.model.visual.parameters()).view(-1)[0] += 1e-3
    assert tower_key(tuned, processor) != key


def test_an_adapter_leaves_the_tower_as_it_was(student, family):
    from peft import LoraConfig, get_peft_model

    model = load_model(family["small"])
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*language_model\.layers\.\d+\..*\.q_proj"))
    assert tower_key(wrapped, student[1]) == tower_key(*student)


def test_a_broken_pack_is_computed_again_and_replaced(student, coco_root, paths, tmp_path):
    features(student, coco_root, tmp_path).get(paths)
    (pack,) = tmp_path.rglob("*.safetensors")
    whole = pack.read_bytes()
    pack.write_bytes(whole[: len(whole) // 2])
    again = features(student, coco_root, tmp_path)
    plain = features(student, coco_root).get(paths)
    assert all(torch.equal(a, b) for a, b in zip(again.get(paths), plain))
    assert again.computed == len(paths) and pack.read_bytes() == whole


def test_a_pack_appears_whole_or_not_at_all(student, coco_root, paths, tmp_path, monkeypatch):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("laid.models.feature_store.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        features(student, coco_root, tmp_path).get(paths)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_two_processes_see_each_others_packs(student, coco_root, paths, tmp_path):
    one, other = features(student, coco_root, tmp_path), features(student, coco_root, tmp_path)
    one.get(paths[:6])
    other.get(paths)
    assert other.computed == len(paths) - 6


def test_mistakes_are_said(student, tmp_path):
    model, processor = student
    with pytest.raises(LaidError, match="no vision tower inside"):
        FeatureStore(tmp_path, model.model.language_model, processor)
    with pytest.raises(LaidError, match="nowhere.png: cannot be read"):
        FeatureStore(tmp_path, model, processor).get([tmp_path / "nowhere.png"])
