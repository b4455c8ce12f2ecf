"""Captured Q and K against a forward pass written out by hand, and under every wrapper a trainer may use."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from laid.errors import LaidError
from laid.models.capture import QKCapture
from tiny_vlm import prompt, tiny_model


def run(model, **kwargs):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, positions, _ = prompt(base)
    return model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs)


def by_hand(model, layer):
    """Q, K of `layer` from its input hidden states, without hooks."""
    ids, positions, _ = prompt(model)
    text = model.model.language_model
    hidden = text(
        inputs_embeds=text.embed_tokens(ids),
        position_ids=positions,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[layer]
    hidden = text.layers[layer].input_layernorm(hidden)
    attention = text.layers[layer].self_attn
    heads = [
        (hidden @ p.weight.T + p.bias).view(1, ids.shape[1], -1, attention.head_dim).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj)
    ]
    return heads, text.rotary_emb(hidden, positions)


@pytest.mark.parametrize("layer", [0, 1])
def test_equals_projection_by_hand_before_and_after_rotation(layer):
    model = tiny_model()
    with QKCapture(model, [layer - 2]) as capture:
        run(model)
        caught = capture.take()
    assert list(caught) == [layer]
    (q, k), (cos, sin) = by_hand(model, layer)
    torch.testing.assert_close(caught[layer].q, q)
    torch.testing.assert_close(caught[layer].k, k)
    for mine, upstream in zip(caught[layer].rotated(), apply_rotary_pos_emb(q, k, cos, sin)):
        torch.testing.assert_close(mine, upstream)


def gradients(model, **kwargs):
    model.zero_grad()
    with QKCapture(model, [0, -1]) as capture:
        logits = run(model, **kwargs).logits
        caught = capture.take()
        loss = logits.square().mean() + sum((x.q**2).sum() + (x.k**3).sum() for x in caught.values())
        loss.backward()
        with pytest.raises(LaidError, match="no queries and keys"):
            capture.take()  # recomputation in backward left nothing behind
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_under_gradient_checkpointing():
    model = tiny_model().train()
    plain_loss, plain = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss, checkpointed = gradients(model)
    assert torch.equal(loss, plain_loss)
    assert plain.keys() == checkpointed.keys() and any("k_proj" in n for n in plain)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_reentrant_checkpointing_is_refused():
    model = tiny_model().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with QKCapture(model, -1), pytest.raises(LaidError, match="use_reentrant"):
        run(model)


def lora(model):
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    )
    return adapted


def test_sees_the_adapter_and_equals_the_merged_model():
    model = lora(tiny_model()).eval()
    with QKCapture(model, -1) as capture:
        run(model)
        adapted = capture.take()[1]
        with model.disable_adapter():
            run(model)
            bare = capture.take()[1]
    merged = model.merge_and_unload()
    with QKCapture(merged, -1) as capture:
        run(merged)
        plain = capture.take()[1]
    torch.testing.assert_close(adapted.q, plain.q, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapted.k, plain.k, atol=1e-4, rtol=1e-4)
    assert (adapted.q - bare.q).abs().max() > 0.01


def test_adapter_added_after_attaching_is_refused():
    model = tiny_model()
    with QKCapture(model, -1):
        adapted = lora(model)
        with pytest.raises(LaidError, match="attach"):
            run(adapted)


def test_under_accelerate(accelerator):
    model = tiny_model()
    with QKCapture(model, -1) as capture:
        run(model)
        plain = capture.take()[1].q
    prepared = accelerator("bf16").prepare(tiny_model())
    with QKCapture(prepared, -1) as capture:
        run(prepared)
        wrapped = capture.take()[1].q
    assert wrapped.dtype == torch.bfloat16
    torch.testing.assert_close(wrapped.float(), plain, atol=0.15, rtol=0.1)


def test_compiled_after_attaching_gives_the_same_and_compiled_before_says_so():
    model = tiny_model(layers=1)
    with QKCapture(model, -1) as capture:
        run(model)
        plain = capture.take()[0]
        compiled = torch.compile(model.model.language_model, backend="aot_eager")
        ids, positions, _ = prompt(model)
        embeds = model.get_input_embeddings()(ids)
        compiled(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        torch.testing.assert_close(capture.take()[0].q, plain.q)
    torch._dynamo.reset()
    early = torch.compile(model.model.language_model, backend="aot_eager")
    with pytest.raises(LaidError, match="compile after"):
        QKCapture(early, -1)
    early(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    with QKCapture(
        model, -1
    ) as capture:  # the plain model is handed in: hooks may be left out of the traced graph
        early(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        try:
            late = capture.take()[0].q
        except LaidError as error:
            assert "before compiling" in str(error)
        else:
            torch.testing.assert_close(late, plain.q)
    torch._dynamo.reset()


def test_hooks_change_nothing_and_leave_nothing():
    model = tiny_model()
    before = run(model).logits
    capture = QKCapture(model, [0, 1]).attach()
    assert torch.equal(run(model).logits, before)
    with pytest.raises(LaidError, match="attached already"):
        capture.attach()
    capture.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layers, words", [([2], "2 layers"), ([-3], "-3"), ([], "no layer")])
def test_wrong_layers(layers, words):
    with pytest.raises(LaidError, match=words):
        QKCapture(tiny_model(), layers)


def test_no_language_model():
    with pytest.raises(LaidError, match="0 language models"):
        QKCapture(torch.nn.Linear(2, 2), -1)
