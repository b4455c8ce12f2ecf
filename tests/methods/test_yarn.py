"""YaRN's frequencies against the closed form of its paper, on the published sizes and through a whole model."""

import math

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from laid.errors import LaidError
from laid.methods.yarn import apply_yarn
from laid.models.decoder import geometry
from tiny_vlm import prompt, tiny_model


def closed_form(dim, base, trained, factor, fast=32, slow=1):
    """Equation by equation from the YaRN paper: ramp over the number of turns a frequency makes while trained."""
    frequencies = []
    at = [dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow)]
    low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), dim - 1)
    for f in range(dim // 2):
        theta = base ** (-2 * f / dim)
        keep = 1 - min(max((f - low) / (high - low), 0), 1)
        frequencies.append(theta * keep + theta / factor * (1 - keep))
    return (low, high), torch.tensor(frequencies)


def published(heads=2):
    """A decoder of the published head geometry (head_dim 128, base 1e6, sections 16, 24, 24) and no size."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 8, "hidden_size": 128 * heads, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": heads, "num_key_value_heads": 1, "max_position_embeddings": 128_000,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1_000_000.0,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        }
    ).text_config  # fmt: skip
    return Qwen2_5_VLTextModel(config)


def test_published_models_ramp_23_to_40_time_kept_width_divided():
    model = published()
    trained = model.rotary_emb.inv_freq.clone()
    apply_yarn(model, 4, 32_768)
    got, axis = model.rotary_emb.inv_freq, geometry(model).axis_of_frequency()
    (low, high), expected = closed_form(128, 1e6, 32_768, 4)
    assert (low, high) == (23, 40)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    ratio = got / trained
    assert torch.equal(got[axis == 0], trained[axis == 0])
    torch.testing.assert_close(ratio[axis == 2], torch.full((24,), 0.25))
    height = ratio[axis == 1]
    assert height[0] == 1 and height[-1].item() == pytest.approx(0.29, abs=0.005)
    assert (height.diff() <= 0).all()
    assert model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("factor, trained", [(2, 64), (4, 256), (1, 64)])
def test_cos_and_sin_keep_the_sections_and_both_carry_the_factor(factor, trained):
    model = tiny_model(hidden=64, sections=(2, 3, 3))
    text = model.model.language_model
    apply_yarn(model, factor, trained)
    _, frequencies = closed_form(16, 1e4, trained, factor)
    _, positions, _ = prompt(model)
    cos, sin = text.rotary_emb(torch.zeros(1), positions)
    scale = 0.1 * math.log(factor) + 1
    for f, section in enumerate([0, 0, 1, 1, 1, 2, 2, 2]):
        angle = positions[section, 0] * frequencies[f]
        for dim in (f, f + 8):
            torch.testing.assert_close(cos[0, :, dim], angle.cos() * scale, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(sin[0, :, dim], angle.sin() * scale, rtol=1e-4, atol=1e-5)


def logits(model):
    ids, positions, _ = prompt(model)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("axes", ["all", "time", "image_base"])
def test_changes_the_model_can_be_removed_and_factor_1_is_the_identity(axes):
    model = tiny_model()
    plain = logits(model)
    with apply_yarn(model, 4, 16, axes=axes):
        assert (logits(model) - plain).abs().max() > 1e-3
    assert torch.equal(logits(model), plain)
    with apply_yarn(model, 1, 16, axes=axes):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)


def test_saved_checkpoint_carries_yarn(tmp_path):
    model = tiny_model()
    apply_yarn(model, 4, 16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    text = loaded.model.language_model
    assert (text.rotary_emb.rope_type, text.rotary_emb.mrope_section) == ("yarn", [1, 2, 1])
    torch.testing.assert_close(logits(loaded), logits(model))


def test_variants_change_only_what_they_say():
    model = tiny_model(hidden=64, sections=(2, 3, 3))
    text = model.model.language_model
    _, positions, starts = prompt(model)
    x = torch.zeros(1)
    trained = text.rotary_emb(x, positions)
    text_only = positions[0].expand(3, -1, -1)
    with apply_yarn(model, 4, 16):
        everything, on_text = text.rotary_emb(x, positions), text.rotary_emb(x, text_only)
    with apply_yarn(model, 4, 16, axes="time"):
        time = text.rotary_emb(x, positions)
    of_time = torch.tensor([True] * 2 + [False] * 6).repeat(2)
    for got, new, old in zip(time, everything, trained, strict=True):
        assert torch.equal(got[..., of_time], new[..., of_time])
        assert torch.equal(got[..., ~of_time], old[..., ~of_time])
    with apply_yarn(model, 4, 16, axes="image_base"):
        based, based_text = text.rotary_emb(x, positions), text.rotary_emb(x, text_only)
    scale = 0.1 * math.log(4) + 1
    for got, yarn in zip(based_text, on_text, strict=True):
        torch.testing.assert_close(got, yarn)  # text is turned as by plain YaRN
    # Within one image, relative angles are the trained ones: cos(a - b) from cos and sin of both tokens.
    a, b = starts[1] + 1, starts[1] + 6
    assert positions[0, 0, a] == positions[0, 0, b] and positions[1, 0, a] != positions[1, 0, b]

    def relative(turn):
        cos, sin = turn
        return cos[0, a] * cos[0, b] + sin[0, a] * sin[0, b]

    torch.testing.assert_close(relative(based) / scale**2, relative(trained), rtol=1e-4, atol=1e-4)
    assert (relative(everything) / scale**2 - relative(trained)).abs().max() > 0.01


def test_clear_errors():
    model = tiny_model()
    with pytest.raises(LaidError, match="factor is 0.5"):
        apply_yarn(model, 0.5, 16)
    with pytest.raises(LaidError, match="allowed: all, time, image_base"):
        apply_yarn(model, 2, 16, axes="text")
    with pytest.raises(LaidError, match="must be above 0"):
        apply_yarn(model, 2, 0)
    apply_yarn(model, 2, 16)
    with pytest.raises(LaidError, match="'yarn' already"):
        apply_yarn(model, 2, 16)
