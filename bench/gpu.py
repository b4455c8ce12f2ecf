"""Real shapes with random weights on one GPU: time, share of peak, and memory beside what `laid plan` says.

    PYTHONPATH=src python bench/gpu.py                   one GPU of 141 GB: all cases, within 10 minutes
    PYTHONPATH=src python bench/gpu.py --write           the same, on top of bench/GPU.md
    PYTHONPATH=src python bench/gpu.py --toy             the same cases at toy size on a CPU, in seconds

Needs torch, transformers and Pillow (and peft for LoRA, which is left out without it), no checkpoint, no image and no network. Cases: the teacher's pass of
32B, a training step of 7B and 3B (all weights, and LoRA) at 1.8k, 7.4k and 35k tokens and with nine samples of 1.8k packed
into one pass, the reading of an evaluation prompt of 53k tokens in chunks, SelfExtend's too, and photographs on their first reading
(decoding, resizing, vision tower). All run the project's own code: laid.training.step, laid.training.teacher,
laid.models.forward, laid.models.features. What the plan says cannot fit is not started, and said. Of these rates the GPU-hours of the whole
paper are extrapolated.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig

from laid.distill.distillation import TeacherOutputs
from laid.methods.self_extend import apply_self_extend
from laid.models.attention import cache_for
from laid.models.decoder import geometry, vision_tower
from laid.models.features import ImageFeatures
from laid.models.forward import last_logits
from laid.plan.gpus import GIB, GPUS, Gpu
from laid.plan.measure import peak_bytes
from laid.plan.rehearsal import Cost
from laid.plan.shapes import meta_model, published_config
from laid.plan.steps import meta_batch, reading, teacher_pass, training_step
from laid.plan.tokens import DELIMITERS, TEXT, VISUAL
from laid.plan.vision import image_flops, pass_bytes
from laid.provenance import code
from laid.settings import TrainedMethod
from laid.settings.training import Training as TrainingSettings
from laid.toy.family import build_processor
from laid.training.data import Piece
from laid.training.step import forward_backward, lesson_of
from laid.training.student import compute_in, make_trainable
from laid.training.teacher import teacher_outputs

RESULTS = Path(__file__).with_name("GPU.md")
MEMBERS = {size: f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("32B", "7B", "3B")}
LENGTHS, LONGEST, CHUNK = (1_800, 7_400, 35_000), 53_000, 8_192
TOY_LENGTHS, TOY_LONGEST, TOY_CHUNK = (48, 96, 192), 256, 64
PACKED = 9  # samples of the shortest length in one pass
PHOTOGRAPHS = 256  # read for the first time, in passes of 64
SELF_EXTEND = {"group": 4, "window": 1024}  # as configs/paper.yaml
IMAGE_POSITIONS = 24  # of a photograph
BATCH = 8  # samples of an optimiser step
LAID = {  # the weights and the alignment of configs/paper.yaml
    "lambda_sft": 0.7,
    "lambda_kl": 0.3,
    "lambda_laid": 0.3,
    "alignment": {"pairs": [[-1, -1]]},
    "distance": {"strength": 4.0},
    "gain": True,
}
# The paper's work: questions, epochs, haystack sizes in training; questions per test size; models that are evaluated.
QUESTIONS, EPOCHS, TRAIN_SIZES = 5_000, 10, range(2, 21)
TEST_QUESTIONS, TEST_SIZES, METHODS = 100, (1, 2, 5, 10, 20, 50, 100, 150), 8
PAPER_HOURS = {"7B": 296, "3B": 172}  # A800-hours


@dataclass
class Case:
    """kind: teacher, train, lora (with packed_ before them: PACKED samples), read, extend or images. Measured: seconds of one
    pass, of the optimiser's step, peak bytes. images: photographs in it, where there are any to be decoded."""

    kind: str
    member: str
    tokens: int
    plan: Cost
    seconds: float | None = None
    optimizer: float = 0.0
    peak: int = 0
    note: str = ""
    rate: float = field(default=0.0)  # FLOP/s
    images: int = 0

    @property
    def samples(self) -> int:
        return PACKED if self.kind.startswith("packed_") else 1

    @property
    def name(self) -> str:
        what = {
            "teacher": "teacher's pass",
            "train": "training, all weights",
            "lora": "training, LoRA",
            "packed_train": f"training, all weights, {PACKED} packed",
            "packed_lora": f"training, LoRA, {PACKED} packed",
            "read": "reading",
            "extend": "reading, SelfExtend",
            "images": f"{self.images} photographs",
        }
        return f"{self.member} {what[self.kind]}"


