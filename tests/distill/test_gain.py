"""The gain against scores written out by hand; folding against the hooked model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from laid.distill.gain import RopeGain, _Scale
from laid.errors import LaidError
from laid.models.capture import QKCapture
from laid.models.decoder import geometry, rotate
from tiny_vlm import prompt, tiny_config, tiny_model


def randomised(model, seed=3):
    gain = RopeGain(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gain.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return gain


def logits(model, mask=None, **kwargs):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, positions, _ = prompt(base)
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, **kwargs).logits


def test_starts_as_the_identity():
    model = tiny_model()
    plain = logits(model)
    gain = RopeGain(model).attach(model)
    assert torch.equal(logits(model), plain)
    gain.detach()
    assert torch.equal(logits(model), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sections_follow_the_rotary_embedding_of_transformers():
    """Moving only one axis's position must turn exactly the frequencies that axis_of_frequency gives to it."""
    model = tiny_model(hidden=64, sections=(2, 3, 3))
    rotary = model.model.language_model.rotary_emb
    axis = geometry(model).axis_of_frequency()
    for moved in range(3):
        position = torch.zeros(3, 1, 1)
        position[moved] = 1
        _, sin = rotary(torch.zeros(1), position)
        assert torch.equal(sin[0, 0] != 0, torch.cat((axis, axis)) == moved)


