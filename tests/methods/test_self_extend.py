"""SelfExtend against an attention computed pair by pair from unrotated queries and keys, and its promises."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from laid.errors import LaidError
from laid.methods.merged_attention import Regrouping, grouped_attention
from laid.methods.self_extend import apply_self_extend
from laid.models.attention import cache_for
from laid.models.capture import QKCapture
from tiny_vlm import prompt, tiny_model

MODEL = tiny_model(dtype=torch.float64)
SECTIONS = [0, 1, 1, 2]


def pair_positions(p_q, p_k, group, window, axes, image_key):
    """Positions (time, height, width) of one query and one key, by the definition: near as they are, far merged."""
    near = p_q[0] - p_k[0] < window or (axes == "text" and image_key)
    if near:
        return p_q, p_k
    shift = window - window // group
    if axes == "image_base":
        return (
            [p_q[0] // group + shift + p - p_q[0] for p in p_q],
            [p_k[0] // group + p - p_k[0] for p in p_k],
        )
    return [p // group + shift for p in p_q], [p // group for p in p_k]


def brute_force(q, k, v, positions, images, group, window, axes, allowed=None):
    """(heads, tokens, head_dim) for one sequence, one pair at a time. q, k unrotated."""
    heads, tokens, dim = q.shape
    half = dim // 2
    out = torch.zeros_like(q)
    for h in range(heads):
        for i in range(tokens):
            scores = []
            for j in range(i + 1):
                if allowed is not None and not allowed[j]:
                    scores.append(-math.inf)
                    continue
                at_q, at_k = pair_positions(
                    positions[:, i].tolist(), positions[:, j].tolist(), group, window, axes, images[j]
                )
                score = 0.0
                for f in range(half):
                    turn = (at_q[SECTIONS[f]] - at_k[SECTIONS[f]]) * 10000.0 ** (-2 * f / dim)
                    a, b = q[h, i, f].item(), q[h, i, f + half].item()
                    c, d = k[h // 2, j, f].item(), k[h // 2, j, f + half].item()
                    score += (a * c + b * d) * math.cos(turn) + (a * d - b * c) * -math.sin(-turn)
                scores.append(score / math.sqrt(dim))
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            out[h, i] = weights @ v[h // 2, : i + 1]
    return out


class Inside:
    """Values and attention outputs (before o_proj) of every layer of one forward."""

    def __init__(self, model):
        self.v, self.out, self.handles = [], [], []
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            self.handles += [
                attention.v_proj.register_forward_hook(lambda _m, _a, out: self.v.append(self.heads(out))),
                attention.o_proj.register_forward_pre_hook(
                    lambda _m, args: self.out.append(self.heads(args[0]))
                ),
            ]

    @staticmethod
    def heads(x):
        return x.view(*x.shape[:2], -1, 8).transpose(1, 2)

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def check_against_brute_force(ids, positions, mask, group, window, axes, **options):
    with apply_self_extend(MODEL, group, window, axes, **options), QKCapture(MODEL, [0, 1]) as capture:
        with Inside(MODEL) as inside:
            MODEL(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        caught = capture.take()
    images = ids == 60
    for b in range(ids.shape[0]):
        real = torch.ones(ids.shape[1], dtype=torch.bool) if mask is None else mask[b].bool()
        for layer in range(2):
            expected = brute_force(
                caught[layer].q[b], caught[layer].k[b], inside.v[layer][b], positions[:, b], images[b], group, window,
                axes, real,
            )  # fmt: skip
            torch.testing.assert_close(inside.out[layer][b][:, real], expected[:, real], rtol=1e-5, atol=1e-5)


def two_with_padding():
    """A batch of two layouts, the first padded on the left, with its positions."""
    a, at_a, _ = prompt(MODEL, grids=((4, 4),), lead=2, tail=3)
    b, at_b, _ = prompt(MODEL, grids=((4, 6), (4, 4)), lead=1, tail=2, seed=1)
    pad = b.shape[1] - a.shape[1]
    ids = torch.cat((torch.nn.functional.pad(a, (pad, 0)), b))
    positions = torch.cat((torch.nn.functional.pad(at_a, (pad, 0)), at_b), dim=1)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return ids, positions, mask


@pytest.mark.parametrize(
    "axes, backend",
    [
        ("all", "blocks"),
        ("all", "flash"),
        ("image_base", "blocks"),
        ("image_base", "flash"),
        ("text", "auto"),
    ],
)
@pytest.mark.parametrize("group, window", [(2, 4), (3, 5)])
def test_against_brute_force_with_images(group, window, axes, backend):
    ids, positions, _ = prompt(MODEL, grids=((4, 4), (6, 4)), tail=3)
    check_against_brute_force(ids, positions, None, group, window, axes, backend=backend)


def test_against_brute_force_in_small_blocks():
    ids, positions, _ = prompt(MODEL, grids=((4, 4), (6, 4)), tail=3)
    check_against_brute_force(ids, positions, None, 2, 4, "all", block_elements=250, backend="blocks")


@pytest.mark.parametrize("backend", ["blocks", "flash"])
def test_against_brute_force_with_two_layouts_padded_at_the_right(backend):
    """Padding at the right is seen by no real token, so no mask is passed; positions of the padding stay put."""
    ids, positions, mask = two_with_padding()
    pad = int((mask[0] == 0).sum())
    ids[0], positions[:, 0] = ids[0].roll(-pad), positions[:, 0].roll(-pad, dims=-1)
    positions[:, 0, -pad:] = positions[:, 0, -pad - 1, None]
    ids[0, -pad:] = 0
    check_against_brute_force(ids, positions, None, 2, 3, "all", backend=backend)


@pytest.mark.parametrize("axes", ["all", "text"])
def test_against_brute_force_in_a_padded_batch(axes):
    check_against_brute_force(*two_with_padding(), 2, 3, axes)


def logits(model, **kwargs):
    ids, positions, _ = prompt(model, grids=((4, 4), (6, 4), (4, 2)), tail=6)
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions, **{"use_cache": False, **kwargs}).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_identity_bit_for_bit_at_group_1_and_below_the_window(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    plain = logits(model)
    span = int(prompt(model, grids=((4, 4), (6, 4), (4, 2)), tail=6)[1].max()) + 1
    with apply_self_extend(model, 1, 3):
        assert torch.equal(logits(model), plain)
    with apply_self_extend(model, 4, span):
        assert torch.equal(logits(model), plain)
    with apply_self_extend(model, 4, 3):
        assert (logits(model) - plain).abs().max() > 1e-3
    assert model.model.language_model.config._attn_implementation == attention
    assert torch.equal(logits(model), plain)


def test_identity_starts_exactly_at_the_largest_distance():
    model = tiny_model()
    ids = torch.randint(1, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with apply_self_extend(model, 4, 12):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with apply_self_extend(model, 4, 10):  # (11, 0) is the one pair whose distance changes, from 11 to 10
            changed = model(input_ids=ids).logits
    torch.testing.assert_close(changed[:, :11], plain[:, :11], rtol=1e-4, atol=1e-4)
    assert (changed[:, 11] - plain[:, 11]).abs().max() > 1e-4
    # From position 3 on, (12, 3) lies 9 apart, and 12 // 4 + 9 - 9 // 4 - 3 // 4 is 10: far begins at the window itself.
    at = torch.arange(3, 13).expand(3, 1, -1)
    with torch.no_grad():
        plain = model(input_ids=ids[:, :10], position_ids=at).logits
        with apply_self_extend(model, 4, 9):
            changed = model(input_ids=ids[:, :10], position_ids=at).logits
    torch.testing.assert_close(changed[:, :9], plain[:, :9], rtol=1e-4, atol=1e-4)
    assert (changed[:, 9] - plain[:, 9]).abs().max() > 1e-4


def regrouping_of(ids, positions, group, window, axes="all"):
    """What one forward hands to its layers."""
    seen = []
    layer = MODEL.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["laid_regrouping"]), with_kwargs=True
    )
    with apply_self_extend(MODEL, group, window, axes), torch.no_grad():
        MODEL(input_ids=ids, position_ids=positions, use_cache=False)
    hook.remove()
    return seen[0]


def turned_by(cos_sin):
    """Turns in positions, read off the slowest frequency, 0.001 a position."""
    cos, sin = cos_sin
    return (torch.atan2(sin[0, :, 3], cos[0, :, 3]) * 1000).round().long()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 60), st.integers(0, 300), st.sampled_from(["all", "image_base"]))
def test_continuous_at_the_boundary_and_never_falling(group, window, start, axes):
    """Effective distance steps by at most 1 from W - 1 to W, and a farther key never looks nearer by more than 1."""
    at = torch.arange(start, start + window + 4 * group)
    regrouping = regrouping_of(
        torch.ones(1, len(at), dtype=torch.long), at.expand(3, 1, -1), group, window, axes
    )
    far = regrouping.far(0, len(at), slice(0, len(at)))[0]
    queries, keys = at + turned_by(regrouping.q_turn), at + turned_by(regrouping.k_turn)
    seen = torch.where(far, queries[:, None] - keys, at[:, None] - at)[:, 0].tolist()  # from the first key
    assert seen[:window] == list(range(window))
    assert abs(seen[window] - window) <= 1
    assert all(-1 <= b - a <= 2 for a, b in pairwise(seen))
    assert seen[-1] <= window + 4 + 1  # 4 * group positions farther are 4 groups


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 20), st.integers(2, 5), st.sampled_from(["all", "image_base"]))
def test_an_image_is_never_torn(window, group, axes):
    """Every query sees all tokens of one image as near, or all as far."""
    ids, positions, starts = prompt(MODEL, grids=((8, 8), (4, 6), (6, 4)), tail=8)
    tokens = ids.shape[1]
    far = regrouping_of(ids, positions, group, window, axes).far(0, tokens, slice(0, tokens))[0]
    assert far.any() and not far.diagonal().any()
    for start in starts:
        image = [
            n
            for n in range(start + 1, tokens)
            if ids[0, n] == 60 and positions[0, 0, n] == positions[0, 0, start + 1]
        ]
        assert len(image) >= 6
        for query in range(image[-1], tokens):
            assert len(set(far[query, image].tolist())) == 1


@pytest.mark.parametrize("steps", [(20, 6, 1), (9, 12, 6)])
def test_prefill_in_parts_from_a_cache_equals_one_pass(steps):
    ids, positions, mask = two_with_padding()
    length = ids.shape[1]
    cuts = [0, *[min(length, sum(steps[: n + 1])) for n in range(len(steps))]]
    cuts[-1] = length
    with apply_self_extend(MODEL, 2, 3), torch.no_grad():
        whole = MODEL(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        cache, parts = DynamicCache(config=MODEL.config), []
        for a, b in pairwise(cuts):
            if a == b:
                continue
            out = MODEL(
                input_ids=ids[:, a:b], position_ids=positions[:, :, a:b], attention_mask=mask[:, :b],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "steps"), [("blocks", 1), ("flash", 1), ("flash", 7)])
def test_tokens_from_a_cache_equal_one_pass(backend, steps):
    """Fused attention too, which takes no mask, where the keys before a query's own lie in the cache."""
    ids, positions, _ = prompt(MODEL, grids=((4, 4), (6, 4)), tail=6)
    with torch.no_grad():
        with apply_self_extend(MODEL, 2, 4, backend="blocks"):
            whole = MODEL(input_ids=ids, position_ids=positions, use_cache=False).logits
        with apply_self_extend(MODEL, 2, 4, backend=backend):
            cache = cache_for(ids.shape[1])
            for part in (slice(0, 8), *(slice(n, n + steps) for n in range(8, ids.shape[1], steps))):
                out = MODEL(input_ids=ids[:, part], position_ids=positions[:, :, part], past_key_values=cache)
                torch.testing.assert_close(out.logits, whole[:, part], rtol=1e-5, atol=1e-5)


