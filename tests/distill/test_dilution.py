"""Dilution: what the biased pass says, against a haystack that really holds the copies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.distill.dilution import copies, score_bias
from laid.errors import LaidError
from laid.models.forward import Batch, hidden_states
from tiny_vlm import tiny_model


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 3), st.floats(1, 600), st.integers(0, 99))
def test_a_haystack_weighs_at_least_itself_and_at_most_the_reach(images, needles, reach, seed):
    m = copies(images, needles, reach, np.random.default_rng(seed))
    weight = needles + m * (images - needles)
    assert m >= 1
    if needles < images < reach:
        assert images - 1e-9 <= weight <= reach + 1e-6
    else:
        assert m == 1


def test_every_doubling_is_equally_likely():
    rng = np.random.default_rng(0)
    weights = [1 + 9 * copies(10, 1, 160, rng) for _ in range(4000)]
    counts = np.histogram(np.log2(np.array(weights) / 10), bins=4, range=(0, 4))[0]
    assert counts == pytest.approx([1000] * 4, rel=0.12)


def test_the_needle_and_the_text_weigh_what_they_weigh():
    bias = score_bias(12, [2, 5, 8], 11, [1], 7.0)
    assert bias.tolist() == pytest.approx([0, 0, *[math.log(7)] * 3, 0, 0, 0, *[math.log(7)] * 3, 0])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_distractor_that_stands_for_three_is_three_copies_of_it(kind, attention):
    """One layer, images that see nothing before them: their copies are then alike, and so must be the answers."""
    model = tiny_model(family=kind, layers=1)
    model.set_attn_implementation(attention)
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (1, 9))  # two images of three tokens, three of text
    at = torch.arange(9)
    positions = at.expand(3, 1, -1).clone()
    positions[..., :6] = 0  # so that nothing tells a copy by its place
    shown = torch.zeros(1, 9, dtype=torch.bool)
    shown[0, [1, 4]] = True
    features = torch.randn(2, model.config.text_config.hidden_size)
    bias = torch.zeros(1, 9)
    bias[0, 3:6] = math.log(3)
    diluted = hidden_states(model, Batch(ids, positions, torch.tensor([9]), shown, features, None, bias))

    order = [*range(6), 3, 4, 5, 3, 4, 5, 6, 7, 8]
    longer = Batch(
        ids[:, order], positions[..., order], torch.tensor([15]), shown[:, order], features[[0, 1, 1, 1]]
    )
    copied = hidden_states(model, longer)
    assert torch.allclose(diluted[:, -3:], copied[:, -3:], atol=1e-5)
    plain = hidden_states(model, Batch(ids, positions, torch.tensor([9]), shown, features))
    assert not torch.allclose(diluted[:, -3:], plain[:, -3:], atol=1e-4)


def test_attention_without_a_mask_is_refused():
    model = tiny_model()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    ids = torch.zeros(1, 3, dtype=torch.long)
    batch = Batch(
        ids,
        torch.zeros(3, 1, 3, dtype=torch.long),
        torch.tensor([3]),
        ids.bool(),
        None,
        None,
        torch.zeros(1, 3),
    )
    with pytest.raises(LaidError, match="evaluation.attention to sdpa"):
        hidden_states(model, batch)
