"""One training run in several processes: who computes which samples, what is summed, what is sharded.

Alone       one process; every method does just what its name says.
Replicated  every process holds the whole student ("ddp").
Sharded     weights, gradients and optimiser state lie in pieces over the processes ("fsdp2": torch's fully_shard;
            "zero3": DeepSpeed's ZeRO stage 3, laid.training.zero3).

A step has the same samples in the same forward passes whatever the number of processes: the batch is cut into pieces
of training.per_device_batch, and process r of n takes the pieces r, r + n, r + 2n ... Every piece's loss counts by its
share of the batch, so that gradients and logged losses are the one-process ones up to the order of a sum.

The processes are started by `laid train --processes N` (laid.training.launch), by torchrun or by `accelerate launch`: all
set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Accelerate's own FSDP2 plug-in is not used: without a GPU
it silently becomes DistributedDataParallel, and what runs on GPUs would not be what the tests run.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from laid.errors import LaidError
from laid.models.decoder import text_model, vision_tower

if TYPE_CHECKING:
    from laid.training.losses import Losses

PATIENCE = datetime.timedelta(hours=1)  # until a process that waits for the others gives up


def join(strategy: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Alone:
    """This process's place in the run: alone, unless a launcher says otherwise.

    strategy: training.parallel. device: cpu or cuda; process r takes the r-th GPU of its machine. Raises LaidError
    where there are more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Alone(device, dtype)
    if device.startswith("cuda"):
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise LaidError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', world)} processes on this machine, but it has {there} GPUs:"
                " start as many processes as GPUs (resources.train.gpu, --processes)"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if strategy == "zero3":
        from laid.training.zero3 import Zero3 as kind
    else:
        kind = {"ddp": Replicated, "fsdp2": Sharded}[strategy]
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return kind(device, dtype)


