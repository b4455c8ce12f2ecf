"""The parts of equation 8 as a training step computes them, with models of two layouts at hand."""

import pytest
import torch

from laid.errors import LaidError
from laid.models.capture import QKCapture
from laid.models.forward import Batch, hidden_states
from laid.settings import TrainedMethod, merge
from laid.training.teacher import OnlineTeacher, teacher_outputs
from tiny_vlm import IMAGE, prompt, tiny_model
from trainer_runs import Losses

ALIGNED = {"lambda_laid": 1.0, "alignment": {"pairs": [[-1, -1]]}}


def two(model):
    """A batch of two prompts of unlike length, the shorter padded at the right."""
    made = [prompt(model, grids, tail=tail)[:2] for grids, tail in ((((4, 4), (6, 4)), 7), (((4, 4),), 4))]
    lengths = torch.tensor([ids.shape[1] for ids, _ in made])
    pads = [int(lengths.max() - n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(i, (0, p)) for (i, _), p in zip(made, pads)])
    positions = torch.cat([torch.nn.functional.pad(x, (0, p)) for (_, x), p in zip(made, pads)], 1)
    mask = ids == IMAGE
    return Batch(
        ids, positions, lengths, mask, torch.randn(int(mask.sum()), model.config.text_config.hidden_size)
    )


def losses_of(settings, student=None, **teacher):
    """(Losses, inputs): a student of 4 heads and a teacher of 8."""
    torch.manual_seed(0)
    student = student or tiny_model()
    big = tiny_model(**{"seed": 1, "heads": 8, "hidden": 64, **teacher}).requires_grad_(False)
    seen = two(big)
    settings = TrainedMethod().changed(settings)
    return Losses(student, settings, OnlineTeacher(big, lambda _: seen)), two(student)


LABELS = torch.tensor([[7, 8], [9, 8]])


def test_before_and_after_rotation_are_the_same_number_and_gradient():
    found = []
    for rotation in ("before", "after"):
        losses, inputs = losses_of(merge(ALIGNED, {"alignment": {"rotation": rotation}}))
        value = losses(inputs, LABELS, [0, 1], 0.5)["laid"]
        found.append((value, losses.alignments["1-1"].w.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["mean", "frobenius"])
def test_two_pairs_of_layers_by_hand(norm):
    """Relative errors summed over pairs, queries and keys; tokens weighed by distance up to the reach, padding by 0."""
    settings = {
        "alignment": {"pairs": [[0, 0], [-1, -1]], "norm": norm},
        "distance": {"strength": 4.0},
    }
    losses, inputs = losses_of({"lambda_laid": 1.0, "gaps": {"reach": 40}, **settings})
    progress = 0.25
    weights = torch.zeros(2, inputs.ids.shape[1])
    for b in range(2):
        length = int(inputs.lengths[b])
        answer = inputs.positions[:, b, length - 2]
        raw = []
        for n in range(length):
            distance = max(0, int((answer - inputs.positions[:, b, n]).max()))
            raw.append(1 + 4 * progress * min(1, distance / 40))
        weights[b, :length] = torch.tensor(raw) / (sum(raw) / length)
    with torch.no_grad():
        got = losses(inputs, LABELS, [0, 1], progress)["laid"]
        seen = []
        for model, batch in ((losses.model, inputs), (losses.teacher.model, losses.teacher.batch(None))):
            with QKCapture(model, [0, -1]) as capture:
                hidden_states(model, batch)
                seen.append(capture.take())
        expected = 0.0
        for layer in (0, 1):
            for kind in ("q", "k"):
                own, theirs = (getattr(x[layer], kind) for x in seen)
                gap = (own - theirs.mean(1, keepdim=True)).square().mean((1, 3))  # w starts uniform
                size = theirs.square().mean((1, 3))
                expected = expected + (gap * weights).sum() / (size * weights).sum()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_vocabularies_of_different_size_are_cut_to_their_common_rows():
    losses, inputs = losses_of({"lambda_kl": 1.0, "temperature": 2.0}, vocab_size=70)
    with torch.no_grad():
        seen, _ = teacher_outputs(losses.teacher.model, losses.teacher.batch(None), ())
        found = losses(inputs, LABELS, [0, 1], 0.5)["kl"]
        student, _ = teacher_outputs(losses.model, inputs, ())
    p, q = ((x / 2).softmax(-1) for x in (seen[..., :64], student))
    torch.testing.assert_close(found, 4 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-6)


def test_other_head_dims_need_a_projection_and_no_rotation():
    wide = {"heads": 4, "hidden": 64, "sections": (2, 3, 3)}  # head_dim 16 against 8
    with pytest.raises(LaidError, match="head_dim 8 and teacher head_dim 16.*alignment.projection: true"):
        losses_of(ALIGNED, **wide)
    turned = {"alignment": {"rotation": "after", "projection": True}}
    with pytest.raises(LaidError, match="head_dim is 8 in the student and 16 in the teacher"):
        losses_of(merge(ALIGNED, turned), **wide)
    losses, inputs = losses_of(merge(ALIGNED, {"alignment": {"projection": True}}), **wide)
    losses(inputs, LABELS, [0, 1], 0.5)
    assert losses.alignments["1-1"].map_q.grad.abs().max() > 0
