"""One step: batches, memory and arithmetic."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from laid.models.decoder import text_model
from laid.models.loading import load_model
from laid.training.engine import Engine
from laid.training.teacher import teacher_outputs
from trainer_runs import CLOSE, Ready, changed


@pytest.mark.parametrize(
    "method, settings",
    [
        ("kd", {}),
        ("laid_plus", {}),
        # eq. 7 as printed, a mean over samples of sums over tokens; the relative error is one ratio for a whole batch
        (
            "laid",
            {"alignment": {"pairs": [[-1, -1]], "norm": "frobenius", "normalize": False}},
        ),
    ],
)
def test_accumulation_is_one_large_batch(micro, start, tmp_path, method, settings):
    found = []
    for size in (8, 4, 1):
        run = Ready(
            start(
                changed(micro, {"per_device_batch": size}, method, **settings), method, tmp_path / str(size)
            )
        )
        line = run.step(list(range(8)), 0)
        weights = torch.cat([p.detach().flatten() for p in (*run.t.weights, *run.t.beside)])
        found.append((line, weights))
    for line, weights in found[1:]:
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(found[0][0][key], rel=1e-3)
        torch.testing.assert_close(weights, found[0][1], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("method", "size", "online"), [("laid", 1, True), ("laid_plus", 2, False)])
def test_packed_is_unpacked(micro, start, family, tmp_path, method, size, online):
    """Losses, gradients and weights of a step in passes of several pieces, gaps, dilution and eq. 7 among them.

    The decoder sees the prompts without padding, as many tokens at a time as are asked for.
    """
    found, most = [], 300
    for tokens in (0, most):
        training = {"per_device_batch": size, "tokens_per_pass": tokens, "gradient_checkpointing": True}
        teacher = {"teacher": family["teacher"], "teacher_cache": None} if online else {}
        run = Ready(start(changed(micro, training, method), method, tmp_path / str(tokens), **teacher))
        run.model.train()
        seen = []
        text_model(run.model).layers[0].self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs, seen=seen: seen.append(kwargs["position_embeddings"][0].shape[:-1]),
            with_kwargs=True,
        )
        lines = [run.step(list(range(at, at + 8)), 3) for at in (0, 8)]
        weights = torch.cat([p.detach().flatten() for p in (*run.t.weights, *run.t.beside)])
        found.append((lines, weights, seen))
    (plain, expected, apart), (packed, weights, together) = found
    for a, b in zip(plain, packed):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-3) for key in a)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=2e-4)
    assert len(together) < len(apart) / 1.5 and all(shape[1] <= most for shape in together)
    real = sum(run.data.lengths[:16]) * 2  # once more in backward
    assert sum(rows * width for rows, width in together) == real


def test_every_process_makes_as_many_passes():
    """Twelve samples in pieces of one over three processes: as many in a pass as fit everywhere, each sample once, in order."""
    lengths = [10, 10, 10, 10, 10, 10, 10, 10, 25, 10, 10, 10]
    for tokens, passes in ((0, 4), (20, 4), (35, 2), (45, 2), (55, 1)):
        found = [
            Engine.pieces(SimpleNamespace(rank=rank, world=3), list(range(12)), 1, lengths, tokens)
            for rank in range(3)
        ]
        assert {len(own) for own in found} == {passes}
        for rank, own in enumerate(found):
            assert [k for one in own for k in one] == list(range(rank, 12, 3))
            assert not tokens or all(sum(lengths[k] for k in one) <= max(tokens, 25) for one in own)


@pytest.mark.parametrize("method", ["laid", "sft"])
def test_gradient_checkpointing_changes_nothing(micro, start, tmp_path, method):
    lines = []
    for on in (False, True):
        run = Ready(start(changed(micro, {"gradient_checkpointing": on}), method, tmp_path / str(on)))
        lines.append([run.step(list(range(8)), step) for step in (0, 1)])
    for a, b in zip(*lines):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5) for key in a)


def test_a_small_step_is_not_lost_in_bfloat16(micro, start, tmp_path):
    """A step of 1e-6 rounds to none in most bfloat16 weights; trained weights are therefore kept in float32."""
    run = Ready(start(changed(micro, {"dtype": "bfloat16"}, "kd", lr=1e-6), "kd", tmp_path / "seed0"))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step(list(range(8)), 0)
    for name, p in run.model.named_parameters():
        if "visual" in name:
            assert p.dtype == torch.bfloat16 and torch.equal(p, before[name])
        else:
            assert p.dtype == torch.float32
            moved = (p != before[name]).float().mean()
            assert moved > 0.9 or "embed" in name, name
            if p.dim() == 2:
                assert (p.bfloat16() != before[name].bfloat16()).float().mean() < 0.1, name


def test_a_vision_tower_trains_through_the_step(micro, start, family, tmp_path):
    """The gradients of its weights: those of transformers' own forward, pixels to logits, on whole prompts."""
    config = changed(micro, {"train_vision": True}, "kd", lambda_kl=0.0)
    run = Ready(start(config, "kd", tmp_path / "seed0"))
    indices = [4, 9, 16]
    run.losses(indices)
    found = {n: p.grad for n, p in run.model.named_parameters() if "visual" in n}
    plain, losses = load_model(family["small"]), []
    for k in indices:
        sample = run.data.samples[k]
        pixels, grid = run.data.features.processor.pixels([run.data.features.file(p) for p in sample.paths])
        ids = torch.from_numpy(sample.prompt.ids)[None]
        logits = plain(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grid,
            mm_token_type_ids=torch.from_numpy(sample.prompt.image_mask)[None].int(),
        ).logits[0, -2:]  # fmt: skip
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.labels)))
    torch.stack(losses).mean().backward()
    assert len(found) > 10
    for name, p in plain.named_parameters():
        if "visual" in name:
            assert found[name].abs().max() > 0, name
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)


