import numpy as np
import pytest
import torch

from laid.toy.muon import Muon, orthogonalise


def matrices(shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 9), (2, 9, 4), (1, 1, 7)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values(shape):
    """Against numpy's SVD: U and V as they were, all singular values near 1 (the quintic leaves them in 0.65..1.25)."""
    for x, y in zip(matrices(shape, scale=3.0), orthogonalise(matrices(shape, scale=3.0))):
        u, _, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
        values = u.T @ y.double().numpy() @ vt.T
        off = values - np.diag(np.diag(values))
        assert np.abs(off).max() < 1e-4
        assert np.all((np.diag(values) > 0.6) & (np.diag(values) < 1.3))


def test_a_zero_gradient_moves_nothing():
    weight = torch.nn.Parameter(matrices((4, 4)))
    before = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch(decay):
    """torch.optim.Muon orthogonalises in bfloat16: updates agree to its 8 bits, five steps in a row."""
    shapes = [(8, 8), (12, 6), (6, 12), (8, 8)]
    ours, theirs = ([torch.nn.Parameter(matrices(s, k)) for k, s in enumerate(shapes)] for _ in range(2))
    ours.append(torch.nn.Parameter(matrices((3, 3), 9)))  # never has a gradient
    optimizers = [
        Muon(ours, lr=0.02, weight_decay=decay),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    start = [p.detach().clone() for p in theirs]
    for step in range(5):
        for mine, yours in zip(ours, theirs):
            mine.grad = matrices(mine.shape, 100 * step + mine.numel())
            yours.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, yours, before in zip(ours, theirs, start):
        moved = (yours - before).norm()
        assert (mine - yours).norm() < 0.02 * moved
        assert moved > 0.05
    assert torch.equal(ours[-1], matrices((3, 3), 9))


def test_state_survives_saving():
    """Three steps, saved and loaded in between, end where three steps without that end."""

    def steps(weight, optimizer, numbers):
        for k in numbers:
            weight.grad = matrices(weight.shape, k)
            optimizer.step()

    whole = torch.nn.Parameter(matrices((5, 3)))
    optimizer = Muon([whole], lr=0.1)
    steps(whole, optimizer, (1, 2, 3))
    part = torch.nn.Parameter(matrices((5, 3)))
    optimizer = Muon([part], lr=0.1)
    steps(part, optimizer, (1,))
    saved = optimizer.state_dict()
    rest = torch.nn.Parameter(part.detach().clone())
    optimizer = Muon([rest], lr=0.1)
    optimizer.load_state_dict(saved)
    steps(rest, optimizer, (2, 3))
    assert torch.equal(whole, rest)
