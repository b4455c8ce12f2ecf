"""Head-level alignment of student queries and keys to learned mixtures of teacher heads (paper, eq. 3, 5, 7)."""

from __future__ import annotations

import torch
from torch import nn

from laid.errors import LaidError

KEY_WEIGHTS = ("shared", "own")
NORMS = ("mean", "frobenius")


class HeadAlignment(nn.Module):
    """|| Q^s_i - sum_j w_ij Q^t_j ||^2 + || K^s_i - sum_j w_ij K^t_j ||^2 for one (student layer, teacher layer) pair.

    key_weights: "shared" is the paper's formula: keys are repeated to query heads and mixed by the same w.
        "own" gives keys their own weights, (student_kv_heads, teacher_kv_heads), and sums over KV heads.
    projection: learn a map from the teacher's head_dim to the student's; needed where they differ. It starts by
        picking, for each student frequency, the teacher pair of nearest wavelength.

    The paper calls w learnable and says neither how it starts nor that rows sum to one: w is free here. Every w_ij starts
    at 1/h_t, so that all heads first see the same target.
    Passing rotated tensors instead gives the same number when both models share RoPE, because a rotation
    is common to all heads of a token and keeps lengths (not so with a projection, which mixes pairs).
    Parameters: w (student_heads, teacher_heads); w_key if "own"; map_q, map_k (head_dim_s, head_dim_t) if projection.
    Raises LaidError when head_dim differs without projection, or on an unknown option.
    """

    def __init__(
        self,
        student_heads: int,
        student_kv_heads: int,
        teacher_heads: int,
        teacher_kv_heads: int,
        head_dim_s: int,
        head_dim_t: int,
        key_weights: str = "shared",
        projection: bool = False,
    ) -> None:
        super().__init__()
        if key_weights not in KEY_WEIGHTS:
            raise LaidError(f"alignment: key_weights is {key_weights!r}, allowed: {', '.join(KEY_WEIGHTS)}")
        if head_dim_s != head_dim_t and not projection:
            raise LaidError(
                f"student head_dim {head_dim_s} and teacher head_dim {head_dim_t} differ: their heads cannot be"
                " compared; set projection=True (alignment.projection: true) to learn a map, or pick models of equal head_dim"
            )
        self.heads_s, self.kv_s = student_heads, student_kv_heads
        self.heads_t, self.kv_t = teacher_heads, teacher_kv_heads
        self.dim_s, self.dim_t, self.key_weights = head_dim_s, head_dim_t, key_weights
        self.w = nn.Parameter(_even(student_heads, teacher_heads))
        if key_weights == "own":
            self.w_key = nn.Parameter(_even(student_kv_heads, teacher_kv_heads))
        if projection:
            self.map_q = nn.Parameter(_same_wavelength(head_dim_s, head_dim_t))
            self.map_k = nn.Parameter(_same_wavelength(head_dim_s, head_dim_t))

    def forward(
        self,
        q_s: torch.Tensor,
        k_s: torch.Tensor,
        q_t: torch.Tensor,
        k_t: torch.Tensor,
        mask: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        norm: str = "mean",
        normalize: bool = True,
        block: int = 1024,
    ) -> torch.Tensor:
        """The query term plus the key term: a float32 scalar (float64 for float64 inputs).

        q_s: (batch, student_heads, tokens, head_dim_s); k_s: (batch, student_kv_heads, tokens, head_dim_s).
        q_t: (batch, teacher_heads, tokens, head_dim_t); k_t: (batch, teacher_kv_heads, tokens, head_dim_t).
        mask: (batch, tokens), true where a token counts (None: all). token_weights: (batch, tokens), not negative.
        norm: "mean" averages over counted tokens (by weight), heads and dimensions; "frobenius" sums over tokens,
            heads and dimensions as printed in eq. 7 and averages over the batch.
        normalize: divide each term by what its teacher tensor itself measures in the same norm, put on the student's
            head count and head_dim: the mean square of a teacher element. The result is a relative error, 1 for a
            student at zero, whatever width, head count, length or scale the models have; both norms then agree.
        block: tokens held in float32 at a time.
        Gradients go to the student and to what is learned here; the teacher's tensors are constants.
        Raises LaidError on shapes that do not fit this alignment and when no token counts.
        """
        if norm not in NORMS:
            raise LaidError(f"alignment: norm is {norm!r}, allowed: {', '.join(NORMS)}")
        self._check(q_s, k_s, q_t, k_t)
        weight = _token_weights(q_s, mask, token_weights)
        # Mixing keys repeated to query heads is mixing the keys themselves by w summed over each group.
        collapsed = self.w.view(self.heads_s, self.kv_t, -1).sum(-1)
        if self.key_weights == "shared":
            key_mix, copies = collapsed, self.heads_s // self.kv_s
        else:
            key_mix, copies = self.w_key, 1
        map_q, map_k = getattr(self, "map_q", None), getattr(self, "map_k", None)
        total = 0.0
        for s, t, mix, project, repeat in ((q_s, q_t, self.w, map_q, 1), (k_s, k_t, key_mix, map_k, copies)):
            error, power = _sums(s, t, mix, project, repeat, weight, block)
            elements = s.shape[1] * repeat * s.shape[3]
            if normalize:
                scale = (power / (t.shape[1] * t.shape[3])).clamp_min(torch.finfo(power.dtype).tiny)
                term = error / elements / scale
            elif norm == "mean":
                term = error / (weight.sum() * elements)
            else:
                term = error / s.shape[0]
            total = total + term
        return total

    def _check(self, q_s, k_s, q_t, k_t) -> None:
        wanted = {
            "student queries": (q_s, self.heads_s, self.dim_s),
            "student keys": (k_s, self.kv_s, self.dim_s),
            "teacher queries": (q_t, self.heads_t, self.dim_t),
            "teacher keys": (k_t, self.kv_t, self.dim_t),
        }
        batch, tokens = q_s.shape[0], q_s.shape[2]
        for name, (x, heads, dim) in wanted.items():
            expected = (batch, heads, tokens, dim)
            if tuple(x.shape) != expected:
                raise LaidError(
                    f"alignment: {name} have shape {tuple(x.shape)}, expected {expected} (batch, heads, tokens,"
                    " head_dim): both models must see the same tokens, and the heads must be those it was made for"
                )


