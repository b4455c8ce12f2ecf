"""The gain against scores written out by hand; folding against the hooked model."""

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from laid.distill.gain import RopeGain, _Scale, visible_keys
from laid.errors import LaidError
from laid.models.capture import QKCapture
from laid.models.decoder import geometry, rotate
from tiny_vlm import prompt, tiny_config, tiny_model


def randomised(model, seed=3, **kwargs):
    gain = RopeGain(model, **kwargs)
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
    gain = RopeGain(model, length_aware=True).attach(model)
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
    gain = randomised(model, length_aware=True, reference=8).double().attach(model)
    hooked = logits(model)
    with QKCapture(model, 0) as capture:
        logits(model)
        queries = capture.take()[0].q
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
        gain.fold_(model, tokens=8)
    merged = model.merge_and_unload()
    gain.fold_(merged, tokens=12)  # exact for the query that sees so many keys
    with QKCapture(merged, 0) as capture:
        logits(merged)
        folded = capture.take()[0].q
    torch.testing.assert_close(folded[:, :, 11], queries[:, :, 11], rtol=1e-6, atol=1e-6)
    assert (folded[:, :, 20] - queries[:, :, 20]).abs().max() > 1e-3


def test_two_forwards_before_one_backward_keep_their_own_counts_under_checkpointing():
    def grads(checkpointed):
        model = tiny_model().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        gain = randomised(model, length_aware=True, reference=8).attach(model)
        ids = torch.arange(1, 25).view(2, 12)
        masks = [torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)]
        masks[1][0, :5] = 0
        loss = sum(
            model(input_ids=ids, attention_mask=m, use_cache=False).logits[:, -1].square().mean()
            for m in masks
        )
        loss.backward()
        return gain.exponent.grad

    torch.testing.assert_close(grads(True), grads(False))


@pytest.fixture
def accelerator():
    """Its settings are the process's, so they are taken back for the tests that follow."""
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_under_accelerate(accelerator):
    plain = tiny_model()
    gain = randomised(plain, length_aware=True, reference=8).attach(plain)
    hooked = logits(plain)
    gain.detach()
    prepared = accelerator.prepare(tiny_model())
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
    gain = randomised(model, length_aware=True, reference=8).attach(model)
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


def test_length_factor_by_hand():
    gain = RopeGain(tiny_config(), length_aware=True, reference=40, exponent=0.3)
    with torch.no_grad():
        gain.exponent[0, 1] = -0.5
    factor = gain.length_factor(torch.tensor([40, 10, 160]))[0]
    assert factor[:, 0].tolist() == pytest.approx([1, 0.25**0.3, 4**0.3], rel=1e-5)
    assert factor[:, 1].tolist() == pytest.approx([1, 2, 0.5], rel=1e-5)


def test_visible_keys():
    assert visible_keys(None, 3, 4).tolist() == [[5, 6, 7]]
    two = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert visible_keys(two, 5).tolist() == [[0, 0, 1, 2, 3], [1, 2, 3, 4, 4]]
    assert visible_keys(two, 2, 3).tolist() == [[2, 3], [4, 4]]
    four = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])[None, None]
    assert visible_keys(four, 3).tolist() == [[1, 2, 2]]
    additive = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    assert visible_keys(additive, 3).tolist() == [[1, 2, 2]]


def padded_batch():
    ids = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    return ids, mask


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


def test_decoding_from_a_cache_equals_one_pass_at_training_time():
    model = tiny_model()
    randomised(model, length_aware=True, reference=8).attach(model)
    ids, mask = padded_batch()
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
    last = model(input_ids=ids[:, 11:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("own", [1, 4])
@pytest.mark.parametrize("length_aware", [True, False])
def test_scaling_and_its_gradients(own, length_aware):
    """By autograd of the formula, by differences, and in bfloat16; own = 1 where heads share one norm of their queries."""
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 5, 4, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    log_gain = torch.randn(own, 3, generator=g, dtype=torch.float64, requires_grad=True)
    exponent = torch.randn(4, generator=g, dtype=torch.float64, requires_grad=True) if length_aware else None
    logs = torch.randn(1, 5, generator=g, dtype=torch.float64) if length_aware else None
    learned = [x for x in (queries, log_gain, exponent) if x is not None]
    out = _Scale.apply(queries, log_gain, exponent, logs)
    factor = log_gain.exp()[None, None, :, None]
    if length_aware:
        factor = factor * (logs.exp()[:, :, None] ** exponent)[..., None, None]
    torch.testing.assert_close(out, queries * factor, rtol=1e-12, atol=0)
    seen = torch.randn(out.shape, generator=g, dtype=torch.float64)
    ours, plain = (torch.autograd.grad(x, learned, seen) for x in (out, queries * factor))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *x: _Scale.apply(x[0], x[1], *(x[2:] or (None,)), logs), learned)
    half = _Scale.apply(queries.bfloat16(), log_gain, exponent, logs)
    assert half.dtype == torch.bfloat16
    rough = torch.autograd.grad(half, learned[1:], seen.bfloat16())
    for a, b in zip(rough, plain[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.15)


def test_scaling_keeps_its_result_alone():
    """Until backward stay the scaled queries and the input of q_proj, which its weight's gradient needs; no factors."""
    model = tiny_model(layers=1)
    projection = model.model.language_model.layers[0].self_attn.q_proj
    gain = randomised(model, length_aware=True, reference=8).attach(model)
    gain._counts[0] = torch.arange(1, 41)[None]
    hidden, kept = torch.randn(1, 40, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scaled = projection(hidden)
    large = [x.data_ptr() for x in kept if x.numel() >= 40 * 4 and x.shape[0] != 32]
    assert sorted(large) == sorted([hidden.data_ptr(), scaled.data_ptr()])
    scaled.sum().backward()
    assert gain.exponent.grad.abs().min() > 0


def test_fold_for_one_length_is_exact_there():
    model = tiny_model()
    gain = randomised(model, length_aware=True, reference=8).attach(model)
    with QKCapture(model, 0) as capture:
        logits(model)
        hooked = capture.take()[0].q
    gain.detach()
    gain.fold_(model, tokens=6)
    with QKCapture(model, 0) as capture:
        logits(model)
        folded = capture.take()[0].q
    torch.testing.assert_close(folded[:, :, 5], hooked[:, :, 5], rtol=1e-5, atol=1e-5)
    assert (folded[:, :, 12] - hooked[:, :, 12]).abs().max() > 1e-3


def test_clear_errors():
    model = tiny_model()
    with pytest.raises(LaidError, match="reference is 0"):
        RopeGain(model, reference=0)
    gain = RopeGain(model, length_aware=True).attach(model)
    with pytest.raises(LaidError, match="attached already"):
        gain.attach(model)
    with pytest.raises(LaidError, match="made for"):
        RopeGain(tiny_config(layers=3)).attach(model)
    gain.detach()
    with pytest.raises(LaidError, match="one length"):
        gain.fold_(model)
    with pytest.raises(LaidError, match="adds up to 5, but head_dim 8 has 4"):
        RopeGain(tiny_config(sections=(1, 2, 2)))
