"""How fast jobs are: what `bench/gpu.py` and the verbs measured on one H100 (bench/GPU.md, commit a2fbb0a)."""

from __future__ import annotations

import itertools
import math

# Kind of pass -> weights of the model -> tokens of the pass -> share of peak FLOP/s.
SHARES = {
    "train": {3.75e9: {1_800: 0.135, 7_400: 0.337, 35_000: 0.434}},
    "lora": {
        8.29e9: {1_800: 0.245, 7_400: 0.340, 35_000: 0.407},
        3.75e9: {1_800: 0.080, 7_400: 0.235, 35_000: 0.357},
    },
    "teacher": {33.5e9: {1_800: 0.525, 7_400: 0.556, 35_000: 0.576}},
    "read": {8.29e9: {53_000: 0.360}, 3.75e9: {53_000: 0.314}},
}
IMAGES = (
    13.0  # a second where features are not kept yet: decoding, resizing and tower, one image after the other
)
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
