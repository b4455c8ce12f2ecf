"""The student in pieces by DeepSpeed's ZeRO stage 3, through Accelerate's plug-in (configs/accelerate/zero3.yaml).

Of DeepSpeed only the engine is used: pieces, gathering, the sum of gradients. Clipping is ours, because a step's norm counts what is
learned beside the student too; checkpoints are ours, because another number of processes, or fsdp2, is to go on from them.
`laid.training.engine.shard` (torch's own) lays the same out and needs nothing installed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from laid.errors import LaidError
from laid.models.decoder import vision_tower
from laid.training.engine import Engine
from laid.training.student import compute_in

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # not read: pieces and shares of a batch are laid.training.engine's
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        # Small weights would stay whole everywhere, in copies that a restored checkpoint had to reach as well.
        "stage3_param_persistence_threshold": 0,
    },
}


class Zero3(Engine):
    """Weights, gradients and optimiser state in pieces; DeepSpeed gathers a module's weights when it runs.

    What is learned beside the student (w, gains) stays whole everywhere, and so does a vision tower that is not trained.
    Trained weights are float32 and gathered as such; a pass in another format runs under autocast.
    """

    asks = False

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype) -> None:
        super().__init__(accelerator, dtype)
        # The plug-in has transformers cut up what it loads; students, and a teacher, are loaded whole.
        unset_hf_deepspeed_config()

    @staticmethod
    def precision(dtype: str) -> str:
        """Always float32 to DeepSpeed: its own bfloat16 mode would round the trained weights."""
        return "no"

    @staticmethod
    def plugins() -> dict[str, Any]:
        require_deepspeed()
        plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False)
        plugin.deepspeed_config.update(CONFIG)
        return {"deepspeed_plugin": plugin}

    def prepare(
        self,
        student: nn.Module,
        learned: Iterable[nn.Module],
        optimizer: Callable[[], torch.optim.Optimizer],
    ) -> tuple[nn.Module, Any]:
        whole = optimizer()
        groups, kind = whole.param_groups, type(whole)
        own = {id(p) for p in student.parameters()}
        theirs, beside = (
            [g for g in groups if (id(g["params"][0]) in own) is mine] for mine in (True, False)
        )
        weights = [p for g in theirs for p in g["params"]]
        tower = vision_tower(student)
        kept = [] if any(p.requires_grad for p in tower.parameters()) else [tower]
        compute_in(student, self.dtype, self.device)
        self._student_alone = lambda: _left_out(student, kept)
        with self._student_alone():
            self.engine, wrapped = self.accelerator.prepare(student, kind(theirs))
        self.zero = wrapped.optimizer
        for module in (*learned, *kept):
            module.to(self.device)
        self.beside = kind(beside) if beside else None
        return self.engine, _Optimizers(weights, self.zero, self.beside)

    # ---------------------------------------------------------------- a step

    def accumulating(self, student: nn.Module, last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # Not Accelerate's backward, which would step, and clip by the student's norm alone, at the last piece.
        self.engine.backward(loss * self.world)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Sequence[nn.Parameter],
        beside: Sequence[nn.Parameter],
        limit: float,
    ) -> float:
        from deepspeed.utils import safe_get_local_grad

        self.average(beside)
        pieces = [self._filled(p, safe_get_local_grad(p)) for p in weights]
        whole = [p.grad for p in beside]
        (squares,) = self.sum([_square(pieces)])
        norm = (squares + _square(whole)) ** 0.5
        if norm > limit:
            for gradient in (*whole, *pieces):
                gradient.mul_(limit / norm)
        with self._student_alone():
            self.engine.step()
        if self.beside is not None:
            self.beside.step()
            self.beside.zero_grad(set_to_none=True)
        return norm

    # ---------------------------------------------------------------- whole tensors, for checkpoints

    def whole(self, tensor: Tensor) -> Tensor:
        return super().whole(self.zero.get_full_hp_param(tensor) if _in_pieces(tensor) else tensor)

    @torch.no_grad()
    def set_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        if not _in_pieces(parameter):
            return super().set_(parameter, whole)
        piece = self._cut(parameter, whole)
        parameter.ds_tensor.data.copy_(piece)
        self.zero.set_local_hp_param(piece, parameter)  # the optimiser steps a copy of its own
        return None

    def optimizer_tensors(self, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        number = -1
        for number, parameter in enumerate(optimizer.student):
            state = self.zero.optimizer.state.get(self._flat(parameter), {})
            for key, value in state.items():
                # One count of steps serves all weights of a group; in a checkpoint each has its own.
                value = self.zero.get_full_hp_param(parameter, key) if value.ndim else value.clone()
                yield f"{number}/{key}", super().whole(value)
        if self.beside is not None:
            for name, tensor in super().optimizer_tensors(self.beside):
                at, _, key = name.partition("/")
                yield f"{number + 1 + int(at)}/{key}", tensor

    @torch.no_grad()
    def restore_optimizer(self, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        after = len(optimizer.student)
        for name, tensor in tensors.items():
            at, _, key = name.partition("/")
            if int(at) >= after:
                continue
            parameter = optimizer.student[int(at)]
            flat = self._flat(parameter)
            state = self.zero.optimizer.state[flat]
            if not tensor.ndim:
                state[key] = tensor.to(flat.device)
                continue
            if key not in state:  # as the first step would
                state[key] = torch.zeros_like(flat)
            self.zero.set_local_hp_param(self._cut(parameter, tensor), parameter, key)
        if self.beside is not None:
            numbered = ((name.partition("/"), t) for name, t in tensors.items())
            rest = {f"{int(at) - after}/{key}": t for (at, _, key), t in numbered if int(at) >= after}
            super().restore_optimizer(self.beside, rest)

    def _flat(self, parameter: nn.Parameter) -> Tensor:
        """The tensor that DeepSpeed's optimiser steps: pieces of many weights."""
        group, _, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group]

    def _filled(self, parameter: nn.Parameter, piece: Tensor) -> Tensor:
        """Of this process's piece of a weight, what is not padding: pieces are of one size."""
        start = self.rank * parameter.partition_numel()
        return piece.flatten()[: max(0, parameter.ds_numel - start)]

    def _cut(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This process's piece of a whole tensor, padded."""
        size = parameter.partition_numel()
        piece = torch.zeros(size, dtype=torch.float32, device=parameter.ds_tensor.device)
        mine = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        piece[: len(mine)] = mine
        return piece


class _Optimizers:
    """DeepSpeed's optimiser of the student and ours of what is learned beside it, by their groups.

    student: weights in pieces, in the order of a whole optimiser's state.
    """

    def __init__(self, student: list[nn.Parameter], zero: Any, beside: torch.optim.Optimizer | None):
        self.student, self.zero, self.beside = student, zero, beside

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.zero.param_groups, *(self.beside.param_groups if self.beside is not None else ())]


def _in_pieces(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


@contextmanager
def _left_out(root: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these are no part of `root`, so that DeepSpeed neither cuts them up nor looks for its marks on them."""
    places = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
        if any(child is module for module in modules)
    ]
    for parent, name, _ in places:
        parent._modules[name] = nn.Module()
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _square(gradients: Sequence[Tensor]) -> float:
    return float(nn.utils.get_total_norm(gradients)) ** 2 if gradients else 0.0


def require_deepspeed() -> None:
    """Raise LaidError where DeepSpeed is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise LaidError(
            'DeepSpeed is asked for, but not installed: pip install "laid[zero3]", or launch with'
            " configs/accelerate/fsdp2.yaml"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of DeepSpeed's own calls, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