def test_the_first_losses_by_hand(micro, start, tmp_path):
    """L_SFT as the mean cross-entropy of answer and end of turn, from the student's own logits at those two tokens."""
    run = Ready(start(micro, "kd", tmp_path / "seed0"))
    indices = [4, 9, 16]
    piece = run.data.piece(indices, 0, 6)
    assert torch.equal(piece.inputs.positions, run.data.inputs(indices).positions)  # no gaps in KD
    expected, kl = [], []
    tau = micro.methods["kd"].temperature
    with torch.no_grad():
        for row, k in enumerate(indices):
            sample = run.data.samples[k]
            pixels, grid = run.data.features.processor.pixels(
                [run.data.features.file(p) for p in sample.paths]
            )
            ids = torch.from_numpy(sample.prompt.ids)[None]
            logits = run.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grid,
                mm_token_type_ids=torch.from_numpy(sample.prompt.image_mask)[None].int(),
            ).logits[0, -2:]  # fmt: skip
            expected.append(torch.nn.functional.cross_entropy(logits, piece.labels.view(-1, 2)[row]))
            p, q = ((x / tau).softmax(-1) for x in (run.lesson.teacher.logits([k])[0], logits))
            kl.append(tau**2 * (p * (p / q).log()).sum(-1).mean())
        parts = run.losses(indices)
    torch.testing.assert_close(parts["sft"], torch.stack(expected).mean(), **CLOSE)
    torch.testing.assert_close(parts["kl"], torch.stack(kl).mean(), **CLOSE)


def test_gaps_grow_with_progress_and_keep_images_whole(micro, start, tmp_path):
    run = Ready(start(micro, "laid", tmp_path / "seed0"))
    reach = micro.methods["laid"].gaps.reach
    spans = []
    for step in (0, 2, 5):
        piece, again = (run.data.piece(list(range(8)), step, 6) for _ in range(2))
        inputs, plain = piece.inputs, run.data.inputs(list(range(8))).positions
        assert torch.equal(inputs.positions, again.inputs.positions)
        moved = inputs.positions - plain
        assert (moved >= 0).all() and (
            moved.diff(dim=2)[inputs.token_mask[None, :, 1:].expand(3, -1, -1)] >= 0
        ).all()
        for row in range(8):
            for at in run.data.samples[row].prompt.block_starts:
                assert len(moved[:, row, at : at + 3].unique()) == 1  # start, visual token, end move together
        spans.append(int(inputs.positions.max()) + 1)
    assert spans[0] == int(plain.max()) + 1 < spans[2] <= reach


def test_dilution_grows_with_progress_and_spares_the_needle(micro, start, tmp_path):
    """How many images a haystack weighs as much as, from the bias that its tokens got."""
    run = Ready(start(micro, "laid_plus", tmp_path / "seed0"))
    heaviest = []
    for step in (0, 2, 5):
        piece, again = (run.data.piece(list(range(8)), step, 6) for _ in range(2))
        bias = piece.inputs.score_bias
        assert torch.equal(bias, again.inputs.score_bias)
        weights = []
        for row in range(8):
            sample = run.data.samples[row]
            by_image = [float(bias[row, at].exp()) for at in sample.prompt.block_starts]
            assert all(by_image[needle] == 1 for needle in sample.needles) and sample.needles
            assert bias[row, sample.text_start :].abs().max() == 0
            weights.append(sum(by_image))
        heaviest.append(max(weights))
    assert heaviest[0] <= 4 + 1e-3 < heaviest[2] <= micro.methods["laid_plus"].dilution.reach + 1e-3


def test_a_share_of_the_samples_gets_neither_gaps_nor_dilution(micro, start, tmp_path):
    run = Ready(start(micro, "laid_plus", tmp_path / "seed0"))
    data = dataclasses.replace(run.data, ordinary=0.25)
    indices = list(range(len(data.samples)))
    plain, changed, steps = data.inputs(indices).positions, [], 40
    for step in range(steps, 2 * steps):  # all that may be long is long by then
        inputs = data.piece(indices, step, 2 * steps).inputs
        moved = (inputs.positions != plain).any(0).any(1)
        diluted = (inputs.score_bias != 0).any(1)
        # A drawn span or weight may by chance be the sample's own; a sample left alone has both.
        assert (moved | diluted).eq(moved & diluted).float().mean() > 0.9
        changed.append(moved | diluted)
    left = 1 - torch.stack(changed).float().mean()
    expected, error = 0.25, (0.25 * 0.75 / (steps * len(indices))) ** 0.5
    assert abs(left - expected) < 4 * error + 0.02


@torch.no_grad()
def test_samples_of_a_diluted_batch_do_not_see_each_other(micro, start, tmp_path):
    run = Ready(start(micro, "laid_plus", tmp_path / "seed0"))
    order = sorted(range(len(run.data.samples)), key=lambda k: run.data.lengths[k])
    indices = [order[0], order[-1], order[len(order) // 2]]  # two of them padded
    assert run.data.lengths[indices[0]] < run.data.lengths[indices[1]]
    together = teacher_outputs(run.model, run.data.piece(indices, 5, 6).inputs, ())[0]
    for row, k in enumerate(indices):
        alone = teacher_outputs(run.model, run.data.piece([k], 5, 6).inputs, ())[0]
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)
