"""A rehearsal: the real code runs on the meta device, where tensors have shapes and no content; its bytes and FLOPs are counted.

Nothing is computed and nothing is held, so a step of a 32B model over 50,000 tokens is rehearsed on any machine in
seconds. Every operation passes through `Rehearsal`, which adds a storage's bytes when it appears, takes them off when
nothing refers to it any more (as a caching allocator would reuse them), and remembers what was alive at the worst
moment. Counted FLOPs are those of matrix products and attention, by torch's own formulae (torch.utils.flop_counter).

Fused attention has no meta form that holds no tokens x tokens tensor, so `scaled_dot_product_attention` is replaced by a
stand-in that allocates what the CUDA kernels do: output and log-sum-exp; in backward the three gradients and their
float32 workspace; a boolean mask in the queries' dtype, one to be added stays until backward. What reads a value (`if mask.any()`) is answered with
"true", and a boolean index takes every row: both occur on small tensors only, and choose between paths that cost alike.

Autocast passes over tensors of the meta device. Where it is part of the path, `as_if_real` makes torch's fake
tensors of them: they have no content either, but say that they lie on a CPU, so that torch's own autocast acts.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

# torch's own kernels, called by laid.models.attention: which argument says that they are causal.
FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention: 4,
    torch.ops.aten._scaled_dot_product_efficient_attention: 6,
}
PARTS = ("weights", "gradients", "optimizer", "activations", "teacher", "cache", "features")


@dataclass
class Cost:
    """What was rehearsed.

    stages: of each stretch of the pass, bytes alive at its worst moment, by part (PARTS). linear, attention: FLOPs of matrix
    products and of attention, half of tokens x tokens where it is causal. trained: weights that an optimiser changes.
    """

    stages: dict[str, Counter] = field(default_factory=dict)
    linear: int = 0
    attention: int = 0
    trained: int = 0

    @property
    def peak(self) -> Counter:
        """Bytes by part at the worst moment of all."""
        return max(self.stages.values(), key=_total, default=Counter())

    @property
    def bytes(self) -> int:
        return _total(self.peak)

    @property
    def flops(self) -> int:
        return self.linear + self.attention


def _total(memory: Counter) -> int:
    return sum(memory.values())


class Rehearsal(TorchDispatchMode):
    """Counts bytes and FLOPs of what runs inside it. Use `rehearse`, which also replaces attention."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()
        self.live: Counter = Counter()
        self.part = "activations"  # of what appears now
        self.stage = ""  # of the pass, in which it appears
        self._most: Counter = Counter()  # bytes, by stage
        self._part_of: dict[int, str] = {}  # a storage's number -> its part

    def add(self, tensor: Tensor, part: str | None = None) -> None:
        """Count a tensor's storage, once, until it is gone; `part` moves one that is counted already."""
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        before = self._part_of.get(number)
        if before is None:
            self._part_of[number] = part or self.part
            self.live[part or self.part] += size
            weakref.finalize(storage, self._gone, number, size)
        elif part is not None and part != before:
            self._part_of[number] = part
            self.live[before] -= size
            self.live[part] += size
        held = _total(self.live)
        if held > self._most[self.stage]:
            self._most[self.stage] = held
            self.cost.stages[self.stage] = Counter(self.live)

    def follow(self, student: nn.Module, text: nn.Module) -> None:
        """Tell apart what lies before, in and behind the pass of the decoder `text`, and the same of its backward pass.

        The worst moment of each lies in the same layer whatever the depth; which is the worst of all may change with it.
        student: the module whose pass is under autocast, which forgets its copies of weights at the end of it.
        """

        def enter(stage: str) -> None:
            self.stage = stage

        def before(_text, _args, kwargs):
            enter("forward")
            if kwargs["inputs_embeds"].requires_grad:
                kwargs["inputs_embeds"].register_hook(lambda _: enter("backward of what is before"))

        def after(_text, _args, output):
            enter("answers")
            if output.last_hidden_state.requires_grad:
                output.last_hidden_state.register_hook(lambda _: enter("backward"))

        text.register_forward_pre_hook(before, with_kwargs=True)
        text.register_forward_hook(after)
        student.register_forward_hook(lambda *_: enter("losses"))

    def part_of(self, tensor: Tensor) -> str | None:
        """Which part a tensor's storage counts as; None where it is not counted."""
        return self._part_of.get(tensor.untyped_storage()._cdata)

    def _gone(self, number: int, size: int) -> None:
        self.live[self._part_of.pop(number)] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is torch.ops.aten._local_scalar_dense:
            return args[0].dtype is torch.bool or 1
        if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            args = (args[0], [number for index in args[1] for number in _numbers(index)], *args[2:])
        out = func(*args, **kwargs)
        if packet in FUSED:
            causal = args[FUSED[packet] :][:1] == (True,)  # left out where it is false
            self.cost.attention += products(*args[:3], causal)
        elif packet in flop_registry:
            self.cost.linear += flop_registry[packet](*args, **kwargs, out_val=out)
        part = None
        if packet is torch.ops.aten._to_copy and self.part_of(args[0]) == "weights":
            part = "weights"  # what autocast computes with
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.add(tensor, part)
        return out


