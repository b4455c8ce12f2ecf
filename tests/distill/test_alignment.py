"""Equation 7 against loops over single elements in float64, its gradients, and what normalising promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.distill.alignment import HeadAlignment
from laid.errors import LaidError
from laid.models.decoder import rotate


def draw(seed, batch=2, tokens=5, heads=4, kv=2, teacher_heads=6, teacher_kv=3, dim=4, dim_t=None, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, dim), (kv, dim), (teacher_heads, dim_t or dim), (teacher_kv, dim_t or dim)]
    return [torch.randn(batch, h, tokens, d, generator=g, dtype=torch.float64) * scale for h, d in shapes]


def slow(q_s, k_s, q_t, k_t, w, mask, weights, w_key=None):
    """Sum over batch, head and token of weight times squared distance, one number at a time, as eq. 7 is printed."""
    sums = []
    for s, t, mix in ((q_s, q_t, w), (k_s, k_t, w_key)):
        if mix is None:  # shared: repeat the KV heads to query heads on both sides
            copies_s, copies_t, mix = q_s.shape[1] // k_s.shape[1], q_t.shape[1] // k_t.shape[1], w
        else:
            copies_s = copies_t = 1
        total, elements = 0.0, 0
        for b in range(s.shape[0]):
            for n in range(s.shape[2]):
                if not mask[b, n]:
                    continue
                for i in range(s.shape[1] * copies_s):
                    for d in range(s.shape[3]):
                        target = sum(
                            mix[i, j].item() * float(t[b, j // copies_t, n, d])
                            for j in range(t.shape[1] * copies_t)
                        )
                        total += float(weights[b, n]) * (float(s[b, i // copies_s, n, d]) - target) ** 2
                elements += float(weights[b, n]) * s.shape[1] * copies_s * s.shape[3]
        sums.append((total, elements))
    return sums


@pytest.mark.parametrize("key_weights", ["shared", "own"])
@pytest.mark.parametrize("block", [2, 4096])
def test_against_the_slow_version(key_weights, block):
    tensors = draw(0)
    align = HeadAlignment(4, 2, 6, 3, 4, 4, key_weights=key_weights).double()
    with torch.no_grad():
        for p in align.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (q, nq), (k, nk) = slow(*tensors, align.w, mask, weights, getattr(align, "w_key", None))
    call = {"mask": mask, "token_weights": weights, "block": block}
    mean = align(*tensors, norm="mean", normalize=False, **call)
    frobenius = align(*tensors, norm="frobenius", normalize=False, **call)
    assert mean.item() == pytest.approx(q / nq + k / nk, rel=1e-12)
    assert frobenius.item() == pytest.approx((q + k) / 2, rel=1e-12)
    powers = [
        (t.square() * (mask * weights)[:, None, :, None]).sum().item()
        / ((mask * weights).sum() * t[0, :, 0].numel()).item()
        for t in tensors[2:]
    ]
    relative = q / nq / powers[0] + k / nk / powers[1]
    for norm in ("mean", "frobenius"):
        assert align(*tensors, norm=norm, **call).item() == pytest.approx(relative, rel=1e-12)


@pytest.mark.parametrize("key_weights", ["own", "shared"])
@pytest.mark.parametrize("block", [4096, 2])
def test_gradcheck_of_student_and_weights_in_one_block_and_in_many(block, key_weights):
    q_s, k_s, q_t, k_t = draw(3, batch=1, tokens=3)
    q_s.requires_grad_(), k_s.requires_grad_()
    align = HeadAlignment(4, 2, 6, 3, 4, 4, key_weights=key_weights).double()
    names = [name for name, _ in align.named_parameters()]

    def loss(q, k, *weights):
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(align, given, (q, k, q_t, k_t), {"block": block})

    assert torch.autograd.gradcheck(loss, (q_s, k_s, *align.parameters()))


def test_gradcheck_with_projection():
    q_s, k_s, q_t, k_t = draw(4, batch=1, tokens=2, dim_t=6)
    align = HeadAlignment(4, 2, 6, 3, 4, 6, projection=True).double()

    def loss(w, map_q, map_k):
        return torch.func.functional_call(
            align, {"w": w, "map_q": map_q, "map_k": map_k}, (q_s, k_s, q_t, k_t)
        )

    assert torch.autograd.gradcheck(loss, (align.w, align.map_q, align.map_k))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["mean", "frobenius"]), st.booleans())
def test_rotation_changes_nothing_when_rope_is_shared(seed, norm, normalize):
    tensors = draw(seed, batch=1)
    angle = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 100
    angle = torch.cat((angle, angle), -1)
    turned = [rotate(x, angle.cos(), angle.sin()) for x in tensors]
    align = HeadAlignment(4, 2, 6, 3, 4, 4).double()
    before = align(*tensors, norm=norm, normalize=normalize)
    after = align(*turned, norm=norm, normalize=normalize)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=0)
    apart = [rotate(tensors[0], angle.cos(), angle.sin()), *tensors[1:]]
    assert abs(align(*apart, norm=norm, normalize=normalize) - before) > 1e-6 * before


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000), st.floats(0.01, 100), st.integers(1, 4), st.sampled_from(["mean", "frobenius"])
)
def test_normalised_loss_knows_neither_scale_nor_width(seed, scale, copies, norm):
    """The same heads scaled, or written down `copies` times (wider models), cost the same; a zero student costs 2."""
    q_s, k_s, q_t, k_t = draw(seed, heads=2, kv=2, teacher_heads=2, teacher_kv=2)
    small = HeadAlignment(2, 2, 2, 2, 4, 4).double()
    plain = small(q_s, k_s, q_t, k_t, norm=norm)
    scaled = small(*(x * scale for x in (q_s, k_s, q_t, k_t)), norm=norm)
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=0)
    wide = HeadAlignment(2 * copies, 2 * copies, 2 * copies, 2 * copies, 4, 4).double()
    widened = wide(*(x.repeat(1, copies, 1, 1) for x in (q_s, k_s, q_t, k_t)), norm=norm)
    torch.testing.assert_close(widened, plain, rtol=1e-6, atol=0)  # 1/h is a float32
    with torch.no_grad():
        small.w.copy_(torch.eye(2))
    assert small(q_s * 0, k_s * 0, q_t, k_t, norm=norm).item() == pytest.approx(2, rel=1e-12)


def test_a_student_that_is_the_mixture_costs_nothing():
    _, _, q_t, k_t = draw(5)
    align = HeadAlignment(4, 2, 6, 3, 4, 4).double()
    k = k_t.repeat_interleave(2, 1)
    with torch.no_grad():
        align.w.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
        align.w[1] = align.w[0]  # heads that share a key head can only agree on keys when their rows do
        align.w[3] = align.w[2]
        k_s = torch.einsum("ij,bjtd->bitd", align.w, k)[:, ::2]
        q_s = torch.einsum("ij,bjtd->bitd", align.w, q_t)
    assert align(q_s, k_s, q_t, k_t).item() < 1e-25


def test_w_starts_even():
    assert torch.equal(HeadAlignment(4, 2, 5, 5, 4, 4).w.data, torch.full((4, 5), 0.2))


def test_bfloat16_is_summed_in_float32():
    tensors = draw(8, tokens=64)
    align = HeadAlignment(4, 2, 6, 3, 4, 4)
    half = [x.bfloat16() for x in tensors]
    exact = align.double()(*(x.double() for x in half))
    got = align.float()(*half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


def test_only_the_students_gradients_stay_until_backward():
    """Per token that is the student's own size, in its own format; nothing of the teacher's."""
    tensors = [x.bfloat16() for x in draw(9, batch=1, tokens=300)]
    q_s, k_s = (x.requires_grad_() for x in tensors[:2])
    align = HeadAlignment(4, 2, 6, 3, 4, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = align(*tensors, block=128)
    large = sorted(x.numel() * x.element_size() for x in kept if x.numel() >= 300)
    assert large == sorted(x.numel() * 2 for x in (q_s, k_s))
    loss.backward()
    exact = align.double()(
        *(x.detach().double().requires_grad_() for x in tensors[:2]), *(x.double() for x in tensors[2:])
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_gradients_are_the_same_in_bfloat16_and_in_float64():
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [x.bfloat16().to(dtype) for x in draw(10, batch=2, tokens=50)]
        q_s, k_s = (x.requires_grad_() for x in tensors[:2])
        align = HeadAlignment(4, 2, 6, 3, 4, 4, key_weights="own")
        (3 * align(*tensors, block=16)).backward()
        found.append([x.double() for x in (q_s.grad, k_s.grad, align.w.grad, align.w_key.grad)])
        assert q_s.grad.dtype == dtype
    for rough, exact in zip(*found, strict=True):
        torch.testing.assert_close(rough, exact, rtol=0.02, atol=1e-6)


def test_same_wavelength_start_copies_pairs_when_dims_agree():
    align = HeadAlignment(4, 2, 6, 3, 4, 4, projection=True)
    assert torch.equal(align.map_q.data, torch.eye(4))
    wide = HeadAlignment(4, 2, 6, 3, 4, 8, projection=True).map_q
    assert torch.equal(wide.nonzero(), torch.tensor([[0, 0], [1, 2], [2, 4], [3, 6]]))


def test_clear_errors():
    with pytest.raises(LaidError, match="32 and teacher head_dim 128.*projection=True"):
        HeadAlignment(2, 1, 4, 2, 32, 128)
    with pytest.raises(LaidError, match="allowed: shared, own"):
        HeadAlignment(2, 1, 4, 2, 4, 4, key_weights="both")
    align = HeadAlignment(4, 2, 6, 3, 4, 4).double()
    q_s, k_s, q_t, k_t = draw(0)
    with pytest.raises(LaidError, match=r"teacher keys have shape \(2, 3, 4, 4\), expected \(2, 3, 5, 4\)"):
        align(q_s, k_s, q_t, k_t[:, :, :4])
    with pytest.raises(LaidError, match="mask is empty"):
        align(q_s, k_s, q_t, k_t, mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(LaidError, match="norm"):
        align(q_s, k_s, q_t, k_t, norm="max")