class Bench:
    """The cases at real or at toy size, on one device."""

    def __init__(self, toy: bool, device: str):
        self.toy, self.device = toy, device
        self.dtype = "float32" if device == "cpu" else "bfloat16"
        self.lengths = TOY_LENGTHS if toy else LENGTHS
        self.longest, self.chunk = (TOY_LONGEST, TOY_CHUNK) if toy else (LONGEST, CHUNK)
        self.photographs, self.visual_of_image = (4, 4) if toy else (PHOTOGRAPHS, VISUAL)
        self.configs = {m: toy_config(m) if toy else published_config(name) for m, name in MEMBERS.items()}
        self.kinds = ("train", "lora") if importlib.util.find_spec("peft") else ("train",)
        self.methods = {
            "train": TrainedMethod(**LAID),
            "lora": TrainedMethod(**LAID | {"gain": False, "lora": {"rank": 8}}),
        }
        self.training = TrainingSettings(
            dtype=self.dtype, per_device_batch=1, batch_size=BATCH, gradient_checkpointing=True
        )

    def visual(self, tokens: int) -> int:
        """Visual tokens of a prompt as long."""
        return max(1, tokens - TEXT) if not self.toy else tokens // 2

    def plan(self, kind: str, member: str, tokens: int) -> Cost:
        """What `laid plan` expects."""
        config, visual = self.configs[member], self.visual(tokens)
        if kind == "teacher":
            return teacher_pass(config, [-1], self.dtype, 1, tokens, visual)
        if kind in ("read", "extend"):
            return reading(config, self.dtype, 1, tokens, visual, self.chunk, keep=True)
        if kind == "images":
            model, size = meta_model(config, self.dtype), getattr(torch, self.dtype).itemsize
            count, each = self.photographs, self.visual_of_image
            weights = sum(p.nbytes for p in vision_tower(model).parameters())
            activations = pass_bytes(config, min(64, count), each, size)
            held = Counter(weights=weights, activations=activations)
            return Cost({"": held}, linear=round(count * image_flops(model, each)))
        method = self.methods[kind.removeprefix("packed_")]
        cost = training_step(config, self.configs["32B"], method, self.training, tokens, visual)
        if kind.startswith("packed_"):  # each attends to itself alone
            cost.attention //= PACKED
        return cost

    def cases(self) -> Iterator[Case]:
        """Cheap and telling ones first, so that a short budget is well spent; one member's beside each other."""
        for member in ("7B", "3B"):
            for kind in self.kinds:
                for tokens in self.lengths:
                    yield Case(kind, member, tokens, self.plan(kind, member, tokens))
                together = PACKED * self.lengths[0]
                packed = f"packed_{kind}"
                yield Case(packed, member, together, self.plan(packed, member, together))
            for kind in ("read", "extend"):
                yield Case(kind, member, self.longest, self.plan(kind, member, self.longest))
        seen = round(self.photographs * self.visual_of_image)
        yield Case("images", "3B", seen, self.plan("images", "3B", seen), images=self.photographs)
        for tokens in self.lengths:
            yield Case("teacher", "32B", tokens, self.plan("teacher", "32B", tokens))
        yield Case("read", "32B", self.longest, self.plan("read", "32B", self.longest))

    def run(self, cases: list[Case]) -> None:
        """Measure cases of one member and kind, which share a model."""
        kind, config = cases[0].kind, self.configs[cases[0].member]
        model = meta_model(config, self.dtype, device=self.device)
        if kind.endswith(("train", "lora")):
            work = Training(self, model, kind)
        elif kind == "images":
            work = Photographs(self, model)
        else:
            work = Pass(self, model, kind)
        for case in cases:
            work(case)
            if case.seconds:
                # Of an optimiser step over BATCH samples, as training goes.
                seconds = case.seconds + case.optimizer * case.samples / BATCH
                case.rate = case.plan.flops / seconds

    def timed(self, work: Callable[[], Any], seconds: float = 2.0, most: int = 5) -> float:
        """Seconds of one work(), the mean of as many as fill `seconds`, at least one, after a first that warms up.

        At toy size, where time says nothing, one and no other.
        """
        if self.toy:
            seconds, most = 0.0, 1
        else:
            work()
        spent, count = 0.0, 0
        while count == 0 or (spent < seconds and count < most):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            spent, count = spent + time.perf_counter() - start, count + 1
        return spent / count

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], Any], standing: list[torch.Tensor]) -> int:
        """Peak bytes of work(), what stands before it included."""
        if self.device != "cpu":
            return torch.cuda.memory_allocated() + peak_bytes(work, self.device)
        there = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in standing}
        return sum(there.values()) + peak_bytes(work)

    def inputs(self, member: PreTrainedConfig, tokens: int, count: int = 1):
        batch = meta_batch(
            member, count, tokens, self.visual(tokens), getattr(torch, self.dtype), self.device
        )
        given = [batch.ids, batch.positions, batch.image_mask, batch.features]
        return batch, given


