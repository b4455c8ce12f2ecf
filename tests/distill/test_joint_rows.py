"""Joint matching of attention rows against loops over single numbers, and what its definition promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.distill.attention_rows import attention_rows
from laid.distill.joint_rows import PooledRows, joint_divergence, joint_target, told
from laid.models.decoder import rotate, text_model
from tiny_vlm import tiny_model


def draw(seed, heads, rows=3, n=5, batch=2):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, rows, n, generator=g, dtype=torch.float64) * 2).log_softmax(-1)


VISUAL = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]]).bool()
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]).bool()
ROWS = torch.tensor([[5, 6], [4, 5]])


def pooled(seed=0, batch=2, far=0):
    """(rows, rotated q and k, turn): of four query and two key heads; positions start `far` from the question's first token."""
    turn = text_model(tiny_model()).rotary_emb
    dim, g = turn.inv_freq.shape[0] * 2, torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, h, 7, dim, generator=g)[:batch] for h in (4, 2))
    positions = (
        torch.tensor([[0, 1, 1, 2, 9, 30, 31], [0, 1, 2, 3, 4, 5, 6]])[:batch]
        - torch.tensor([30, 4])[:batch, None]
    )
    positions = torch.stack([positions, positions // 2, positions - 1])
    rows = PooledRows(q, k, positions, ROWS[:batch], VISUAL[:batch], turn)
    moved = turn(q, positions + far)
    return rows, rotate(q, *moved), rotate(k, *moved)


def test_pooled_scores_by_loops():
    """Every question row over every visual token of either sample, each key with the KV head of its group."""
    rows, q, k = pooled()
    places = [(b, t) for b in range(2) for t in range(7) if VISUAL[b, t]]
    assert rows.scores.shape == (2, 4, 2, len(places))
    for b in range(2):
        for h in range(4):
            for r in range(2):
                query = q[b, h, ROWS[b, r]]
                scores = torch.stack([query @ k[c, h // 2, t] for c, t in places]) / math.sqrt(q.shape[-1])
                torch.testing.assert_close(rows.scores[b, h, r], scores, rtol=1e-4, atol=1e-5)


def test_alone_in_its_batch_a_sample_sees_its_own_images_as_ever():
    """Counted from the question or from the start, RoPE knows differences only."""
    rows, q, k = pooled(1, batch=1, far=30)
    whole = attention_rows(q, k, ROWS[:1])
    alone = whole[..., VISUAL[0]].log_softmax(-1)
    torch.testing.assert_close(rows.scores.log_softmax(-1), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_visual_mass_is_the_share_of_whole_rows(batch):
    rows, q, k = pooled(2, batch)
    whole = attention_rows(q, k, ROWS[:batch], MASK[:batch]).exp()
    wanted = (whole * VISUAL[:batch, None, None]).sum(-1)
    torch.testing.assert_close(rows.visual_mass(MASK[:batch]), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.min() > 0.01 and wanted.max() < 0.99


def test_divergence_by_loops():
    student, teacher = draw(0, 3), draw(1, 2)
    g = torch.Generator().manual_seed(2)
    mass, weights = (torch.rand(*shape, generator=g, dtype=torch.float64) for shape in ((2, 3), (5,)))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    over = under = 0.0
    for b in range(2):
        for r in range(3):
            product = [1.0] * 5
            for j in range(2):
                p = teacher[b, j, r].exp().tolist()
                power = 1 - sum(-x * math.log(x) for x in p) / math.log(5)
                product = [x * y**power for x, y in zip(product, p)]
            target = [x / sum(product) for x in product]
            entropy = sum(-x * math.log(x) for x in target)
            count = mass[b, r].item() * (1 - entropy / math.log(5)) * mask[b, r].item()
            s = student[b, :, r].exp().tolist()
            overlaps = [sum(math.sqrt(x * y) for x, y in zip(target, s[i])) ** 2 for i in range(3)]
            for i in range(3):
                d = sum(w * (x * math.log(x / y) - x + y) for x, y, w in zip(target, s[i], weights.tolist()))
                over += count * overlaps[i] / sum(overlaps) * d
            under += count
    got = joint_divergence(student, teacher, mass, mask, weights)
    assert got.item() == pytest.approx(over / under, rel=1e-10)


def test_told_is_nothing_for_an_even_row_and_all_for_one_token():
    even = torch.full((6,), 1 / 6).log()
    one = torch.tensor([0.0, -800, -800, -800, -800, -800]).log_softmax(0)
    assert told(even).item() == pytest.approx(0, abs=1e-6)
    assert told(one).item() == pytest.approx(1, abs=1e-6)


def test_heads_that_look_evenly_say_nothing_and_heads_that_agree_are_sharper_together():
    sharp, even = draw(3, 1), torch.full((2, 4, 3, 5), 1 / 5, dtype=torch.float64).log()
    torch.testing.assert_close(joint_target(torch.cat((sharp, even), 1)), joint_target(sharp))
    twice = joint_target(sharp.expand(-1, 3, -1, -1))
    assert (told(twice) > told(joint_target(sharp))).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 3))
def test_never_negative_and_zero_where_all_heads_look_as_the_target(seed, heads_s, heads_t):
    student, teacher = draw(seed, heads_s), draw(seed + 1, heads_t)
    mass, mask = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3).bool()
    weights = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert joint_divergence(student, teacher, mass, mask, weights) >= 0
    same = joint_target(teacher)[:, None].expand(-1, heads_s, -1, -1)
    assert joint_divergence(same, teacher, mass, mask, weights).item() == pytest.approx(0, abs=1e-12)


def test_nothing_counted_is_zero_and_gradients_stay_finite():
    student = draw(5, 2).requires_grad_()
    loss = joint_divergence(student, draw(6, 2), torch.ones(2, 3), torch.zeros(2, 3).bool())
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(student.grad).all()


def test_a_teacher_that_looks_evenly_teaches_nothing():
    """As one trained for a few steps does: rounding must not make weights of it that are below zero or next to it."""
    noise = torch.randn(2, 4, 30, 88, generator=torch.Generator().manual_seed(3))
    for scale in (0.0, 1e-8, 1e-5, 1e-4):
        student = draw(5, 2, rows=30, n=88).float().requires_grad_()
        teacher = (noise * scale).log_softmax(-1)
        assert told(teacher).min() >= 0
        loss = joint_divergence(student, teacher, torch.ones(2, 30), torch.ones(2, 30).bool())
        loss.backward()
        assert 0 <= loss.item() < 20 and student.grad.abs().max() < 1


def test_gradient_reaches_the_student_alone_and_through_shares_it_does_not():
    scores = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    teacher, mass, mask = draw(8, 2).requires_grad_(), torch.ones(2, 3), torch.ones(2, 3).bool()
    scores.requires_grad_()
    joint_divergence(scores.log_softmax(-1), teacher, mass, mask).backward()
    assert teacher.grad is None and scores.grad.abs().sum() > 0
    # where one head is the target already, it draws no gradient, however the others share the row
    settled = torch.cat((joint_target(teacher.detach())[:, None], draw(9, 1)), 1).requires_grad_()
    joint_divergence(settled.log_softmax(-1), teacher, mass, mask).backward()
    assert settled.grad[:, 0].abs().max() < 1e-12 < settled.grad[:, 1].abs().max()
