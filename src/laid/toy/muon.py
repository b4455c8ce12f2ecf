"""Muon in float32, for matrices on CPUs.

`torch.optim.Muon` orthogonalises in bfloat16, which CPUs without bfloat16 units emulate: 0.5 s a step for a
model that takes 0.1 s to differentiate. The arithmetic here is the same (torch/optim/_muon.py,
match_rms_adamw), in float32 and with all matrices of one shape in one batched product; tests compare the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.775, 2.0315)  # Newton-Schulz quintic of Jordan et al. 2024


def orthogonalise(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """U V^T of each matrix's SVD, approximately, for `matrices` (N, rows, columns): Newton-Schulz."""
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix, scaled to AdamW's update size (0.2 sqrt(max(rows, columns)))."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                buffers = []
                for matrix in matrices:
                    state = self.state[matrix]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                    buffers.append(state["momentum_buffer"])
                gradients = [matrix.grad for matrix in matrices]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates = orthogonalise(
                    torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
                )
                scale = 0.2 * max(shape) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates.unbind()), alpha=-group["lr"] * scale)
