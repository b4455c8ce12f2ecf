"""How fast jobs are: what `bench/gpu.py` and the verbs measured on one H200, the teacher's pass on one H100 (bench/GPU.md)."""

from __future__ import annotations

import itertools
import math

# Kind of pass -> weights of the model -> tokens of the pass -> share of peak FLOP/s.
SHARES = {
    "train": {
        8.29e9: {1_800: 0.297, 7_400: 0.437},
        3.75e9: {1_800: 0.149, 7_400: 0.359, 35_000: 0.451},
    },
    "lora": {
        8.29e9: {1_800: 0.257, 7_400: 0.362, 35_000: 0.428},
        3.75e9: {1_800: 0.077, 7_400: 0.268, 35_000: 0.378},
    },
    "packed_train": {3.75e9: {16_200: 0.324}},
    "packed_lora": {8.29e9: {16_200: 0.346}, 3.75e9: {16_200: 0.246}},
    "teacher": {33.5e9: {1_800: 0.525, 7_400: 0.556, 35_000: 0.576}},
    "read": {8.29e9: {53_000: 0.415}, 3.75e9: {53_000: 0.371}},
    "extend": {8.29e9: {53_000: 0.279}, 3.75e9: {53_000: 0.221}},
}
IMAGES = 58.0  # a second where features are not kept yet: decoding, resizing and tower
START = 20.0  # seconds until a job computes: Python, libraries, weights


def share_of_peak(kind: str, parameters: int, tokens: float) -> float:
    """The measured share of the model nearest in size, between the two nearest lengths, on a logarithmic scale."""
    sizes = SHARES[kind]
    measured = sizes[min(sizes, key=lambda size: abs(math.log(size / parameters)))]
    lengths = sorted(measured)
    tokens = min(max(tokens, lengths[0]), lengths[-1])
    for low, high in itertools.pairwise(lengths):
        if tokens <= high:
            part = math.log(tokens / low) / math.log(high / low)
            return measured[low] + part * (measured[high] - measured[low])
    return measured[lengths[-1]]
