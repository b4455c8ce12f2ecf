"""Divergences against scipy and torch, the paper's formula element by element, and vocabularies of two sizes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from laid.distill.kl import forward_kl
from laid.errors import LaidError


def draw(seed, rows=3, student=7, teacher=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, n, generator=g, dtype=torch.float64).mul(3).to(dtype) for n in (student, teacher)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 8), st.integers(-2, 2))
def test_forward_kl_against_scipy_over_common_rows(seed, tau, surplus):
    s, t = draw(seed, teacher=7 + surplus)
    rows = min(7, 7 + surplus)
    p_t, p_s = (softmax(x.numpy()[:, :rows] / tau, axis=-1) for x in (t, s))
    expected = tau**2 * rel_entr(p_t, p_s).sum(-1).mean()
    assert forward_kl(s, t, tau).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    nn = torch.nn.functional
    upstream = nn.kl_div(
        (s[:, :rows] / tau).log_softmax(-1),
        (t[:, :rows] / tau).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    assert forward_kl(s, t, tau).item() == pytest.approx(tau**2 * upstream.item(), rel=1e-9, abs=1e-12)


def test_forward_kl_as_printed():
    """Two tokens, p^t = (3/4, 1/4), p^s = (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2."""
    s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert forward_kl(s, t).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    softened = forward_kl(s, torch.tensor([[2 * math.log(3.0), 0.0]]), temperature=2.0)
    assert softened.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-6)


def test_zero_at_equality_positive_elsewhere_and_gradients():
    loss = forward_kl
    s, t = draw(1)
    assert loss(t + 5.0, t).item() == pytest.approx(0, abs=1e-12)
    assert loss(s, t).item() > 0
    same = t.clone().requires_grad_()
    loss(same, t).backward()
    assert same.grad.abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: loss(x, t, temperature=2.0), s.requires_grad_())


def test_surplus_rows_are_cut_before_the_softmax():
    """151,936 against 152,064 rows: whatever the teacher's surplus rows hold, even the most likely one, is ignored."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 152_064, generator=g)
    student = teacher[:, :151_936].clone()
    teacher[:, 152_000] = 50.0
    assert forward_kl(student, teacher).item() == pytest.approx(0, abs=1e-5)
    assert forward_kl(teacher, student).item() == pytest.approx(0, abs=1e-5)


def test_half_precision_cache_is_raised_to_float32_first():
    s, t = draw(2, student=2000, teacher=2000, dtype=torch.bfloat16)
    got = forward_kl(s, t)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(forward_kl(s.double(), t.double()).item(), rel=1e-5)


def test_weights_and_impossible_tokens():
    s, t = draw(3)
    weights = torch.tensor([1.0, 0.0, 3.0])
    single = [forward_kl(s[i : i + 1], t[i : i + 1]).item() for i in range(3)]
    assert forward_kl(s, t, weights=weights).item() == pytest.approx(
        (single[0] + 3 * single[2]) / 4, rel=1e-9
    )
    t[:, 2] = -math.inf
    expected = rel_entr(softmax(t.numpy(), axis=-1), softmax(s.numpy(), axis=-1)).sum(-1).mean()
    x = s.clone().requires_grad_()
    loss = forward_kl(x, t)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert np.isfinite(x.grad.numpy()).all()


def test_clear_errors():
    s, t = draw(0)
    with pytest.raises(LaidError, match=r"\(3, 7\) and teacher logits \(2, 7\)"):
        forward_kl(s, t[:2])
    with pytest.raises(LaidError, match="above 0, got 0"):
        forward_kl(s, t, temperature=0)
    with pytest.raises(LaidError, match="no answer position"):
        forward_kl(s[:0], t[:0])
    with pytest.raises(LaidError, match="no answer position"):
        forward_kl(s, t, weights=torch.zeros(3))
