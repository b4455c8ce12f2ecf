"""Attention rows against eager attention of transformers; the divergence against loops and scipy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.distill.attention_rows import RowMatching, attention_rows, question_rows
from laid.errors import LaidError
from laid.models.capture import QKCapture
from tiny_vlm import tiny_model


def test_rows_are_those_of_eager_attention_with_padding():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    with QKCapture(model, [0, 1]) as capture:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
        caught = capture.take()
    rows = torch.tensor([[4, 9], [0, 7]])
    for layer, qk in caught.items():
        got = attention_rows(*qk.rotated(), rows, mask).exp()
        for b in range(2):
            torch.testing.assert_close(got[b], out.attentions[layer][b][:, rows[b]], rtol=1e-4, atol=1e-6)


def draw(seed, heads, tokens=6, allowed=5):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, heads, 3, tokens, generator=g, dtype=torch.float64) * 2
    scores[..., allowed:] = -math.inf
    return scores.log_softmax(-1)


def test_divergence_by_loops():
    student, teacher = draw(0, 2), draw(1, 3)
    weights = torch.rand(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    match = RowMatching(2, 3).double()
    with torch.no_grad():
        match.mixture.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(3)))
    total = 0.0
    for b in range(2):
        for i in range(2):
            e = [math.exp(match.mixture[i, j].item()) for j in range(3)]
            for r in range(3):
                for n in range(5):
                    p = sum(e[j] / sum(e) * math.exp(teacher[b, j, r, n].item()) for j in range(3))
                    s = math.exp(student[b, i, r, n].item())
                    total += weights[b, n].item() * (p * math.log(p / s) - p + s)
    assert match(student, teacher, weights).item() == pytest.approx(total / 12, rel=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999))
def test_unweighted_is_kl_and_weighted_is_never_negative(seed):
    student, teacher = draw(seed, 1), draw(seed + 1, 1)
    match = RowMatching(1, 1).double()
    kl = torch.nn.functional.kl_div(student[..., :5], teacher[..., :5], log_target=True, reduction="sum") / 6
    assert match(student, teacher).item() == pytest.approx(kl.item(), rel=1e-9)
    weights = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
    assert match(student, teacher, weights).item() >= 0
    assert match(teacher, teacher, weights).item() == pytest.approx(0, abs=1e-14)


def test_gradients_also_where_keys_are_masked():
    g = torch.Generator().manual_seed(0)
    q, k, q_t, k_t = (torch.randn(1, h, 5, 4, generator=g, dtype=torch.float64) for h in (4, 2, 3, 3))
    rows = torch.tensor([[1, 4]])
    match = RowMatching(4, 3).double()
    teacher = attention_rows(q_t, k_t, rows)

    def loss(q, k, mixture):
        args = (attention_rows(q, k, rows), teacher, torch.arange(1.0, 6)[None])
        return torch.func.functional_call(match, {"mixture": mixture}, args)

    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), k.requires_grad_(), match.mixture))


def test_rows_of_the_question_and_rows_that_do_not_count():
    images = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]).bool()
    rows, counted = question_rows(images, torch.tensor([6, 5, 1]))
    assert rows.tolist() == [[4, 5, 6], [5, 5, 5], [0, 1, 1]]
    assert counted.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    student, teacher, match = draw(0, 2), draw(1, 3), RowMatching(2, 3).double()
    counted = torch.tensor([[True, True, False], [False, False, True]])
    each = [
        match(student[b : b + 1, :, [r]], teacher[b : b + 1, :, [r]]) for b, r in ((0, 0), (0, 1), (1, 2))
    ]
    torch.testing.assert_close(match(student, teacher, row_mask=counted), sum(each) / 3)
    torch.testing.assert_close(match(student, teacher, row_mask=counted | True), match(student, teacher))


def test_clear_errors():
    q = torch.randn(1, 2, 4, 4)
    with pytest.raises(LaidError, match="sees no real token"):
        attention_rows(q, q, torch.tensor([[0]]), torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(LaidError, match="do not fit"):
        RowMatching(2, 3)(draw(0, 2), draw(0, 2))
