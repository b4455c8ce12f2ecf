"""Each family against transformers' own model of it: features, positions, logits, hooks, methods, training, export."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from laid.distill.gain import RopeGain
from laid.errors import LaidError
from laid.methods.self_extend import _cos_sin, apply_self_extend
from laid.methods.yarn import apply_yarn
from laid.models.capture import QKCapture
from laid.models.decoder import geometry, rotate
from laid.models.families import FAMILIES, family_of
from laid.models.forward import collate, generate, hidden_states, last_logits, logits_at
from laid.models.loading import empty_model, load_model
from laid.models.processing import Processor
from laid.models.prompts import EncodedPrompt, mrope_positions
from laid.toy.family import build_processor
from laid.training.recipe import Run
from laid.training.teacher_cache import build_cache
from tiny_vlm import IMAGE, prompt, tiny_config, tiny_model
from trainer_runs import Finished

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GRIDS = [((4, 4), (6, 4), (4, 2)), ((2, 2), (4, 6)), ((2, 8), (6, 2), (4, 4), (2, 2))]
SIZES = {"hidden": 64, "layers": 3, "sections": (4, 2, 2)}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tiny(request):
    return Tiny(request.param)


class Tiny:
    """A tiny model, three prompts with several images, their pixels, and what the library alone makes of them."""

    def __init__(self, name):
        self.name, self.model = name, tiny_model(family=name, **SIZES)
        self.family = family_of(self.model.config.text_config)
        patch = self.model.config.vision_config.patch_size
        generator = torch.Generator().manual_seed(5)
        self.prompts, self.inputs = [], []
        for number, grids in enumerate(GRIDS):
            ids, positions, starts = prompt(self.model, grids, between=0, tail=4 + number, seed=number)
            grid = torch.tensor([(1, h, w) for h, w in grids])
            pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * patch * patch, generator=generator)
            kinds = (ids == IMAGE).int()
            self.inputs.append(
                {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds,
                 "attention_mask": torch.ones_like(ids)}
            )  # fmt: skip
            own = EncodedPrompt(
                ids[0].numpy(), positions[:, 0].numpy(), np.array(starts), (ids[0] == IMAGE).numpy()
            )
            self.prompts.append(own)

    @torch.no_grad()
    def batch(self, *which):
        features = []
        for k in which:
            pixels, grid = self.inputs[k]["pixel_values"], self.inputs[k]["image_grid_thw"]
            features += self.family.image_features(self.model, pixels, grid)
        return collate([self.prompts[k] for k in which], features)

    @torch.no_grad()
    def theirs(self, k):
        return self.model(**self.inputs[k]).logits[0]


def test_positions_are_the_librarys(tiny):
    for own, grids in zip(tiny.prompts, GRIDS):
        merged = [(h // 2, w // 2) for h, w in grids]
        suffix = len(own.ids) - 2 - sum(h * w + 2 for h, w in merged)
        assert np.array_equal(mrope_positions(2, merged, suffix), own.positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_are_the_librarys(tiny, attention):
    """Whole, at chosen places, in batches of several lengths and numbers of images, and read piece by piece."""
    wanted = [tiny.theirs(k) for k in range(3)]
    tiny.model.set_attn_implementation(attention)
    try:
        last = torch.stack([logits[-1] for logits in wanted])
        assert last.std(0).max() > 0.1
        for chunk in (0, 1, 7, 13):
            torch.testing.assert_close(last_logits(tiny.model, tiny.batch(0, 1, 2), chunk), last, **CLOSE)
        torch.testing.assert_close(last_logits(tiny.model, tiny.batch(2, 0)), last[[2, 0]], **CLOSE)
        hidden = hidden_states(tiny.model, tiny.batch(0, 2))
        at = torch.arange(len(wanted[2]))
        torch.testing.assert_close(logits_at(tiny.model, hidden, torch.ones_like(at), at), wanted[2], **CLOSE)
    finally:
        tiny.model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_answers_are_the_librarys(tiny):
    for k in range(3):
        inputs = tiny.inputs[k]
        theirs = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=5)
        for chunk in (0, 11):
            ours = generate(tiny.model, tiny.batch(k), 5, [], chunk)
            assert ours == [theirs[0, inputs["input_ids"].shape[1] :].tolist()]


def test_every_kind_of_feature_matters(tiny):
    """Qwen3-VL's deeper features are as wide as the embeddings each; leaving them out changes the answer."""
    batch = tiny.batch(0)
    kinds = 3 if tiny.name == "qwen3_vl" else 1
    assert batch.features.shape == (12, 64 * kinds)
    with torch.no_grad():
        whole = last_logits(tiny.model, batch)
        for kind in range(kinds):
            less = copy.copy(batch)
            less.features = batch.features.clone()
            less.features[:, 64 * kind : 64 * (kind + 1)] = 0
            assert (last_logits(tiny.model, less) - whole).abs().max() > 1e-2


