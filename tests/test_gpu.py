"""What a GPU alone can show; skipped without one: `pytest -m gpu`, within minutes on any.

The same small models on CUDA as on the CPU, and torch's half-precision kernels against plain arithmetic in float32.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from laid.data.questions import haystack_file, read_questions
from laid.evaluation.evaluate import Evaluator
from laid.methods.merged_attention import Regrouping, grouped_attention
from laid.methods.registry import load_run, load_with_method
from laid.models.attention import attention, fused
from laid.models.forward import hidden_states, last_logits
from laid.plan.steps import meta_batch
from laid.training import engine, recipe
from tiny_vlm import tiny_model
from trainer_runs import changed

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
HALF = {"rtol": 2e-2, "atol": 2e-2}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [1, 100, 300])
def test_causal_means_the_lower_right(dtype, queries):
    """The kernel's own alignment, its log-sum-exp, and keys shared by query heads."""
    q, k, v = random(2, 8, queries, 64), random(2, 2, 300, 64, seed=1), random(2, 2, 300, 64, seed=2)
    seen = torch.ones(queries, 300, dtype=torch.bool).tril(300 - queries)
    found, lse = fused(*(x.to(DEVICE, dtype) for x in (q, k, v)), 0.125, causal=queries > 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.125, enable_gqa=True)
    scores = 0.125 * q @ k.repeat_interleave(4, 1).transpose(-1, -2)
    close = HALF if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found.float().cpu(), expected, **close)
    torch.testing.assert_close(
        lse.float().cpu(), scores.masked_fill(~seen, -torch.inf).logsumexp(-1), **close
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("past", [0, 2500, 3999])
def test_self_extend_fused_is_brute_force_and_never_waits(past, dtype):
    """4,000 tokens in images of 300: the fused path on the GPU, where a wait is an error, against one softmax on the CPU."""
    tokens, dim = 4000, 64
    at = (torch.arange(tokens) // 300 * 20)[None]
    q, k, v = random(1, 8, tokens, dim), random(1, 2, tokens, dim, seed=1), random(1, 2, tokens, dim, seed=2)
    angle = random(1, tokens, dim // 2, seed=3).repeat(1, 1, 2)

    def attend(device, dtype, **how):
        turn = (angle.cos().to(device), angle.sin().to(device))
        base, own = at.to(device), tuple(x[:, past:] for x in turn)
        regrouping = Regrouping(60, base[:, past:], base, own, turn, **how)
        tensors = [x.to(device, dtype) for x in (q[:, :, past:], k, v)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if how else "default")
        try:
            return grouped_attention(*tensors, None, regrouping, dim**-0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    found = attend(DEVICE, dtype, fuse=True, insist=True)
    expected = attend("cpu", torch.float32)
    torch.testing.assert_close(found.float().cpu(), expected, **HALF)


def test_packed_prompts_in_one_kernel_are_prompts_alone():
    """Forward and backward of flash's variable-length form in bfloat16 against a call a prompt on the CPU in float32."""
    lengths, tokens, found = (300, 41, 1000), 1341, []
    ends = torch.tensor([0, 300, 341, 1341], dtype=torch.int32)
    for device, dtype in ((DEVICE, torch.bfloat16), ("cpu", torch.float32)):
        tensors = [random(1, heads, tokens, 64, seed=seed) for seed, heads in enumerate((8, 2, 2))]
        q, k, v = (x.to(device, dtype).requires_grad_() for x in tensors)
        packed = (lengths, ends.to(device), [])
        layer = SimpleNamespace(num_key_value_groups=4, is_causal=True)
        out, _ = attention(layer, q, k, v, None, laid_packed=packed, scaling=0.125)
        (out.float() * random(*out.shape, seed=9).to(device)).sum().backward()
        found.append([x.float().cpu() for x in (out, q.grad, k.grad, v.grad)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@torch.no_grad()
def test_a_prompt_in_chunks_is_the_prompt_whole():
    model = tiny_model(hidden=128, heads=4, sections=(4, 6, 6), dtype=torch.bfloat16, scale=0.05).to(DEVICE)
    batch = meta_batch(model.config, 1, 600, 0, torch.bfloat16, DEVICE)
    batch.ids.random_(1, 50)
    whole = model.get_output_embeddings()(hidden_states(model, batch)[:, -1])
    torch.testing.assert_close(last_logits(model, batch, 128), whole, **HALF)


@pytest.mark.parametrize("method", ["base", "yarn", "self_extend"])
def test_the_small_scale_answers_as_on_a_cpu(micro, family, coco_root, haystacks, method):
    """Every answer that is no tie, whole and in chunks, by logits."""
    questions = [q for size in (1, 5) for q in read_questions(haystack_file(haystacks / "test", size))]
    found = []
    for device, chunk in (("cpu", 0), (DEVICE, 0), (DEVICE, 13)):
        config = micro.changed({"evaluation": {"chunk_tokens": chunk}})
        loaded = load_with_method(config, method, family["small"], None, device)
        one = Evaluator(loaded, coco_root, config.evaluation)
        found.append([a["p_yes"] for a in one.answer(one.ask(questions))])
    for theirs in found[1:]:
        assert theirs == pytest.approx(found[0], abs=2e-3)
        assert all((a > 0.5) == (b > 0.5) for a, b in zip(found[0], theirs) if abs(a - 0.5) > 2e-3)


@pytest.mark.parametrize("method", ["laid", "laid_plus"])
def test_a_training_is_the_cpus_packed_or_not(micro, start, tmp_path, method):
    """Losses of every step within half a percent, and the exported student read back."""
    logs = []
    for name, device, tokens in (("cpu", "cpu", 0), ("gpu", DEVICE, 0), ("packed", DEVICE, 400)):
        config = changed(micro, {"per_device_batch": 1, "tokens_per_pass": tokens})
        run = start(config, method, tmp_path / name / "seed0")
        recipe.train(run, engine.start(run.settings.training, device))
        lines = (run.out / "log.jsonl").read_text().splitlines()
        logs.append([float(line.split('"loss": ')[1].split(",")[0].rstrip("}")) for line in lines])
        load_run(run.out / "model", run.student, torch.float32, "sdpa", device)
    for log in logs[1:]:
        assert log == pytest.approx(logs[0], rel=5e-3)


def test_a_stopped_training_goes_on(micro, start, tmp_path, monkeypatch):
    config = changed(micro, {"checkpoint_minutes": 1e-9, "dtype": "bfloat16", "tokens_per_pass": 400})
    step, made = recipe.training_step, []

    def once(t, indices, number):
        made.append(number)
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        return step(t, indices, number)

    monkeypatch.setattr(recipe, "training_step", once)
    run = start(config, "laid", tmp_path / "seed0")
    with pytest.raises(KeyboardInterrupt):
        recipe.train(run, engine.start(config.training, DEVICE))
    recipe.train(run, engine.start(config.training, DEVICE))
    assert made == [0, 1, 2, *range(2, made[-1] + 1)] and (run.out / "model").is_dir()
