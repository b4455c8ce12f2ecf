"""A model over several GPUs that all compute at once: tensor parallelism by transformers' own plan (`base_model_tp_plan`).

Every process runs the whole verb on the same questions. Each holds its share of every layer's heads, keys and values and of its
feed-forward network; what a layer gives is summed over all of them, so that all go on with the same numbers. The first
process alone writes. torchrun starts them: by hand, or called by `start_processes` where a model does not fit one GPU.

    torchrun --standalone --nproc_per_node 2 -m laid evaluate --model Qwen/Qwen2.5-VL-32B-Instruct ...
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from laid.errors import LaidError
from laid.progress import Progress

PATIENCE = datetime.timedelta(hours=1)  # until a process that waits for the others gives up
_joined = False


def launched() -> int:
    """How many processes a launcher started for this verb; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> str:
    """Make this process one of those that share its models from now on; its device. Without a launcher, `device`.

    All but the first say nothing.
    """
    global _joined
    if launched() == 1:
        return device
    if device != "cpu":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=PATIENCE)
    _joined = True
    if not first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        Progress.silent = True
    return device


def world() -> int:
    """How many processes share a model; 1 in a training, whose processes each have their own."""
    return dist.get_world_size() if _joined else 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not _joined or dist.get_rank() == 0


def agree(value: Callable[[], Any]) -> Any:
    """What `value` gives in the first process, which alone calls it."""
    found = [value() if first() else None]
    if world() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def all_heads(x: Tensor) -> Tensor:
    """x (batch, heads of this process, tokens, head_dim) with the heads of all processes, in the model's order."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)


def processes(config: PreTrainedConfig, gpus: int) -> int:
    """How many of `gpus` can share a model: each needs as many heads as the others. 1 where transformers has no plan for it."""
    text = config.get_text_config()
    if not text.base_model_tp_plan:
        return 1
    heads = (text.num_attention_heads, text.num_key_value_heads)
    return max(n for n in range(1, max(1, gpus) + 1) if not any(count % n for count in heads))


def require_shares(source: str, config: PreTrainedConfig) -> None:
    """Raise LaidError, one line, where a model cannot be shared by the processes that were started."""
    if processes(config, world()) != world():
        text = config.get_text_config()
        raise LaidError(
            f"{source}: {text.num_attention_heads} heads and {text.num_key_value_heads} key heads cannot be shared by"
            f" {world()} processes"
            + (
                ": start a number that divides both"
                if text.base_model_tp_plan
                else ": transformers has no plan for it"
            )
        )


def start_processes(count: int, words: list[str]) -> None:
    """Become the launcher of `count` processes of `laid` with these words; it ends when they do. Does not return."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [*command, "-m", "laid", *words])