def test_axes_follow_the_rotary_embedding(tiny):
    """Moving one axis's position turns exactly the frequencies that are said to be its own."""
    axis = geometry(tiny.model).axis_of_frequency()
    assert [int((axis == a).sum()) for a in range(3)] == [4, 2, 2]
    for moved in range(3):
        position = torch.zeros(3, 1, 1)
        position[moved] = 1
        _, sin = tiny.model.model.language_model.rotary_emb(torch.zeros(1), position)
        assert torch.equal(sin[0, 0] != 0, torch.cat((axis, axis)) == moved)


def test_published_sections_by_hand():
    """Qwen3-VL's [24, 20, 20]: turn about up to frequency 59, then time; Qwen2.5-VL's [16, 24, 24]: one after another."""
    three = FAMILIES["qwen3_vl"].axis_of_frequency((24, 20, 20)).tolist()
    assert three == [0, 1, 2] * 20 + [0] * 4
    for name in ("qwen2_vl", "qwen2_5_vl"):
        assert FAMILIES[name].axis_of_frequency((16, 24, 24)).tolist() == [0] * 16 + [1] * 24 + [2] * 24


@torch.no_grad()
def test_caught_queries_and_keys_are_those_of_the_attention(tiny, monkeypatch):
    """What the library's attention function is handed, layer by layer, is what capture gives after rotation."""
    seen = {}
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen[len(seen)] = (query, key)
        return plain(query, key, *args, **kwargs)

    batch = tiny.batch(1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with QKCapture(tiny.model, range(3)) as capture:
        hidden_states(tiny.model, batch)
        caught = capture.take()
    assert list(caught) == list(seen) == [0, 1, 2]
    for layer, qk in caught.items():
        q, k = qk.rotated()
        torch.testing.assert_close(q, seen[layer][0], **CLOSE)
        torch.testing.assert_close(k, seen[layer][1][:, :: seen[layer][1].shape[1] // k.shape[1]], **CLOSE)


@torch.no_grad()
def test_a_gain_scales_scores_and_folds_exactly(tiny):
    model = copy.deepcopy(tiny.model)
    gain = RopeGain(model)
    assert gain.log_gain.shape[1] == (1 if tiny.name == "qwen3_vl" else 4)
    gain.log_gain.copy_(0.5 * torch.randn(gain.log_gain.shape, generator=torch.Generator().manual_seed(1)))
    batch = tiny.batch(0, 2)
    plain = last_logits(model, batch)
    with QKCapture(model, 0) as capture:
        hidden_states(model, batch)
        before = capture.take()[0].q
        gain.attach(model)
        hidden_states(model, batch)
        after = capture.take()[0].q
    factor = gain.gains()[0]  # (heads, frequencies)
    torch.testing.assert_close(after, before * torch.cat((factor, factor), -1)[None, :, None], **CLOSE)
    hooked = last_logits(model, batch)
    assert (hooked - plain).abs().max() > 1e-2
    gain.detach()
    gain.fold_(model)
    torch.testing.assert_close(last_logits(model, batch), hooked, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_self_extend_with_one_group_is_the_identity(tiny, attention):
    """One group: the same bits. Two groups and a short window: other answers, alike in pieces."""
    tiny.model.set_attn_implementation(attention)
    try:
        batch = tiny.batch(2)
        plain = last_logits(tiny.model, batch)
        with apply_self_extend(tiny.model, 1, 8):
            assert torch.equal(last_logits(tiny.model, batch), plain)
        with apply_self_extend(tiny.model, 3, 4):
            far = last_logits(tiny.model, batch)
            torch.testing.assert_close(last_logits(tiny.model, batch, 7), far, **CLOSE)
        assert (far - plain).abs().max() > 1e-2
        assert torch.equal(last_logits(tiny.model, batch), plain)
    finally:
        tiny.model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_self_extend_turns_each_frequency_by_its_own_axis(tiny):
    """Turned on from where it is, a key lies where the library's own rotation to the merged position puts it."""
    at = tiny.batch(2).positions
    rotary, axis = tiny.model.model.language_model.rotary_emb, geometry(tiny.model).axis_of_frequency()
    key = torch.randn(1, 2, at.shape[-1], 16, generator=torch.Generator().manual_seed(0))
    here = rotate(key, *rotary(key, at))
    turned = rotate(here, *_cos_sin(at // 3 - at, axis, rotary.inv_freq))
    torch.testing.assert_close(turned, rotate(key, *rotary(key, at // 3)), **CLOSE)


@pytest.mark.parametrize("axes", ["all", "time", "image_base"])
@torch.no_grad()
def test_yarn_takes_effect_and_is_taken_off(tiny, axes, tmp_path):
    batch = tiny.batch(1)
    plain = last_logits(tiny.model, batch)
    with apply_yarn(tiny.model, 4.0, 16, axes):
        changed = last_logits(tiny.model, batch)
        if axes == "all":  # the library's own, so that a saved checkpoint carries it
            torch.testing.assert_close(tiny.theirs(1)[-1], changed[0], **CLOSE)
            tiny.model.save_pretrained(tmp_path / "yarn")
            again = AutoModelForImageTextToText.from_pretrained(tmp_path / "yarn").eval()
            torch.testing.assert_close(again(**tiny.inputs[1]).logits[0, -1], changed[0], **CLOSE)
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(last_logits(tiny.model, batch), plain)


# ------------------------------------------------------------------ from files, through training, to files


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def other(request, coco_root, tmp_path_factory):
    """(family's name, checkpoint folders of a teacher and a student)."""
    from laid.data.coco import load_coco

    name, root = request.param, tmp_path_factory.mktemp(request.param)
    patch = 16 if name == "qwen3_vl" else 14
    processor = build_processor(load_coco(coco_root, "train2017").categories, (2 * patch) ** 2)
    processor.image_processor.patch_size = patch
    tokenizer, encoder = processor.tokenizer, processor.encoder
    ids = {"image_token_id": encoder.pad_id, "vision_start_token_id": encoder.start_id}
    ids |= {"vision_end_token_id": encoder.end_id, "tie_word_embeddings": name == "qwen3_vl"}
    ids["video_token_id"] = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    for role, hidden, heads in (("teacher", 64, 4), ("student", 32, 2)):
        model = tiny_model(
            seed=heads, scale=0.25, family=name, hidden=hidden, heads=heads, kv_heads=heads // 2, layers=2,
            sections=(4, 2, 2), ids=ids, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model.save_pretrained(root / role)
        processor.save(root / role)
    return name, root


@pytest.fixture(scope="module")
def cache(other, micro, coco_root, haystacks):
    build_cache(micro, other[1] / "teacher", coco_root, haystacks / "train.json", other[1] / "cache")
    return other[1] / "cache"


def run_of(other, cache, micro, method, coco_root, haystacks, out):
    student, questions = other[1] / "student", haystacks / "train.json"
    return Run(
        micro.changed({"training": {"epochs": 1}}),
        method,
        0,
        "student",
        student,
        coco_root,
        questions,
        out,
        cache,
    )


@pytest.mark.parametrize("method", ["laid", "laid_wo_laid"])
def test_a_student_is_trained_and_reloads(other, cache, micro, coco_root, haystacks, tmp_path, method):
    """The gain is learned and folded, and transformers reads what was written."""
    out = tmp_path / "seed0"
    run = Finished(run_of(other, cache, micro, method, coco_root, haystacks, out))
    features = run.t.data.features.get(run.t.data.samples[0].paths)
    assert features[0].shape == (1, 32 * (3 if other[0] == "qwen3_vl" else 1))
    assert len(run.log) == 3
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in run.log)
    assert run.log[-1]["gain_max"] > run.log[-1]["gain_min"] > 0
    again = AutoModelForImageTextToText.from_pretrained(out / "model").eval()
    assert again.config.model_type == other[0]
    with torch.no_grad():
        torch.testing.assert_close(last_logits(again, run.inputs), run.logits, **CLOSE)
    assert (run.logits - run.before).abs().max() > 1e-2
    assert Processor.load(out / "model").image_processor.patch_size == (16 if other[0] == "qwen3_vl" else 14)


# ------------------------------------------------------------------ what is refused


def test_another_family_is_named_beside_those_that_are_taken(family, tmp_path):
    for config, wrong in (
        (
            {"model_type": "internvl"},
            "'internvl' is not supported; supported: qwen2_5_vl, qwen2_vl, qwen3_vl",
        ),
        ({"model_type": "no-such-thing"}, "'no-such-thing' is not supported"),
        ({"architectures": ["X"]}, "'None' is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for load in (load_model, empty_model, Processor.load):
            with pytest.raises(LaidError, match=wrong) as caught:
                load(tmp_path)
            assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)
    with pytest.raises(LaidError, match="sliding-window layers"):
        tiny_config(use_sliding_window=True, sliding_window=4, max_window_layers=1).save_pretrained(tmp_path)
        load_model(tmp_path)