def _token_weights(
    q_s: torch.Tensor, mask: torch.Tensor | None, token_weights: torch.Tensor | None
) -> torch.Tensor:
    """(batch, tokens) of non-negative weights, zero where the mask says so."""
    batch, _, tokens, _ = q_s.shape
    dtype = torch.float64 if q_s.dtype == torch.float64 else torch.float32
    weight = torch.ones(batch, tokens, device=q_s.device, dtype=dtype)
    if token_weights is not None:
        weight = weight * token_weights.to(dtype)
    if mask is not None:
        weight = weight * mask.to(dtype)
        if not bool(mask.any()):
            raise LaidError(f"alignment: none of the {batch} x {tokens} tokens is counted: the mask is empty")
    return weight


def _sums(s, t, mix, project, repeat, weight, block):
    """(weighted squared error over all, weighted squared teacher norm), summed over tokens in blocks."""
    wide = weight.dtype
    mix = mix.to(wide)
    project = None if project is None else project.to(wide)
    error, power = _Error.apply(s, t.detach(), mix, project, repeat, weight, block)
    return error, power


class _Error(torch.autograd.Function):
    """The sums of `_sums`. Their gradients are as large as the student's tensor and come with the same pass, so they are made
    in it: neither the teacher's heads nor anything in float32 stays until backward. The teacher's tensor is a constant.
    """

    @staticmethod
    def forward(ctx, s, t, mix, project, repeat, weight, block):
        batch, heads, tokens, dim = s.shape
        error, power = weight.new_zeros(()), weight.new_zeros(())
        wanted = ctx.needs_input_grad
        # Tokens before heads, as projections lay them out.
        of_s = torch.empty(batch, tokens, heads, dim, dtype=s.dtype, device=s.device) if wanted[0] else None
        of_mix = torch.zeros_like(mix) if wanted[2] else None
        of_project = torch.zeros_like(project) if wanted[3] else None
        for start in range(0, tokens, block):
            part = slice(start, min(tokens, start + block))
            counted = weight[:, part, None]
            # (heads, batch, tokens, head_dim) of a block; a mixture of heads is then one product of matrices.
            own, theirs = (x[:, :, part].transpose(0, 1).to(weight.dtype).contiguous() for x in (s, t))
            power += (theirs.square().sum((0, 3)) * counted[..., 0]).sum()
            mapped = theirs if project is None else theirs @ project.T
            gap = (mix @ mapped.flatten(1)).view(heads, repeat, *mapped.shape[1:]).neg_().add_(own[:, None])
            error += (gap.square().sum((0, 1, 4)) * counted[..., 0]).sum()
            if not any(wanted):
                continue
            gap *= 2 * counted
            if of_s is not None:
                of_s[:, part] = gap.sum(1).permute(1, 2, 0, 3)
            of_target = gap.view(heads * repeat, -1)
            if of_mix is not None:
                of_mix -= of_target @ mapped.flatten(1).T
            if of_project is not None:
                of_mapped = (mix.T @ of_target).view(-1, mapped.shape[-1])
                of_project -= of_mapped.T @ theirs.view(-1, theirs.shape[-1])
        ctx.save_for_backward(of_s, of_mix, of_project)
        ctx.mark_non_differentiable(power)
        return error, power

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_error, _of_power):
        of_s, of_mix, of_project = (
            None if x is None else x * of_error.to(x.dtype) for x in ctx.saved_tensors
        )
        of_s = None if of_s is None else of_s.transpose(1, 2)
        return of_s, None, of_mix, of_project, None, None, None


def _even(rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) of starting weights, each row summing to one."""
    return torch.full((rows, columns), 1.0 / columns)


def _same_wavelength(dim_s: int, dim_t: int) -> torch.Tensor:
    """(dim_s, dim_t) selection: student pair f takes the teacher pair whose frequency base^(-2f/dim) is nearest."""
    half_s, half_t = dim_s // 2, dim_t // 2
    source = (torch.arange(half_s) * dim_t / dim_s).round().long().clamp_max(half_t - 1)
    chosen = torch.zeros(dim_s, dim_t)
    chosen[torch.arange(half_s), source] = 1.0
    chosen[torch.arange(half_s) + half_s, source + half_t] = 1.0
    return chosen
