"""A run over several processes by DeepSpeed, ZeRO stage 3: the alternative to fully_shard, where it is installed.

DeepSpeed hooks every module and gathers its weights whenever it runs, so all processes must run the same modules equally
often: features of images are computed in every step (one pass of the vision tower per piece of a batch), frozen or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from laid.distill.parallel import Replicated
from laid.errors import LaidError

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeRO3(Replicated):
    """Weights, gradients and optimiser state in pieces. Raises LaidError where DeepSpeed is not installed."""

    images_in_step = sharded = True

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32):
        if find_spec("deepspeed") is None:
            raise LaidError(
                "training.parallel is deepspeed, which is not installed: `pip install deepspeed`, or set it to fsdp2"
            )
        super().__init__(device, dtype)
        self.load_device = "cpu"
        self.left = 0  # pieces of this step that are still to come

    def prepare(self, losses, optimizer):
        import deepspeed

        inner = optimizer()
        groups = [{"params": list(group["params"]), "lr": group["lr"]} for group in inner.param_groups]
        self.engine, sharded, _, _ = deepspeed.initialize(
            model=losses,
            optimizer=inner,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only for its own throughput messages
                "gradient_accumulation_steps": 1,  # `backward` says itself which piece is the step's last
                "bf16": {"enabled": self.dtype == torch.bfloat16},
                "zero_optimization": {"stage": 3},
                "zero_allow_untested_optimizer": True,
            },
        )
        return self.engine, Moments(self, sharded, inner, groups)

    def pieces(self, indices: Sequence[int], size: int) -> list[Sequence[int]]:
        found = super().pieces(indices, size)
        self.left = len(found)
        return found

    def backward(self, loss: Tensor) -> None:
        self.left -= 1
        self.engine.set_gradient_accumulation_boundary(self.left == 0)
        self.engine.backward(loss * self.world)

    def step(self, optimizer: Moments, trained: Sequence[nn.Parameter], limit: float) -> float:
        optimizer.sharded.clip_grad = limit
        for group, inner in zip(optimizer.param_groups, optimizer.inner.param_groups, strict=True):
            inner["lr"] = group["lr"]
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def set_by_main(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        from deepspeed.utils import safe_set_local_fp32_param
        from deepspeed.zero import GatheredParameters

        parameters = list(parameters)
        with GatheredParameters(parameters, modifier_rank=0):
            yield
        for parameter in parameters:
            safe_set_local_fp32_param(parameter, parameter.ds_tensor.float())

    def whole(self, tensor: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if hasattr(tensor, "ds_id"):
            tensor = safe_get_full_fp32_param(tensor).view(tensor.ds_shape)
        return tensor.detach().cpu() if self.main else tensor.new_empty(0)

    @torch.no_grad()
    def set_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        if not hasattr(parameter, "ds_id"):  # of a student that is exported
            parameter.copy_(whole)
            return
        own = self.own(whole, parameter)
        parameter.ds_tensor.copy_(own)
        safe_set_local_fp32_param(parameter, own)

    def own(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """This process's flat part of a whole tensor, as DeepSpeed cuts `parameter`."""
        count = parameter.ds_tensor.numel()
        flat = torch.zeros(count * self.world, device=self.device)
        flat[: whole.numel()] = whole.flatten()
        return flat[count * self.rank : count * (self.rank + 1)]


class Moments:
    """DeepSpeed's optimiser with the state of a plain AdamW over whole parameters, as laid.distill.checkpoint keeps it.

    param_groups: {"params", "lr"} of the plain optimiser; the next step takes the learning rates from here.
    """

    def __init__(
        self, parallel: ZeRO3, sharded: Any, inner: torch.optim.Optimizer, groups: list[dict[str, Any]]
    ):
        self.parallel, self.sharded, self.inner, self.param_groups = parallel, sharded, inner, groups
        self.trained = [p for group in groups for p in group["params"]]
        self._set_steps(0)  # DeepSpeed makes the state by a step without gradients, and counts it

    def state_dict(self) -> dict[str, Any]:
        """{"state": {number of the parameter: {"step", "exp_avg", "exp_avg_sq"}}}, whole; every process calls it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = next(iter(self.inner.state.values()))["step"]
        if not int(steps):
            return {"state": {}}
        return {
            "state": {
                k: {"step": torch.tensor(float(steps))}
                | {name: safe_get_full_optimizer_state(p, name).view(p.ds_shape) for name in MOMENTS}
                for k, p in enumerate(self.trained)
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for k, entry in state["state"].items():
            for name in MOMENTS:
                own = self.parallel.own(entry[name], self.trained[k])
                safe_set_local_optimizer_state(self.trained[k], own, name)
            self._set_steps(float(entry["step"]))

    def _set_steps(self, steps: float) -> None:
        for entry in self.inner.state.values():
            entry["step"] = torch.full_like(torch.as_tensor(entry["step"]), steps)
