"""How attention answers to position differences, as the Fourier series that RoPE makes of it (paper, eq. 5, 6).

A rotation pair f of a query is the complex number q_f = a + ib of its two components; RoPE turns it by theta_f times its
position. The score of a query and a key that lie `delta` positions apart is therefore

    s(delta) = Re sum_f q_f conj(k_f) exp(i theta_f delta) / sqrt(head_dim)

Averaged over content (all pairs of a query and a key token) this is a series in delta with coefficients C_f = mean of q_f
conj(k_f): |C_f|^2 is its energy at the wavelength 2 pi / theta_f. No fit is needed, and frequencies whose wavelength is
longer than any prompt are told apart, which no transform of a measured curve could do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # figures and claims use the numpy half of this module and start without torch
    import torch


def pairs(x: torch.Tensor) -> torch.Tensor:
    """(..., head_dim) -> (..., head_dim / 2) complex: dims f and f + head_dim / 2 form pair f, as `rotate_half` has it."""
    import torch

    return torch.complex(*x.float().chunk(2, dim=-1))


def coefficients(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """C_f (heads, head_dim / 2), complex: the mean over all pairs of a query and a key, divided by sqrt(head_dim).

    q: (heads, rows, head_dim) and k: (kv_heads, keys, head_dim), both before rotation.
    """
    mean_q, mean_k = pairs(q).mean(1), pairs(k).mean(1)
    return mean_q * mean_k.repeat_interleave(q.shape[0] // k.shape[0], dim=0).conj() * q.shape[-1] ** -0.5


def series(c: np.ndarray, theta: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """The averaged score at every `delta` (n,) -> (..., n). c: (..., frequencies) complex; theta: (frequencies,)."""
    return (c[..., None, :] * np.exp(1j * np.multiply.outer(delta, theta))).real.sum(-1)


def low_share(c: np.ndarray, theta: np.ndarray, cut: float) -> np.ndarray:
    """(...,) share of the energy |C_f|^2 at wavelengths 2 pi / theta_f of at least `cut` positions; 0 without energy."""
    energy = np.abs(c) ** 2
    low = energy[..., 2 * np.pi / theta >= cut].sum(-1)
    total = energy.sum(-1)
    return np.divide(low, total, out=np.zeros_like(total), where=total > 0)


def measured(
    q: torch.Tensor, k: torch.Tensor, at_q: torch.Tensor, at_k: torch.Tensor, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """(sums (heads, bins), counts (bins,)) of the scores by position difference, for a check of the series.

    q: (heads, rows, head_dim), k: (kv_heads, keys, head_dim), both rotated; at_q (rows,), at_k (keys,): positions.
    Differences outside 0 to bins - 1 are left out. One (rows x keys) block per head is held at a time.
    """
    import torch

    delta = at_q[:, None] - at_k[None, :]
    inside = ((delta >= 0) & (delta < bins)).flatten()
    place = delta.flatten()[inside]
    counts = torch.zeros(bins, dtype=torch.float64).index_add_(
        0, place, torch.ones(len(place), dtype=torch.float64)
    )
    sums = torch.zeros(q.shape[0], bins, dtype=torch.float64)
    group = q.shape[0] // k.shape[0]
    for head in range(q.shape[0]):
        score = (q[head].float() @ k[head // group].float().T).flatten()[inside] * q.shape[-1] ** -0.5
        sums[head].index_add_(0, place, score.double())
    return sums.numpy(), counts.numpy()


def agreement(curve: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(heads,) correlation of the series (heads, bins) with the measured means, weighted by counts; NaN if one is flat."""
    seen = counts > 0
    weight = counts[seen] / counts.sum()
    means = sums[:, seen] / counts[seen]
    x = curve[:, seen] - (curve[:, seen] * weight).sum(-1, keepdims=True)
    y = means - (means * weight).sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weight * x * y).sum(-1) / np.sqrt((weight * x * x).sum(-1) * (weight * y * y).sum(-1))


def share_draws(per_question: np.ndarray, theta: np.ndarray, cut: float, resamples: int) -> np.ndarray:
    """(resamples,) the model's low-frequency share, questions drawn again; the same draws for equal numbers of questions.

    per_question: (questions, heads, frequencies) complex coefficients; heads count alike.
    """
    n = len(per_question)
    draws = np.random.default_rng([0, n]).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    mean = np.einsum("rn,nhf->rhf", draws, per_question)
    return low_share(mean, theta, cut).mean(-1)


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log(values) over log(sizes)."""
    x, y = np.log(np.asarray(sizes, float)), np.log(np.maximum(np.asarray(values, float), 1e-12))
    x -= x.mean()
    return float(x @ (y - y.mean()) / (x @ x))