def test_scores_by_hand():
    """Pair f of a query head is scaled before rotation, so each frequency's part of the score is scaled after it."""
    model = tiny_model()
    gain = randomised(model)
    assert gain.log_gain.shape == (2, 4, 4)
    with QKCapture(model, 0) as capture:
        logits(model)
        bare = capture.take()[0]
    gain.attach(model)
    with QKCapture(model, 0) as capture:
        logits(model)
        scaled = capture.take()[0]
    q, k = bare.rotated()
    q_scaled, _ = scaled.rotated()
    for head in range(4):
        for a, b in ((0, 3), (9, 2)):
            expected = 0.0
            for f in range(4):
                part = (
                    q[0, head, a, f] * k[0, head // 2, b, f]
                    + q[0, head, a, f + 4] * k[0, head // 2, b, f + 4]
                )
                expected += torch.exp(gain.log_gain[0, head, f]).item() * part.item()
            got = (q_scaled[0, head, a] * k[0, head // 2, b]).sum().item()
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_commutes_with_rotation(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 3, 8, generator=g, dtype=torch.float64)
    gain = torch.rand(4, generator=g, dtype=torch.float64).repeat(2)
    angle = (torch.randn(1, 3, 4, generator=g, dtype=torch.float64) * 50).repeat(1, 1, 2)
    a = rotate(x * gain, angle.cos(), angle.sin())
    torch.testing.assert_close(a, rotate(x, angle.cos(), angle.sin()) * gain, rtol=1e-12, atol=1e-12)


def test_folding_equals_the_hooks():
    model = tiny_model(dtype=torch.float64)
    gain = randomised(model).double()
    plain = logits(model)
    gain.attach(model)
    hooked = logits(model)
    with pytest.raises(LaidError, match="attached"):
        gain.fold_(model)
    gain.detach()
    gain.fold_(model)
    torch.testing.assert_close(logits(model), hooked, rtol=1e-10, atol=1e-10)
    assert (hooked - plain).abs().max() > 1e-2


def test_folding_touches_q_proj_alone():
    model, other = tiny_model(), tiny_model()
    randomised(model).fold_(model)
    changed = {n for (n, p), q in zip(model.named_parameters(), other.parameters()) if not torch.equal(p, q)}
    assert changed == {
        f"model.language_model.layers.{n}.self_attn.q_proj.{x}" for n in (0, 1) for x in ("weight", "bias")
    }


def test_under_lora_with_checkpointing_then_merged_and_folded():
    torch.manual_seed(1)  # the adapter's own weights
    model = get_peft_model(
        tiny_model(dtype=torch.float64),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).double()
    gain = randomised(model).double().attach(model)
    hooked = logits(model)
    hooked.square().mean().backward()
    plain = {n: p.grad.clone() for n, p in gain.named_parameters()}
    gain.zero_grad()
    model.train()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    logits(model).square().mean().backward()
    for name, parameter in gain.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, plain[name])
    gain.detach()
    model.eval()
    with pytest.raises(LaidError, match="merge"):
        gain.fold_(model)
    merged = model.merge_and_unload()
    gain.fold_(merged)
    torch.testing.assert_close(logits(merged), hooked, rtol=1e-6, atol=1e-6)


def test_under_accelerate(accelerator):
    plain = tiny_model()
    gain = randomised(plain).attach(plain)
    hooked = logits(plain)
    gain.detach()
    prepared = accelerator("no").prepare(tiny_model())
    gain.attach(prepared)
    torch.testing.assert_close(logits(prepared), hooked)


def test_adapter_added_after_attaching_is_refused():
    model = tiny_model()
    RopeGain(model).attach(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(LaidError, match="add adapters first"):
        logits(adapted)


def test_compiled_after_attaching_is_the_same_and_compiled_before_is_refused():
    model = tiny_model(layers=1)
    gain = randomised(model).attach(model)
    ids, positions, _ = prompt(model)
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(ids),
        "position_ids": positions,
        "use_cache": False,
    }
    plain = model.model.language_model(**inputs).last_hidden_state
    compiled = torch.compile(model.model.language_model, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, plain)
    gain.detach()
    with pytest.raises(LaidError, match="compile after"):
        gain.attach(compiled)
    torch._dynamo.reset()


def test_a_capture_attached_first_still_sees_the_gain():
    model = tiny_model()
    gain = randomised(model)
    with QKCapture(model, 0) as capture:
        logits(model)
        bare = capture.take()[0].q
        gain.attach(model)
        logits(model)
        scaled = capture.take()[0].q
    factor = gain.gains()[0].repeat(1, 2)[None, :, None]
    torch.testing.assert_close(scaled, bare * factor)


@pytest.mark.parametrize("own", [1, 4])
def test_scaling_and_its_gradients(own):
    """By autograd of the formula, by differences, and in bfloat16; own = 1 where heads share one norm of their queries."""
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 5, 4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    log_gain = torch.randn(own, 3, generator=g, dtype=torch.float64, requires_grad=True)
    out, by_hand = _Scale.apply(queries, log_gain), queries * log_gain.exp()[None, None, :, None]
    torch.testing.assert_close(out, by_hand, rtol=1e-12, atol=0)
    seen = torch.randn(out.shape, generator=g, dtype=torch.float64)
    ours, plain = (torch.autograd.grad(x, (queries, log_gain), seen) for x in (out, by_hand))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(_Scale.apply, (queries, log_gain))
    half = _Scale.apply(queries.bfloat16(), log_gain)
    assert half.dtype == torch.bfloat16
    (rough,) = torch.autograd.grad(half, log_gain, seen.bfloat16())
    torch.testing.assert_close(rough, plain[1], rtol=0.03, atol=0.15)


def test_scaling_keeps_its_result_alone():
    """Until backward stay the scaled queries and the input of q_proj, which its weight's gradient needs; no factors."""
    model = tiny_model(layers=1)
    projection = model.model.language_model.layers[0].self_attn.q_proj
    gain = randomised(model).attach(model)
    hidden, kept = torch.randn(1, 40, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scaled = projection(hidden)
    large = [x.data_ptr() for x in kept if x.numel() >= 40 * 4 and x.shape[0] != 32]
    assert sorted(large) == sorted([hidden.data_ptr(), scaled.data_ptr()])
    scaled.sum().backward()
    assert gain.log_gain.grad[0].abs().min() > 0


def test_clear_errors():
    model = tiny_model()
    gain = RopeGain(model).attach(model)
    with pytest.raises(LaidError, match="attached already"):
        gain.attach(model)
    with pytest.raises(LaidError, match="made for"):
        RopeGain(tiny_config(layers=3)).attach(model)
    with pytest.raises(LaidError, match="adds up to 5, but head_dim 8 has 4"):
        RopeGain(tiny_config(sections=(1, 2, 2)))