class Pass:
    """A forward pass without gradients: the teacher's, or the reading of a prompt."""

    def __init__(self, bench: Bench, model: nn.Module, kind: str):
        self.bench, self.model, self.kind = bench, model, kind
        self.last = geometry(model).layers - 1
        if kind == "extend":
            apply_self_extend(model, **SELF_EXTEND | ({"window": 8} if bench.toy else {}))

    def __call__(self, case: Case) -> None:
        batch, given = self.bench.inputs(self.model.config, case.tokens)
        if self.kind == "extend":  # images as photographs are, so that far keys are as many
            batch.positions //= round(VISUAL + DELIMITERS)
            batch.positions *= IMAGE_POSITIONS

        @torch.no_grad()
        def work():
            if self.kind == "teacher":
                teacher_outputs(self.model, batch, (self.last,))
            else:
                last_logits(self.model, batch, self.bench.chunk, cache_for(case.tokens))

        case.seconds = self.bench.timed(work)
        case.peak = self.bench.peak(work, [*self.model.parameters(), *self.model.buffers(), *given])


class Photographs:
    """JPEG files of 640 x 480 pixels and noise, decoded, resized and shown to the vision tower, each for the first time."""

    def __init__(self, bench: Bench, model: nn.Module):
        self.bench, self.model = bench, model
        self.processor = build_processor(["thing"], round(784 * bench.visual_of_image))
        ids = self.processor.encoder
        model.config.image_token_id = ids.pad_id

    def __call__(self, case: Case) -> None:
        noise = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            for number in range(case.images):
                blocks = noise.integers(0, 256, (60, 80, 3), dtype=np.uint8)
                photograph = Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC)
                photograph.save(Path(folder) / f"{number}.jpg", quality=90)
            names = [f"{number}.jpg" for number in range(case.images)]

            def work():
                features = ImageFeatures(self.model, self.processor, lambda name: Path(folder) / name)
                features.prepare(names)

            case.seconds = self.bench.timed(work, most=2)
            standing = [*self.model.parameters(), *self.model.buffers()]
            unseen = sum(t.nbytes for t in standing) - case.plan.peak["weights"]
            case.peak = self.bench.peak(work, standing) - unseen


class CachedTeacher:
    """Random tensors where a TeacherCache has its own: in the machine's memory, brought to the device in every step."""

    def __init__(self, config: PreTrainedConfig):
        shape = geometry(config)
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.depth, self.words = shape.layers, config.get_text_config().vocab_size
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def outputs(self, indices, tokens, layers, logits=True):
        if tokens not in self._made:
            self._made = {
                tokens: tuple(
                    torch.randn(len(indices), heads, tokens, self.head_dim)
                    for heads in (self.heads, self.kv_heads)
                )
            }
        said = torch.randn(len(indices), 2, self.words, generator=torch.Generator().manual_seed(0))
        return TeacherOutputs(said if logits else None, {layer: self._made[tokens] for layer in layers})


