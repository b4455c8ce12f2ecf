"""One process of tests/plan/test_sharded.py: peak memory of steps under fsdp2, and what the plan says of them, as JSON."""

import gc
import json
import sys

import torch
import torch.distributed as dist
from test_steps import METHODS, FixedTeacher, settings, shrunk

from laid.plan.estimate import Member, Need, shard
from laid.plan.measure import peak_bytes
from laid.plan.shapes import meta_model
from laid.plan.steps import meta_batch, training_step
from laid.settings import TrainedMethod
from laid.training.losses import Losses
from laid.training.parallel import join
from laid.training.student import make_trainable

# Without bfloat16 instructions a processor takes 25 times as long in it: fewer tokens there.
FEW = {"float32": (128, 100), "bfloat16": (24, 16)}
REPEATS = 16  # gloo frees its buffers when it comes to it: the least of several is what a step needs


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(tensors):
    """Bytes of their storages in this process, each once."""
    storages = {s.data_ptr(): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}
    return sum(storages.values())


def compare(name, dtype, words, checkpointing):
    """{"measured", "planned"}: bytes of one process in a step, gradients of an earlier one in place."""
    student = shrunk(hidden=256, layers=4, heads=8, kv=8, mlp=1024, words=words)
    teacher = shrunk(hidden=256, layers=2, heads=8, kv=4, mlp=256, words=words)
    method, training = TrainedMethod(**METHODS[name]), settings(checkpointing) | {"dtype": dtype}
    number, (tokens, visual) = getattr(torch, dtype), FEW[dtype]
    parallel = join("fsdp2", "cpu", number)
    model = make_trainable(meta_model(student, dtype, device="cpu"), method["lora"], training).train()
    losses = Losses(model, method, FixedTeacher(teacher, 2), parallel)
    losses.to_fit = False

    def optimizer():
        apart = [list(model.parameters()), [p for m in losses.learned().values() for p in m.parameters()]]
        groups = [[p for p in group if p.requires_grad] for group in apart]
        return torch.optim.AdamW([{"params": group} for group in groups if group], fused=True)

    forward, optimizer = parallel.prepare(losses, optimizer)
    inputs = meta_batch(student, 2, tokens, visual, number, "cpu")
    labels = torch.ones(2, 2, dtype=torch.long)

    def step():
        parallel.backward(losses.total(forward(inputs, labels, [0, 1], 0.5), 0.5))

    step()
    parallel.step(optimizer, [p for p in losses.parameters() if p.requires_grad], 1.0)
    step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in losses.parameters() if p.grad is not None]
    given = [inputs.ids, inputs.positions, inputs.image_mask, inputs.features]
    standing = held([*losses.parameters(), *losses.buffers(), *gradients, *states, *given])
    peaks = []
    for _ in range(REPEATS):
        dist.barrier()
        peaks.append(peak_bytes(step))
    cost = training_step(student, teacher, method, training, tokens, visual, sharded=True)
    member = Member(student, "")
    need = Need(member.parameters, dtype, tokens, cost.trained, devices=dist.get_world_size())
    need.memory += cost.peak
    shard(need, member, adapter=method["lora"] is not None)
    return {"measured": standing + min(peaks), "planned": need.bytes}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        plan = json.load(file)
    found = {}
    for key, case in plan["cases"].items():
        found[key] = compare(**case)
        gc.collect()
    if dist.get_rank() == 0:
        with open(plan["found"], "w", encoding="utf-8") as file:
            json.dump(found, file)