class NothingWaits(TorchDispatchMode):
    """Refuses what makes a GPU wait for Python, and remembers how large a tensor became."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize(("past", "rows"), [(0, 1), (0, 2), (700, 2), (999, 1)])
def test_no_layer_waits_and_none_makes_a_mask(past, rows):
    """A layer of 1,000 tokens after its Regrouping: no value is read, and nothing is as large as queries x keys."""
    g = torch.Generator().manual_seed(0)
    tokens, dim = 1000, 8
    # Images of 30 tokens and 6 positions; in a batch the second row's begin elsewhere.
    at = torch.stack([torch.arange(tokens) // 30 * 6, (torch.arange(tokens) + 7) // 30 * 6])[:rows]
    q, k, v = (torch.randn(rows, h, tokens, dim, generator=g) for h in (4, 2, 2))
    angle = torch.randn(rows, tokens, dim, generator=g)
    turn = (angle.cos(), angle.sin())
    own = tuple(x[:, past:] for x in turn)

    def regrouping(**how):
        return Regrouping(100, at[:, past:], at, own, turn, **how)

    fused = regrouping(fuse=True, insist=True)
    with NothingWaits() as mode:
        found = grouped_attention(q[:, :, past:], k, v, None, fused, 0.3)
    assert mode.largest < max(0.2 * rows * (tokens - past) * tokens, 1.01 * k.numel() * 2)
    expected = grouped_attention(q[:, :, past:], k, v, None, regrouping(), 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_that_was_cut_back_forgets_the_positions_too():
    """As assisted generation does with tokens it rejects; those that follow stand elsewhere."""
    ids, positions, _ = prompt(MODEL, grids=((4, 4), (6, 4)), tail=8)
    cut = ids.shape[1] - 4
    with apply_self_extend(MODEL, 2, 4), torch.no_grad():
        whole = MODEL(input_ids=ids, position_ids=positions, use_cache=False).logits
        cache = DynamicCache(config=MODEL.config)
        rejected = positions.clone()
        rejected[:, :, cut:] += 5
        MODEL(input_ids=ids, position_ids=rejected, past_key_values=cache)
        cache.crop(-4)
        out = MODEL(input_ids=ids[:, cut:], position_ids=positions[:, :, cut:], past_key_values=cache)
    torch.testing.assert_close(out.logits, whole[:, cut:], rtol=1e-5, atol=1e-5)


def test_greedy_generation_equals_running_the_whole_text_each_time():
    model = tiny_model(seed=4)
    ids = torch.randint(1, 50, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with apply_self_extend(model, 3, 5), torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        beams = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, num_beams=2, do_sample=False
        )
        text = ids
        for _ in range(5):
            m = torch.cat((mask, torch.ones(2, text.shape[1] - 14, dtype=torch.long)), 1)
            at = (m.cumsum(-1) - 1).clamp_min(0)
            out = model(input_ids=text, attention_mask=m, position_ids=at.expand(3, -1, -1), use_cache=False)
            text = torch.cat((text, out.logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(made, text)
    assert beams.shape == made.shape


def test_flash_and_blocks_agree_on_a_long_input_and_refuse_clearly():
    model = tiny_model()
    ids, positions, _ = prompt(model, grids=((8, 8),) * 12, tail=9)
    both = []
    for backend in ("blocks", "flash"):
        with apply_self_extend(model, 4, 20, backend=backend, block_elements=20_000), torch.no_grad():
            both.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)
    with (
        apply_self_extend(model, 4, 20, backend="flash"),
        pytest.raises(LaidError, match="gradients are needed"),
    ):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    padded, at, mask = two_with_padding()
    with (
        apply_self_extend(model, 2, 3, backend="flash"),
        torch.no_grad(),
        pytest.raises(LaidError, match="padding"),
    ):
        model(input_ids=padded, position_ids=at, attention_mask=mask, use_cache=False)


def test_gradients_through_blocks_are_those_of_small_differences_and_of_checkpointing():
    model = tiny_model(dtype=torch.float64).train()
    ids, positions, _ = prompt(model, tail=6)
    weight = model.model.language_model.layers[0].self_attn.k_proj.weight

    def loss():
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()

    with apply_self_extend(model, 2, 4):
        (grad,) = torch.autograd.grad(loss(), weight)
        step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
        with torch.no_grad():
            values = []
            for sign in (1, -2, 1):
                weight += sign * 1e-3 * step
                values.append(loss().item())
        slope = (values[0] - values[1]) / 2e-3  # scores are float32
        assert (grad * step).sum().item() == pytest.approx(slope, rel=1e-3)
        model.activation_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(torch.autograd.grad(loss(), weight)[0], grad)


def test_clear_errors():
    model = tiny_model()
    for wrong, words in (
        ({"group": 0, "window": 4}, "group 0 and window 4"),
        ({"group": 2, "window": 4, "axes": "time"}, "allowed: all, text, image_base"),
        ({"group": 2, "window": 4, "axes": "text", "backend": "flash"}, "no prefix"),
    ):
        with pytest.raises(LaidError, match=words):
            apply_self_extend(model, **wrong)
    ids = torch.arange(1, 11)[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    with (
        apply_self_extend(model, 2, 4),
        torch.no_grad(),
        pytest.raises(LaidError, match="filled with SelfExtend"),
    ):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with apply_self_extend(model, 2, 4), pytest.raises(LaidError, match="runs on 'laid_self_extend_sdpa'"):
        apply_self_extend(model, 2, 4)