class Training:
    """Forward, losses and backward of one sample; the optimiser's step apart."""

    def __init__(self, bench: Bench, model: nn.Module, kind: str):
        self.bench = bench
        method = bench.methods[kind.removeprefix("packed_")]
        self.config = model.config
        self.model = make_trainable(model, method.lora, bench.training).train()
        self.lesson = lesson_of(self.model, method, CachedTeacher(bench.configs["32B"]))
        compute_in(self.lesson.student, getattr(torch, bench.dtype), bench.device)
        learned = [p for module in self.lesson.learned.values() for p in module.parameters()]
        self.trained = [*(p for p in self.model.parameters() if p.requires_grad), *learned]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def _step(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def __call__(self, case: Case) -> None:
        count = case.samples
        batch, given = self.bench.inputs(self.config, case.tokens // count, count)
        batch.packed = [case.tokens // count] * count if count > 1 else None
        labels = torch.tensor([[7, 8]] * count, device=self.bench.device)

        def work():
            forward_backward(self.lesson, Piece.of(range(count), batch, labels, apart=1), 0.5)

        work()
        self._step()  # the optimiser's state is there from now on
        case.seconds = self.bench.timed(work)
        case.optimizer = self.bench.timed(self._step, most=2)
        states = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        weights = [*self.model.parameters(), *self.model.buffers(), *self.trained]
        gradients = [p.grad for p in weights if p.grad is not None]
        case.peak = self.bench.peak(work, [*weights, *gradients, *states, *given])
        self.optimizer.zero_grad(set_to_none=True)


def toy_config(member: str) -> PreTrainedConfig:
    """A model of the same make, small enough for a test."""
    config = copy.deepcopy(published_config(MEMBERS[member]))
    text, vision = config.get_text_config(), config.vision_config
    scale = {"32B": 2, "7B": 1, "3B": 1}[member]
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 64 * scale, 2 * scale, 2 * scale
    text.intermediate_size, text.num_hidden_layers, text.vocab_size = 128 * scale, 2 * scale, 512
    text.layer_types = text.layer_types[: text.num_hidden_layers]
    text.eos_token_id = text.pad_token_id = 0
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 32, 2
    vision.out_hidden_size, vision.fullatt_block_indexes = text.hidden_size, [0]
    return config


# ------------------------------------------------------------------ what follows from it


def extrapolated(cases: list[Case], gpu: Gpu | None) -> list[str]:
    """Lines about the whole paper: FLOPs of its work by the plan, at the rates measured here."""

    def rate(kind: str, member: str) -> Case | None:
        # Training questions have 3,900 tokens on average: the case of 7.4k is the nearest from above.
        packed = [c for c in cases if (c.kind, c.member) == (f"packed_{kind}", member) and c.rate]
        if packed:  # as configs/paper.yaml trains
            return packed[0]
        found = [c for c in cases if (c.kind, c.member) == (kind, member) and c.rate]
        return found[min(1, len(found) - 1)] if found else None

    def hours(case: Case, prompts: Iterator[tuple[int, float]], extra: int) -> float:
        flops = 0.0
        for images, count in prompts:
            share = (TEXT + extra + images * (VISUAL + DELIMITERS)) / case.tokens
            flops += count * (case.plan.linear * share + case.samples * case.plan.attention * share**2)
        return flops / case.rate / 3600

    lines, total = [], 0.0
    each = QUESTIONS / len(TRAIN_SIZES)
    teacher = rate("teacher", "32B")
    if teacher:
        once = hours(teacher, ((n, each) for n in TRAIN_SIZES), 1)
        total += once
        lines.append(f"- the teacher's pass over {QUESTIONS:,} questions, once: {once:.2f} GPU-hours")
    for member, paper in PAPER_HOURS.items():
        case = rate("train", member) or rate("lora", member)
        if case is None:
            lines.append(f"- {member}: no training case was measured, so nothing is extrapolated")
            return lines
        found = hours(case, ((n, each * EPOCHS) for n in TRAIN_SIZES), 1)
        total += found
        what = "LoRA" if case.kind.endswith("lora") else "all weights"
        lines.append(
            f"- one LAid run of {member} ({what}), {EPOCHS} epochs: {found:.2f} GPU-hours; the paper: {paper} A800-hours"
        )
    paper = sum(PAPER_HOURS.values())
    lines.append(f"- together {total:.2f} GPU-hours; the paper: 296 + 172 = {paper} A800-hours")
    if gpu:
        a800 = total * gpu.half / GPUS["A800-80GB"].half
        lines.append(
            f"- scaled by peak to an A800 (same share of peak): {a800:.1f} A800-hours, {a800 / paper:.2f} of the paper's"
        )
    read = {member: rate("read", member) for member in MEMBERS}
    if all(read.values()):
        runs = {"32B": 1, "7B": METHODS, "3B": METHODS}
        found = sum(
            runs[m] * hours(case, ((n, TEST_QUESTIONS) for n in TEST_SIZES), 0) for m, case in read.items()
        )
        lines.append(
            f"- evaluation of one teacher and two students under {METHODS} methods at {len(TEST_SIZES)} sizes:"
            f" {found:.2f} GPU-hours"
        )
    return [*lines, "- The vision tower, reading of images and of checkpoints are not in these hours."]


def commit() -> str:
    """The commit measured, and whether files were changed since."""
    about = code()
    return f"{(about['commit'] or 'unknown')[:12]}{', changed' if about['dirty'] else ''}"


def report(bench: Bench, cases: list[Case], gpu: Gpu | None, device: str, spent: float) -> str:
    """The results as Markdown."""
    lines = [
        f"## {'Toy size' if bench.toy else 'Real shapes'}, {device}",
        "",
        (
            f"Commit {commit()}, torch {torch.__version__}, {bench.dtype}, gradient checkpointing in training;"
            f" {time.strftime('%Y-%m-%d')}; {spent:.0f} s in all."
        ),
        "",
        "| case | tokens | pass, ms | tokens/s | TFLOP/s | share of peak | peak, GiB | planned, GiB | planned / measured |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases:
        planned = case.plan.bytes / GIB
        if case.seconds is None:
            lines.append(f"| {case.name} | {case.tokens:,} | {case.note} | | | | | {planned:.3g} | |")
            continue
        seconds = case.seconds + case.optimizer * case.samples / BATCH
        share = f"{case.rate / gpu.rate(bench.dtype):.1%}" if gpu else ""
        lines.append(
            f"| {case.name} | {case.tokens:,} | {1000 * case.seconds:.1f} | {case.tokens / seconds:,.0f}"
            f" | {case.rate / 1e12:.3g} | {share} | {case.peak / GIB:.3g} | {planned:.3g}"
            f" | {case.plan.bytes / case.peak:.3f} |"
        )
    notes = [
        "",
        (
            f"A pass: forward, and in training losses and backward; tokens/s counts 1/{BATCH} of an optimiser step to each sample"
            " in it. FLOPs: matrix products and causal attention at half, by the plan."
        ),
        "",
    ]
    for case in cases:
        if case.images and case.seconds:
            what = "decoding, resizing and vision tower, nothing kept before"
            notes += [
                f"Images: {case.images / case.seconds:,.0f} a second on {os.cpu_count()} CPU cores ({what}).",
                "",
            ]
    if "lora" not in bench.kinds:
        notes += ["LoRA is left out: peft is not installed.", ""]
    if not bench.toy:
        notes += ["The whole paper, extrapolated:", "", *extrapolated(cases, gpu)]
    return "\n".join(lines + notes) + "\n"


def measure(bench: Bench, room: int, budget: float) -> tuple[list[Case], float]:
    """All cases; what the plan says needs more than `room` bytes, or what would begin after `budget` s, is left out."""
    start = time.perf_counter()
    cases = list(bench.cases())
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case.plan.bytes > room:
            case.note = f"does not fit: {case.plan.bytes / GIB:.1f} of {room / GIB:.1f} GiB"
        else:
            groups.setdefault((case.kind, case.member), []).append(case)
    for group in groups.values():
        if time.perf_counter() - start > budget:
            for case in group:
                case.note = f"not begun: {budget:.0f} s were over"
            continue
        try:
            bench.run(group)
        except (
            RuntimeError,
            ImportError,
            ValueError,
            TypeError,
        ) as error:  # the others' results must not be lost
            traceback.print_exc()
            why = " ".join(str(error).split())[:120] or type(error).__name__
            for case in group:
                case.note = case.note or ("" if case.seconds else f"failed: {why}")
        gc.collect()
        if bench.device != "cpu":
            torch.cuda.empty_cache()
        for case in group:
            said = f"{1000 * case.seconds:.1f} ms" if case.seconds else case.note
            print(f"{case.name}, {case.tokens:,} tokens: {said}", flush=True)
    return cases, time.perf_counter() - start


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, to see that it works")
    parser.add_argument(
        "--budget", type=float, default=480, help="seconds after which no further case begins"
    )
    parser.add_argument("--write", action="store_true", help=f"put the report into {RESULTS.name}")
    parser.add_argument("--json", type=Path, help="also write plain numbers here")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")
    if not args.toy and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --toy runs the same cases at toy size on the CPU")
    device = "cpu" if args.toy else "cuda"
    torch.manual_seed(0)
    bench = Bench(args.toy, device)
    name, room, gpu = "CPU", 8 * GIB, None
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        name, room = about.name, int(0.97 * about.total_memory)
        gpu = next(
            (g for g in GPUS.values() if g.name.split("-")[0].lower() in name.lower().replace(" ", "")), None
        )
    cases, spent = measure(bench, room, args.budget)
    text = report(bench, cases, gpu, name, spent)
    print(text)
    if args.write:
        title = "# Measured on GPUs\n\n"
        before = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else title
        RESULTS.write_text(f"{title}{text}\n{before.removeprefix(title)}", encoding="utf-8")
    if args.json:
        rows = [
            {
                "kind": c.kind, "member": c.member, "tokens": c.tokens, "seconds": c.seconds, "optimizer": c.optimizer,
                "peak": c.peak, "planned": c.plan.bytes, "flop": c.plan.flops, "note": c.note,
            }
            for c in cases
        ]  # fmt: skip
        args.json.write_text(json.dumps({"device": name, "seconds": spent, "cases": rows}, indent=1) + "\n")
    return int(any(c.note.startswith("failed") for c in cases))


if __name__ == "__main__":
    raise SystemExit(main())
