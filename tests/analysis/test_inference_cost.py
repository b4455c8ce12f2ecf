"""FLOPs against a count by hand; the ratio of latencies against works whose cost is known."""

import numpy as np
import pytest
import torch

from laid.analysis import inference_cost as cost
from laid.models.forward import collate, hidden_states
from laid.models.loading import load_model
from laid.models.processing import Processor


def test_flops_are_those_of_the_matrix_products(family):
    """2 T (products of every linear layer) + 2 T^2 d for scores and for values each, per layer; 26 tokens, no images."""
    model = load_model(family["small"])
    prompt = Processor.load(family["small"]).encoder.encode(
        "For the image with a dog, is there a cat?", [(1, 1)]
    )
    inputs = collate([prompt], [torch.zeros(1, 32)])
    tokens, hidden, wide, heads, kv, dim, layers = len(prompt.ids), 32, 32, 2, 1, 16, 2
    linear = hidden * (heads + 2 * kv) * dim + heads * dim * hidden + 3 * hidden * wide
    expected = layers * (2 * tokens * linear + 2 * 2 * heads * tokens**2 * dim)
    counted = cost.count_flops(lambda: hidden_states(model, inputs))
    rotary = (
        2 * 3 * (dim // 2) * tokens
    )  # the outer product of frequencies and positions, which is a matrix product too
    assert counted in (expected, expected + rotary)


def test_ratio_of_known_works():
    def burn(n):
        x = torch.ones(n, 400)
        return lambda: x @ x.T @ x

    seconds = cost.time_in_turns([burn(100), burn(400)], 9, "cpu")
    ratio, low, high = cost.ratio_interval(seconds)
    assert seconds.shape == (9, 2) and low <= ratio <= high and low > 1.5


def test_ratio_interval_of_constant_turns():
    assert cost.ratio_interval(np.array([[2.0, 3.0]] * 5)) == pytest.approx((1.5, 1.5, 1.5))


def test_an_exported_student_does_base_s_products(micro, family, haystacks, coco_root, tmp_path):
    """A run whose export is the student itself with other weights: the same FLOPs, another answer."""
    model = load_model(family["small"])
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "seed0/model")
    found = cost.measure(
        micro,
        "small",
        "laid",
        family["small"],
        tmp_path / "seed0",
        coco_root,
        haystacks / "test",
        [5],
        repeats=3,
    )
    part = found["sizes"]["5"]
    assert part["flops"][0] == part["flops"][1] > 0 and found["parameters"][0] == found["parameters"][1]
    assert (
        found["same_vision"]
        and part["ratio"] > 0
        and part["interval"][0] <= part["ratio"] <= part["interval"][1]
    )