class Alone:
    """One process.

    rank, world, main: this process's number, how many there are, whether it is the one that writes. device: where it
    computes. load_device: where its student is loaded to. dtype: of the student's passes; trained weights are kept in
    float32 all the same, because a step of 1e-5 is lost in a bfloat16 weight.
    sharded: no process holds the whole student.
    """

    sharded = False

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.device, self.load_device, self.dtype = device, device, dtype
        self.rank, self.world, self.main = 0, 1, True

    # ---------------------------------------------------------------- set-up

    def prepare(
        self, losses: Losses, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> tuple[Callable[..., dict[str, Tensor]], torch.optim.Optimizer]:
        """Lay the student out over the processes; (what a pass calls, the optimiser of what this process holds)."""
        losses.autocast = self.dtype if self.dtype != torch.float32 else None
        return losses, optimizer()

    def pieces(self, indices: Sequence[int], size: int) -> list[Sequence[int]]:
        """The parts of a batch that this process computes, one forward pass each, `size` samples or fewer."""
        return [indices[k : k + size] for k in range(0, len(indices), size)]

    # ---------------------------------------------------------------- a step

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to those of the step."""
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], limit: float) -> float:
        """One optimiser step with gradients clipped to `limit`; returns their norm before."""
        norm = nn.utils.clip_grad_norm_(trained, limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    # ---------------------------------------------------------------- between processes

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        return list(values)

    def agree(self, value: Callable[[], Any]) -> Any:
        """What `value` gives in the main process, which alone calls it."""
        return value()

    @contextmanager
    def set_by_main(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside, weights of `laid.training.losses` lie whole; what the main process sets them to holds for all."""
        yield

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a weight or of its optimiser state, where this process writes; every process calls it."""
        return tensor.detach()

    def part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """What this process holds of a whole tensor that is laid out as `parameter` is."""
        return whole

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
        """The optimiser's state as ("<number of the weight>/<name>", whole tensor), one by one; every process calls it."""
        for number, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if torch.is_tensor(value):
                    yield f"{number}/{key}", self.whole(value)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Set the optimiser's state to what `optimizer_tensors` gave; each process takes its part."""
        state = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            number, _, key = name.partition("/")
            state["state"].setdefault(int(number), {})[key] = self.part(tensor, parameters[int(number)])
        optimizer.load_state_dict(state)

    @torch.no_grad()
    def set_(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set a weight; each process takes its part."""
        parameter.copy_(self.part(whole, parameter))


class Replicated(Alone):
    """Every process holds the whole student; gradients are averaged once per step.

    Not torch's DistributedDataParallel: what it gains, sending while backward still runs, is small where a step is
    several backward passes, and it knows nothing of hooks that skip its forward.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__(device, dtype)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0

    def pieces(self, indices: Sequence[int], size: int) -> list[Sequence[int]]:
        if len(indices) % (size * self.world):
            raise LaidError(
                f"training.batch_size {len(indices)} is not a multiple of {self.world} processes x"
                f" training.per_device_batch {size}: set per_device_batch to {max(1, len(indices) // self.world)}"
                " or less, or start another number of processes"
            )
        return super().pieces(indices, size)[self.rank :: self.world]

    def backward(self, loss: Tensor) -> None:
        (loss * self.world).backward()  # gradients are averaged over the processes

    def step(self, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], limit: float) -> float:
        given = [p.grad for p in trained if p.grad is not None]
        local = [g.to_local() for g in given if isinstance(g, DTensor)]
        norm = self._clip(local, [g for g in given if not isinstance(g, DTensor)], limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self, pieces: Sequence[Tensor], replicated: Sequence[Tensor], limit: float) -> float:
        """Average what every process has a gradient of, then clip all to `limit`; their norm before.

        pieces: this process's, of gradients that lie in pieces and are averaged already.
        """
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in replicated]:
            work.wait()
        for gradient in replicated:
            gradient.div_(self.world)
        (squares,) = self.sum([_square(pieces)])
        norm = (squares + _square(replicated)) ** 0.5
        if norm > limit:
            for gradient in (*replicated, *pieces):
                gradient.mul_(limit / norm)
        return norm

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, value: Callable[[], Any]) -> Any:
        found = [value() if self.main else None]
        dist.broadcast_object_list(found)
        return found[0]

    def _here(self, whole: Tensor) -> Tensor:
        """A whole tensor where it is to be written, nothing elsewhere."""
        return whole.detach().cpu() if self.main else whole.new_empty(0)

    @contextmanager
    def set_by_main(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        yield
        for parameter in parameters:
            dist.broadcast(parameter.detach(), 0)


class Sharded(Replicated):
    """The student in pieces, by torch's fully_shard: one group per decoder layer, one for all the rest.

    A layer's weights are gathered for its forward and again for its backward; gradients go straight to the process
    that keeps their part. Few and small, the weights of laid.training.losses itself (w, gains) stay whole everywhere,
    and so does a vision tower that is not trained, which thus computes features whenever a process needs some.
    """

    sharded = True

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__(device, dtype)
        # From there it moves to the GPU layer by layer: the whole never lies on one GPU.
        self.load_device = "cpu"

    def prepare(self, losses, optimizer):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kept = [*losses.learned().values()]
        tower = vision_tower(losses.model)
        trained_tower = any(p.requires_grad for p in tower.parameters())
        if not trained_tower:
            kept.append(tower)
        for module in kept:
            module.to(self.device)
        low = self.dtype if self.dtype != torch.float32 else None
        how = {
            "mesh": init_device_mesh(torch.device(self.device).type, (self.world,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None),
            "ignored_params": {p for module in kept for p in module.parameters()},
        }
        for layer in (*text_model(losses.model).layers, *(tower.blocks if trained_tower else ())):
            fully_shard(layer, **how)
        fully_shard(losses, **how)
        return losses, optimizer()

    def whole(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            tensor = tensor.detach().full_tensor()
        return self._here(tensor)

    def part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
            return whole
        return distribute_tensor(
            whole.to(self.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )


def _square(gradients: Sequence[Tensor]) -> float:
    return float(nn.utils.get_total_norm(gradients)) ** 2 if gradients else 0.0
