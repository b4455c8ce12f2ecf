"""The schedule by hand and by its promises; the learning rate against transformers' own schedules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from laid.distill.objective import Objective
from laid.distill.schedule import (
    DistanceSchedule,
    distance_to_answer,
    learning_rate_factor,
    reach,
)
from laid.errors import LaidError
from tiny_vlm import prompt, tiny_model


def test_weights_by_hand():
    d = torch.tensor([[0.0, 5.0, 10.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    schedule = DistanceSchedule(strength=4)
    assert schedule.weights(d, 0.0, mask).tolist() == [[1, 1, 1, 0]]
    # progress 1: raw 1, 3, 5, mean 3; progress 1/2: raw 1, 2, 3, mean 2
    assert schedule.weights(d, 1.0, mask).tolist()[0] == pytest.approx([1 / 3, 1, 5 / 3, 0])
    assert schedule.weights(d, 0.5, mask).tolist()[0] == pytest.approx([0.5, 1, 1.5, 0])
    far = schedule.weights(d, 1.0, mask, d_max=5.0).tolist()[0]  # beyond d_max nothing more is added
    assert far == pytest.approx([1 / (11 / 3), 5 / (11 / 3), 5 / (11 / 3), 0])
    assert DistanceSchedule(strength=0).weights(d, 1.0).tolist() == [[1, 1, 1, 1]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.floats(0, 20), st.floats(0, 1), st.floats(0, 1))
def test_mean_one_rising_with_distance_and_growing_with_progress(seed, strength, p1, p2):
    g = torch.Generator().manual_seed(seed)
    d = torch.randint(0, 4000, (2, 30), generator=g).sort(-1).values
    d[:, -1] += 1
    mask = torch.rand(2, 30, generator=g) < 0.7
    mask[:, [0, -1]] = True
    early, late = (DistanceSchedule(strength).weights(d, p, mask) for p in sorted((p1, p2)))
    for w in (early, late):
        torch.testing.assert_close(w.sum(-1), mask.sum(-1).float())
        assert (w[~mask] == 0).all()
        assert all((row[keep].diff() >= -1e-5).all() for row, keep in zip(w, mask))
    assert (late[:, -1] / late[:, 0] >= early[:, -1] / early[:, 0] - 1e-4).all()


def test_gaps_reach_farther_until_their_end():
    assert [reach(p, 100, 500, 0.5) for p in (0, 0.25, 0.5, 1)] == [100, 300, 500, 500]
    assert reach(0, 100, 500, 0.0) == 500


def test_distance_is_measured_in_positions_and_by_image():
    model = tiny_model()
    ids, positions, starts = prompt(model)
    answer = torch.tensor([ids.shape[1] - 2])
    d = distance_to_answer(positions, answer)[0]
    at = positions[0, 0, answer].item()
    for n in range(ids.shape[1]):
        assert d[n] == max(0, max(at - positions[a, 0, n].item() for a in range(3)))
    inside = range(starts[1] + 1, starts[1] + 7)  # 6 x 4 patches: 6 tokens of one image, one distance
    assert len({d[n].item() for n in inside}) == 1
    assert d[answer] == 0 and d[-1] == 0


@pytest.mark.parametrize(
    "shape, upstream",
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_learning_rate_after_warm_up_is_transformers(shape, upstream):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = upstream(optimiser, 5, 100)
    theirs = []
    for _ in range(100):
        theirs.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    ours = [learning_rate_factor(step, 100, 0.05, shape) for step in range(100)]
    assert ours[5:] == pytest.approx(theirs[5:], abs=1e-9)
    assert ours[:5] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )  # transformers: 0, 0.2, ..., losing its first step
    assert [learning_rate_factor(s, 10, 0.0, "constant") for s in (0, 9)] == [1, 1]
    assert [learning_rate_factor(s, 30, 0.05) for s in (0, 1, 2)] == [0.5, 1, 1]  # 1.5 steps are two


def test_objective_is_equation_8():
    parts = {"laid": torch.tensor(2.0), "kl": torch.tensor(3.0), "sft": torch.tensor(5.0)}
    paper = Objective(0.3, 0.3, 0.7)
    assert paper.total(parts).item() == pytest.approx(0.3 * 2 + 0.3 * 3 + 0.7 * 5)
    without_kl = Objective(laid=0.3, sft=0.7)
    assert without_kl.total({"laid": parts["laid"], "sft": parts["sft"]}).item() == pytest.approx(0.6 + 3.5)
    assert (without_kl.needs("kl"), without_kl.needs("laid")) == (False, True)
    with pytest.raises(LaidError, match="'laid' is 0.3 but"):
        paper.total({"sft": parts["sft"], "kl": parts["kl"]})
    with pytest.raises(LaidError, match="every lambda is 0"):
        Objective(sft=0.0).total({})


def test_clear_errors():
    for wrong in (
        lambda: DistanceSchedule(strength=-1),
        lambda: DistanceSchedule().weights(torch.ones(1, 2), 1.1),
        lambda: learning_rate_factor(0, 10, 1.0),
        lambda: learning_rate_factor(0, 10, 0.1, "exp"),
    ):
        with pytest.raises(LaidError):
            wrong()