def products(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> int:
    """FLOPs of attention: query (B, H, T, D) over key and value (B, Hkv, S, D); causal: aligned at the lower right."""
    batch, heads, tokens, dim = query.shape
    pairs = tokens * (2 * key.shape[2] - tokens) // 2 if causal else tokens * key.shape[2]
    return 2 * batch * heads * pairs * (dim + value.shape[3])


def _numbers(index: Tensor | None) -> list[Tensor | None]:
    """A boolean index as numbers, one tensor per dimension it spans, that take every place."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long)] * index.dim()


class _StandIn(torch.autograd.Function):
    """Fused attention as far as bytes and FLOPs go. query (B, H, T, D), key and value (B, Hkv, S, D)."""

    @staticmethod
    def forward(ctx, query, key, value, mask, causal, rehearsal):
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)
        lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        if mask is not None and mask.dtype is torch.bool:
            mask = mask.to(query.dtype)  # the kernel adds a bias; it is gone when the call returns
        ctx.products, ctx.rehearsal = products(query, key, value, causal), rehearsal
        rehearsal.cost.attention += ctx.products
        ctx.save_for_backward(query, key, value, out, lse, mask)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, lse, _ = ctx.saved_tensors
        ctx.rehearsal.cost.attention += 5 * ctx.products // 2  # five products of that size instead of two
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        workspace = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(lse)]
        if key.shape[1] != query.shape[1]:  # keys' gradients per query head, summed at the end
            shape = (key.shape[0], query.shape[1], *key.shape[2:])
            workspace += [key.new_empty(shape), value.new_empty(shape)]
        del workspace
        return *gradients, None, None, None


def as_if_real(*modules: nn.Module) -> FakeTensorMode:
    """Turn weights on the meta device into fake ones on a CPU, tied ones staying tied; inside the mode all others are fake."""
    mode, made = FakeTensorMode(), {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:
            made[tensor] = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
        return made[tensor]

    for module in {m for each in modules for m in each.modules()}:
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(t) for name, t in tensors.items() if t is not None})
    return mode


@contextmanager
def rehearse() -> Iterator[Rehearsal]:
    """Every tensor without content that is made inside is counted, and those given to `Rehearsal.add`."""
    rehearsal, real = Rehearsal(), F.scaled_dot_product_attention

    def stand_in(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        device = query.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)
            query, key, value = (x.to(low) for x in (query, key, value))
        return _StandIn.apply(query, key, value, attn_mask, is_causal, rehearsal)

    # By name, not by a TorchFunctionMode: what is computed again in backward runs outside of those.
    F.scaled_dot_product_attention = stand_in
    try:
        with rehearsal:
            yield rehearsal
    finally:
        F.scaled_dot_product_attention = real
