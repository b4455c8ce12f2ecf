"""The series over position differences, on signals whose spectrum is known and against scores computed pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.analysis import spectrum
from laid.models.decoder import rotate

DIM = 16
THETA = 10000.0 ** (-np.arange(DIM // 2) / (DIM // 2))


def tables(positions):
    """cos and sin (1, tokens, DIM) as transformers' rotary embedding makes them."""
    angles = torch.outer(positions.double(), torch.from_numpy(THETA))
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos(), angles.sin()


def signal(amplitudes, phases):
    """q, k (1, 1, DIM) whose score at distance d is sum_f a_f cos(theta_f d + phase_f)."""
    a, p = np.asarray(amplitudes), np.asarray(phases)
    q = np.concatenate((a * np.cos(p), a * np.sin(p))) * DIM**0.5
    k = np.concatenate((np.ones(DIM // 2), np.zeros(DIM // 2)))
    return torch.from_numpy(q)[None, None], torch.from_numpy(k)[None, None]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0, 3), min_size=DIM // 2, max_size=DIM // 2),
    st.lists(st.floats(-3, 3), min_size=DIM // 2, max_size=DIM // 2),
)
def test_a_known_spectrum_is_found(amplitudes, phases):
    q, k = signal(amplitudes, phases)
    c = spectrum.coefficients(q, k).numpy()[0]
    np.testing.assert_allclose(np.abs(c), amplitudes, atol=1e-4)
    delta = np.arange(0, 400, 7)
    wanted = sum(a * np.cos(t * delta + p) for a, t, p in zip(amplitudes, THETA, phases))
    np.testing.assert_allclose(spectrum.series(c, THETA, delta), wanted, atol=1e-3)


def test_a_known_spectrum_by_fourier_transform():
    """Two well-separated waves: numpy's transform of the curve finds the same energies at the same wavelengths."""
    theta = 2 * np.pi * np.array([32, 4]) / 256
    c = np.array([0.5 * np.exp(0.3j), 2.0 * np.exp(-1j)])
    curve = spectrum.series(c, theta, np.arange(256))
    lines = np.abs(np.fft.rfft(curve)) / 128
    assert lines[32] == pytest.approx(0.5) and lines[4] == pytest.approx(2.0)
    assert np.delete(lines, [4, 32]).max() < 1e-9
    assert spectrum.low_share(c, theta, cut=64) == pytest.approx(4 / 4.25)
    assert spectrum.low_share(c, theta, cut=64.001) == 0 and spectrum.low_share(c, theta, cut=8) == 1


def test_the_series_is_the_mean_of_scores_computed_pair_by_pair():
    """Content that varies from token to token: at a fixed distance, all q with all k, rotated by the model's own rotation."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(4, 6, DIM, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 5, DIM, generator=generator, dtype=torch.float64)
    c = spectrum.coefficients(q, k).numpy()
    for delta in (0, 1, 17, 300):
        at = tables(torch.full((6,), 1000.0 + delta)), tables(torch.full((5,), 1000.0))
        turned_q, turned_k = rotate(q[None], *at[0])[0], rotate(k[None], *at[1])[0]
        scores = torch.einsum("hqd,hkd->hqk", turned_q, turned_k.repeat_interleave(2, 0)) / DIM**0.5
        np.testing.assert_allclose(
            spectrum.series(c, THETA, np.array([delta]))[:, 0], scores.mean((1, 2)).numpy(), atol=1e-5
        )


def test_measured_scores_by_distance_against_loops():
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(h, n, DIM, generator=generator) for h, n in ((4, 3), (2, 5)))
    at_q, at_k = torch.tensor([7, 8, 12]), torch.tensor([0, 3, 3, 6, 9])
    sums, counts = spectrum.measured(q, k, at_q, at_k, bins=9)
    expected, seen = np.zeros((4, 9)), np.zeros(9)
    for i, a in enumerate(at_q.tolist()):
        for j, b in enumerate(at_k.tolist()):
            if 0 <= a - b < 9:
                seen[a - b] += 1
                for h in range(4):
                    expected[h, a - b] += float(q[h, i] @ k[h // 2, j]) / 4
    np.testing.assert_array_equal(counts, seen)
    np.testing.assert_allclose(sums, expected, atol=1e-5)
    means = np.where(seen, expected / np.maximum(seen, 1), 0)
    np.testing.assert_allclose(spectrum.agreement(3 * means + 1, sums, counts), 1, atol=1e-6)
    assert spectrum.agreement(-means, sums, counts) == pytest.approx(-np.ones(4))


def test_draws_stay_around_the_share_and_are_the_same_for_the_same_questions():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(12, 3, 8)) + 1j * rng.normal(size=(12, 3, 8)) + 2
    draws = spectrum.share_draws(one, THETA, 50, 200)
    share = spectrum.low_share(one.mean(0), THETA, 50).mean()
    assert np.quantile(draws, 0.01) < share < np.quantile(draws, 0.99) and 0 < draws.std() < 0.2
    np.testing.assert_array_equal(draws, spectrum.share_draws(one, THETA, 50, 200))
    same = np.broadcast_to(one[:1], one.shape)
    np.testing.assert_allclose(spectrum.share_draws(same, THETA, 50, 20).std(), 0, atol=1e-12)


def test_slope_of_a_power_law():
    sizes = [2, 5, 10, 50]
    assert spectrum.slope(sizes, [3 * s**-0.7 for s in sizes]) == pytest.approx(-0.7)
