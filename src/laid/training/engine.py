"""The processes of one run, on Accelerate.

Accelerate starts them (`accelerate launch --config_file configs/accelerate/....yaml -m laid train ...`), knows devices and
mixed precision, averages gradients, clips, gathers, and hands logs to trackers. The layout is that of its file:

    one_gpu.yaml                   one process
    ddp.yaml, several_machines     every process holds the whole student (DistributedDataParallel)
    fsdp2.yaml                     weights, gradients and optimiser state lie in pieces (`shard` below)
    zero3.yaml                     the same by DeepSpeed (laid.training.zero3)

A step has the same samples in the same pieces whatever the number of processes: the batch is cut into pieces of
training.per_device_batch, and process r of n takes the pieces r, r + n, r + 2n ..., several in one forward pass where
training.tokens_per_pass says so. Every piece's loss counts by its
share of the batch, so that gradients and logged losses are the one-process ones up to the order of a sum.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    patch_environment,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from laid.errors import LaidError
from laid.models.decoder import text_model, vision_tower
from laid.settings.training import Training

PATIENCE = datetime.timedelta(hours=1)  # until a process that waits for the others gives up


def launched() -> int:
    """How many processes a launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _asked(what: str) -> bool:
    return launched() > 1 and os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def start(training: Training, device: str = "cpu", log_folder: str | os.PathLike | None = None) -> Engine:
    """Join the run that a launcher started, or be its only process.

    device: cpu or cuda; of several processes, the r-th takes the r-th GPU of its machine. log_folder: where trackers keep
    what they keep in files. Raises LaidError where there are more processes than GPUs.
    """
    world, cpu = launched(), device == "cpu"
    local, there = int(os.environ.get("LOCAL_WORLD_SIZE", world)), torch.cuda.device_count()
    if not cpu and world > 1 and local > there:
        raise LaidError(
            f"{local} processes on this machine, but it has {there} GPUs: start as many processes as GPUs"
            " (accelerate launch --num_processes, resources.train.gpu)"
        )
    # Accelerate keeps one state a process; another run of this process may compute in another format.
    AcceleratorState._reset_state(reset_partial_state=world == 1)
    if _asked("DEEPSPEED"):
        from laid.training.zero3 import Zero3 as kind
    else:
        kind = Engine
    handlers = [
        # DeepSpeed has no CPU backend that Accelerate would find by itself.
        InitProcessGroupKwargs("gloo" if cpu else "nccl" if _asked("DEEPSPEED") else None, timeout=PATIENCE),
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    with patch_environment(accelerate_torch_device=device) if world == 1 else nullcontext():
        accelerator = Accelerator(
            cpu=cpu and not _asked("DEEPSPEED"),
            mixed_precision=kind.precision(training.dtype),
            kwargs_handlers=handlers if world > 1 else None,
            log_with=training.trackers or None,
            project_dir=log_folder,
            **kind.plugins(),
        )
    missing = set(training.trackers) - {str(tracker) for tracker in accelerator.log_with}
    if missing:  # Accelerate would leave them out without a word
        raise LaidError(f"training.trackers: {min(missing)} is not installed: pip install {min(missing)}")
    return kind(accelerator, getattr(torch, training.dtype))


class Engine:
    """This process among those of its run.

    rank, world, main: its number, how many there are, whether it is the one that writes. device: where it computes.
    load_device: where its student is loaded to. dtype: of the student's passes; trained weights are kept in float32 all the
    same, because a step of 1e-5 is lost in a bfloat16 weight. sharded: no process holds the whole student. asks: it can be
    asked on the way (training.validation).
    """

    asks = True

    def __init__(self, accelerator: Accelerator, dtype: torch.dtype = torch.float32) -> None:
        self.accelerator, self.dtype = accelerator, dtype
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.sharded = _asked("FSDP") or accelerator.distributed_type == DistributedType.DEEPSPEED
        # From there a student in pieces moves to the GPU layer by layer: the whole never lies on one GPU.
        self.load_device = "cpu" if self.sharded else str(self.device)

    @staticmethod
    def precision(dtype: str) -> str:
        """What Accelerate is told of training.dtype: passes run under its autocast, losses in float32."""
        return "bf16" if dtype == "bfloat16" else "no"

    @staticmethod
    def plugins() -> dict[str, Any]:
        return {}

    # ---------------------------------------------------------------- set-up

    def prepare(
        self,
        student: nn.Module,
        learned: Iterable[nn.Module],
        optimizer: Callable[[], torch.optim.Optimizer],
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Lay the student out over the processes; (its pass, the optimiser of what this process holds)."""
        if self.sharded:
            shard(student, learned, self.device, self.dtype)
        else:
            student = self.accelerator.prepare_model(student)
        return student, self.accelerator.prepare_optimizer(optimizer())

    def pieces(
        self, indices: Sequence[int], size: int, lengths: Sequence[int], tokens: int
    ) -> list[Sequence[int]]:
        """The parts of a batch that this process computes, one forward pass each, `size` samples or fewer.

        tokens: as many such parts together in one pass as have no more tokens than that, in any process, so that all make as
        many passes: sharded ones wait for one another in each. lengths: tokens of every sample.
        """
        if self.world > 1 and len(indices) % (size * self.world):
            raise LaidError(
                f"training.batch_size {len(indices)} is not a multiple of {self.world} processes x"
                f" training.per_device_batch {size}: set per_device_batch to {max(1, len(indices) // self.world)}"
                " or less, or start another number of processes"
            )
        parts = [indices[k : k + size] for k in range(0, len(indices), size)]
        by_process = [parts[rank :: self.world] for rank in range(self.world)]
        for together in range(len(by_process[0]), 1, -1):
            passes = [
                [[k for part in own[at : at + together] for k in part] for at in range(0, len(own), together)]
                for own in by_process
            ]
            if all(sum(lengths[k] for k in one) <= tokens for own in passes for one in own):
                return passes[self.rank]
        return by_process[self.rank]

    # ---------------------------------------------------------------- a step

    def accumulating(self, student: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Inside, gradients add up in this process; those of the step's last piece average them over the processes."""
        # In pieces they never add up whole: each pass sends its own to the process that keeps that part.
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(student)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to those of the step, which are averaged over the processes."""
        self.accelerator.backward(loss * self.world if self.world > 1 else loss)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Sequence[nn.Parameter],
        beside: Sequence[nn.Parameter],
        limit: float,
    ) -> float:
        """One optimiser step with gradients clipped to `limit`, by the norm over all; returns that norm.

        weights: the student's, whose gradients its wrapper has averaged. beside: w and gains, which no wrapper knows, since
        they work through hooks and stay whole.
        """
        self.average(beside)
        norm = self.accelerator.clip_grad_norm_([*weights, *beside], limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the processes."""
        if self.world > 1:
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    @torch.no_grad()
    def within(self, student: nn.Module, work: Callable[[nn.Module], Any]) -> Any:
        """What `work` makes of the student's model without learning from it; of a student in pieces, by every process alike."""
        found = student(work)
        if self.sharded:
            student.reshard()  # what is no layer's stays gathered, and rounded, until a backward pass
        return found

    # ---------------------------------------------------------------- between processes

    def sum(self, values: Iterable[float]) -> list[float]:
        """Each value summed over the processes."""
        found = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(found, "sum").tolist()

    def agree(self, value: Callable[[], Any]) -> Any:
        """What `value` gives in the main process, which alone calls it."""
        found = [value() if self.main else None]
        return broadcast_object_list(found)[0] if self.world > 1 else found[0]

    # ---------------------------------------------------------------- whole tensors, for checkpoints

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a weight or of its optimiser state in the main process, nothing elsewhere; every process calls it."""
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.cpu() if self.main else tensor.new_empty(0)

    @torch.no_grad()
    def set_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set a weight; each process takes its part."""
        parameter.copy_(_part(whole, parameter))

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
        """The optimiser's state as ("<number of the weight>/<name>", whole tensor), one by one; every process calls it."""
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                yield f"{number}/{key}", self.whole(value)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Set the optimiser's state to what `optimizer_tensors` gave; each process takes its part."""
        state = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            number, _, key = name.partition("/")
            state["state"].setdefault(int(number), {})[key] = _part(tensor, parameters[int(number)])
        optimizer.load_state_dict(state)


def _part(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """What this process holds of a whole tensor that is laid out as `parameter` is."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    whole = whole.to(parameter.to_local().device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard(student: nn.Module, learned: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Lay a student out in pieces by torch's fully_shard: one group per decoder layer, one for all the rest.

    Called here because Accelerate's own FSDP2 becomes DistributedDataParallel without a GPU (1.15): what runs on GPUs would
    not be what the tests run. What is learned beside the student, few and small, stays whole everywhere, and so does a vision
    tower that is not trained, which thus computes features whenever a process needs some.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    tower = vision_tower(student)
    trained_tower = any(p.requires_grad for p in tower.parameters())
    for module in (*learned, *(() if trained_tower else (tower,))):
        module.to(device)
    low = dtype if dtype != torch.float32 else None
    how = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None),
        "ignored_params": set() if trained_tower else set(tower.parameters()),
    }
    for layer in (*text_model(student).layers, *(tower.blocks if trained_tower else ())):
        fully_shard(layer, **how)
    fully_shard(student, **how)
