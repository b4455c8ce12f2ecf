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
from laid.training.data import Piece
from laid.training.engine import start
from laid.training.step import forward_backward, lesson_of
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
    method, training = TrainedMethod(**METHODS[name]), settings(checkpointing, dtype=dtype)
    number, (tokens, visual) = getattr(torch, dtype), FEW[dtype]
    engine = start(training)
    model = make_trainable(meta_model(student, dtype, device="cpu"), method.lora, training).train()
    lesson = lesson_of(model, method, FixedTeacher(teacher, 2))

    def apart():
        learned = [p for m in lesson.learned.values() for p in m.parameters()]
        return [p for p in model.parameters() if p.requires_grad], learned

    def adamw():
        return torch.optim.AdamW([{"params": group} for group in apart() if group], fused=True)

    lesson.student, optimizer = engine.prepare(lesson.student, lesson.learned.values(), adamw)
    inputs = meta_batch(student, 2, tokens, visual, number, "cpu")
    labels = torch.ones(2, 2, dtype=torch.long)

    def step():
        forward_backward(lesson, Piece.of([0, 1], inputs, labels), 0.5, engine)

    step()
    engine.step(optimizer, *apart(), 1.0)
    step()
    everything = [*model.parameters(), *(p for m in lesson.learned.values() for p in m.parameters())]
    states = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in everything if p.grad is not None]
    given = [inputs.ids, inputs.positions, inputs.image_mask, inputs.features]
    standing = held([*everything, *model.buffers(), *gradients, *states, *given])
    peaks = []
    for _ in range(REPEATS):
        dist.barrier()
        peaks.append(peak_bytes(step))
    cost = training_step(student, teacher, method, training, tokens, visual, sharded=True)
    member = Member(student, "")
    need = Need(member.parameters, dtype, tokens, cost.trained, devices=dist.get_world_size())
    need.memory += cost.peak
    shard(need, member, adapter=method.lora is not None)
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
