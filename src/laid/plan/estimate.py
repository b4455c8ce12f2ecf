"""What one job of each kind needs: tokens, FLOPs, bytes on a device by part, disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from laid.distill.objective import PARTS, Objective
from laid.errors import LaidError
from laid.io import dumps
from laid.models.decoder import geometry, text_model
from laid.models.loading import parameters
from laid.plan.gpus import GIB
from laid.plan.rehearsal import Cost
from laid.plan.shapes import member_config, meta_model
from laid.plan.steps import reading, teacher_pass, training_step
from laid.plan.tokens import lengths_of
from laid.plan.vision import BATCH, image_flops, pass_bytes, tower
from laid.settings import Settings, TrainedMethod, plain
from laid.settings.training import Training
from laid.training.teacher_cache import Kept

STANDING = ("weights", "gradients", "optimizer")
ANSWER_BYTES = 200  # of JSON in a cell
SCORES = 6 * 4 * 2**25  # SelfExtend's blocks of scores: near, far, chosen, merged, weights and softmax's own
CHECKPOINTING = ("per_device_batch", "batch_size", "dtype", "gradient_checkpointing", "train_vision")


@dataclass
class Need:
    """What one job needs.

    longest: tokens of the longest prompt expected. tokens: read in the whole job, every pass counted. flops: of the
    whole job. memory: peak bytes on one device, by part. disk: bytes it leaves. devices: that share the work.
    kind: of its passes (laid.plan.speed). together: tokens of an average pass. images: that it decodes and shows the vision
    tower; seeing: FLOPs of that, among flops.
    """

    parameters: int
    dtype: str
    longest: int = 0
    trained: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    memory: Counter = field(default_factory=Counter)
    disk: float = 0.0
    devices: int = 1
    kind: str = "read"
    together: float = 0.0
    images: float = 0.0
    seeing: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())


class Member:
    """One model of the family: its config, where that came from, and the model without weights."""

    def __init__(self, config: PreTrainedConfig, source: str):
        self.config, self.source = config, source

    @cached_property
    def model(self) -> PreTrainedModel:
        return meta_model(self.config)

    @cached_property
    def parameters(self) -> int:
        return parameters(self.model)

    @property
    def hidden(self) -> int:
        return self.config.get_text_config().hidden_size

    @property
    def words(self) -> int:
        return self.config.get_text_config().vocab_size


class Estimator:
    """Rehearses the jobs of one configuration; like jobs once. Raises LaidError for a member of unknown shape.

    configs: a folder of config.json files that go before everything else (laid.plan.shapes.member_config).
    """

    def __init__(self, config: Settings, configs: str | Path | None = None):
        if configs is not None and not Path(configs).is_dir():
            raise LaidError(
                f"--configs {configs}: no such folder (expected DIR/<member>/config.json, or <checkpoint's name>/)"
            )
        names = [config.models.teacher, *config.models.students]
        self.members = {name: Member(*member_config(config, name, configs)) for name in names}
        self.rehearsed: dict[str, Any] = {}
        self._set(config)

    def under(self, config: Settings) -> Estimator:
        """The same members under another configuration."""
        other = object.__new__(Estimator)
        other.members, other.rehearsed = self.members, self.rehearsed
        other._set(config)
        return other

    def _set(self, config: Settings) -> None:
        self.config, self.lengths = config, lengths_of(config)
        self.attention = config.evaluation.attention

    # ---------------------------------------------------------------- the jobs

    def pretrain(self, name: str) -> Need:
        """Making a member of the small family, roughly: plain training on haystacks as large as its window, every step.

        The curriculum begins with smaller ones, so that FLOPs are an upper bound; the vision tower's phase is left out.
        """
        family, member = self.config.family, self.members[name]
        about, given = family.members[name], family.pretrain
        batch = given.batch
        longest, visual = self.lengths.longest(about.window)
        longest += 16 * given.targets  # that many questions share a haystack
        settings = Training(per_device_batch=batch, batch_size=batch)
        cost = self._once(
            ["pretrain", name, batch],
            training_step, member.config, member.config, TrainedMethod(), settings, longest, visual, self.attention,
        )  # fmt: skip
        need = Need(member.parameters, "float32", longest, cost.trained)
        need.memory += cost.peak
        need.tokens = about.steps * batch * longest
        need.flops, need.disk = about.steps * cost.flops, member.parameters * 4
        return need

    def teacher_cache(self) -> Need:
        """The teacher's pass over the training questions."""
        c, settings, asked = self.config, self.config.teacher_cache, self.config.haystacks.train
        name, dtype = c.models.teacher, c.training.dtype
        member, layers = self.members[name], tuple(settings.layers)
        longest, visual = self.lengths.longest(asked.max_size)
        longest += 1  # the answer is part of a sample
        batch = max(1, min(asked.questions, c.evaluation.batch_tokens // longest))
        cost = self._once(
            name, teacher_pass, member.config, layers, dtype, batch, longest, visual, self.attention
        )
        need = Need(member.parameters, dtype, longest, kind="teacher")
        sizes = range(asked.min_size, asked.max_size + 1)
        need.together = batch * self.lengths.prompt(_mean(sizes))
        need.memory += cost.peak
        self._prompts(need, cost, batch, longest, [(n, asked.questions / len(sizes)) for n in sizes], extra=1)
        self._images(need, member, "train", asked.questions * _mean(sizes), BATCH)
        shape = geometry(member.config)
        kept = Kept(
            tuple(set(layers)), shape.heads, shape.kv_heads, shape.head_dim, member.words, settings.dtype
        )
        need.disk = need.tokens * kept.token_bytes + asked.questions * 2 * member.words * 4
        return need

    def features(self, name: str) -> Need:
        """One pass of a member's vision tower over the images of all training and test questions."""
        c, member = self.config, self.members[name]
        train, test = c.haystacks.train, c.haystacks.test
        mean = _mean(range(train.min_size, train.max_size + 1))
        images = self.lengths.distinct("train", train.questions * mean)
        images += self.lengths.distinct("test", test.questions * sum(test.sizes))
        visual, need = self.lengths.visual, Need(member.parameters, c.evaluation.dtype)
        size = size_of(need.dtype)
        need.memory["weights"] = parameters(tower(member.model)) * size
        need.memory["activations"] = pass_bytes(member.config, BATCH, visual, size)
        need.images = images
        need.flops = need.seeing = images * image_flops(member.model, visual)
        need.disk = images * visual * member.hidden * size
        return need

    def train(self, student: str, method: str) -> Need:
        """One training run of a student."""
        c, m, member = self.config, self.config.methods[method], self.members[student]
        teacher, settings = self.members[c.models.teacher], c.training
        asked, objective = c.haystacks.train, Objective.of(m)
        batch = min(settings.per_device_batch, settings.batch_size)
        settings = settings.changed({"per_device_batch": batch})
        longest, visual = self.lengths.longest(asked.max_size)
        longest += 1
        devices = max(1, c.resources.train.gpus(student))
        need = Need(member.parameters, settings.dtype, longest, kind="lora" if m.lora else "train")
        sizes = range(asked.min_size, asked.max_size + 1)
        need.together = batch * self.lengths.prompt(_mean(sizes))
        if settings.tokens_per_pass:  # rehearsed as one sample as long as all that a pass may hold
            together = -(-settings.batch_size // devices) * longest
            held = max(batch * longest, min(settings.tokens_per_pass, together)) // batch
            visual, longest = visual * held // longest, held
            need.kind, need.together = f"packed_{need.kind}", batch * held
        alike = [m.lora, m.gain, m.alignment]
        alike = [*plain(alike), m.dilution.reach > 0, [p for p in PARTS if objective.needs(p)]]
        sharded = devices > 1 and settings.parallel != "ddp"
        cost = self._once(
            [student, alike, settings.model_dump(include=set(CHECKPOINTING))],
            training_step, member.config, teacher.config, m, settings, longest, visual, self.attention, sharded,
            asked.max_size,
        )  # fmt: skip
        steps = round((m.epochs or settings.epochs) * (asked.questions // settings.batch_size))
        samples = max(1, steps) * settings.batch_size
        need.trained, need.devices = cost.trained, devices
        need.memory += cost.peak
        self._prompts(need, cost, batch, longest, [(n, samples / len(sizes)) for n in sizes], extra=1)
        seen = samples * _mean(sizes)
        if settings.train_vision:  # in the step, forward and backward; the memory is the rehearsed step's
            passes = 4 if settings.gradient_checkpointing else 3
            need.images = seen
            need.flops += seen * passes * image_flops(member.model, self.lengths.visual)
        else:
            self._images(need, member, "train", seen, min(BATCH, batch * asked.max_size))
        if sharded:
            shard(need, member, m.lora is not None, settings.train_vision)
        self._validation(need, student, max(1, steps), sharded)
        written = need.trained if m.lora else member.parameters
        # Weights and the optimiser's two moments, and the best weights so far.
        best = settings.validation is not None and settings.validation.export == "best"
        kept = (3 + best) * need.trained if settings.checkpoint_minutes else 0
        need.disk = written * size_of(settings.dtype) + kept * 4
        return need

    def _validation(self, need: Need, student: str, steps: int, sharded: bool) -> None:
        """Add what training.validation asks on the way: no process alone holds a student in pieces, so all ask the same then."""
        c, e, asked = self.config, self.config.evaluation, self.config.training.validation
        if asked is None:
            return
        times = -(-steps // asked.every) * (need.devices if sharded else 1)
        for images in asked.sizes or c.haystacks.validation.sizes:
            longest, visual = self.lengths.longest(images)
            batch = max(1, min(asked.questions, e.batch_tokens // longest))
            cost = self._once(
                student, reading, self.members[student].config, need.dtype, batch, longest, visual, e.chunk_tokens, False,
                self.attention,
            )  # fmt: skip
            self._prompts(need, cost, batch, longest, [(images, times * asked.questions)])
            asking = Counter({part: need.memory[part] for part in (*STANDING, "features")})
            asking["activations"] += cost.peak["activations"]
            asking["cache"] += cost.peak["cache"]
            need.memory = max(need.memory, asking, key=_total)

    def evaluate(self, student: str, method: str, sizes: Iterable[int]) -> Need:
        """One evaluation job: a student under a method at these sizes, of the test or beyond, one seed."""
        c, e, member = self.config, self.config.evaluation, self.members[student]
        need, worst, draws, answers = Need(member.parameters, e.dtype), Counter(), 0, 0
        keep = e.scoring == "generate"
        for images in sizes:
            test = images in c.haystacks.test.sizes
            questions = c.haystacks.test.questions if test else c.beyond.questions
            longest, visual = self.lengths.longest(images)
            batch = max(1, min(questions, e.batch_tokens // longest))
            cost = self._once(
                student, reading, member.config, e.dtype, batch, longest, visual, e.chunk_tokens, keep,
                self.attention,
            )  # fmt: skip
            need.longest = max(need.longest, longest)
            self._prompts(need, cost, batch, longest, [(images, questions)])
            worst = max(worst, cost.peak, key=_total)
            draws += images * questions
            answers += questions
        need.memory += worst
        if method == "self_extend":
            need.kind = "extend"
            heads = geometry(member.config).heads
            need.memory["activations"] += min(SCORES, 24 * heads * batch * longest**2)
        self._images(need, member, "test", draws, BATCH)
        need.disk = ANSWER_BYTES * answers
        return need

    # ---------------------------------------------------------------- what they have in common

    def _once(self, key: Any, rehearse: Callable[..., Any], *args: Any) -> Any:
        """What `rehearse` says, asked once for the same key and plain arguments; key: what stands for the others."""
        plain = [a for a in args if isinstance(a, (bool, int, str, tuple))]
        key = dumps([rehearse.__name__, key, plain], indent=None)
        if key not in self.rehearsed:
            self.rehearsed[key] = rehearse(*args)
        return self.rehearsed[key]

    def _prompts(
        self,
        need: Need,
        cost: Cost,
        batch: int,
        longest: int,
        prompts: Iterable[tuple[int, float]],
        extra: int = 0,
    ) -> None:
        """Add tokens and FLOPs of `count` prompts for each (images, count), from `batch` rehearsed ones of `longest`.

        Matrix products cost every token the same, attention grows with the square of the prompt.
        """
        for images, count in prompts:
            tokens = self.lengths.prompt(images) + extra
            share = tokens / longest
            need.tokens += count * tokens
            need.flops += count / batch * (cost.linear * share + cost.attention * share**2)

    def _images(self, need: Need, member: Member, pool: str, draws: float, at_once: float) -> None:
        """Add the vision tower's FLOPs, its memory where that is the worst moment, and the features that are kept.

        draws: images asked for over the job. at_once: images in one pass of the tower. Features are kept up to
        evaluation.feature_cache_gb; where not all can be, an image not kept is computed again whenever asked for.
        """
        visual, size = self.lengths.visual, size_of(need.dtype)
        distinct = self.lengths.distinct(pool, draws)
        each = visual * member.hidden * size
        kept = min(distinct, self.config.evaluation.feature_cache_gb * GIB / each)
        passes = distinct if kept >= distinct else kept + draws * (1 - kept / distinct)
        if self.config.evaluation.keep_features:  # read from disk
            need.memory["features"] = int(kept * each)
            return
        need.images = passes
        need.seeing = passes * image_flops(member.model, visual)
        need.flops += need.seeing
        # The tower runs before the language model does: what stands then is there, what the other pass makes is not.
        seeing = Counter({p: need.memory[p] for p in STANDING})
        seeing["activations"] = pass_bytes(member.config, min(at_once, distinct), visual, size)
        need.memory = max(need.memory, seeing, key=_total)
        need.memory["features"] = int(kept * each)


def shard(need: Need, member: Member, adapter: bool, vision: bool = False) -> None:
    """Lay weights, gradients and the optimiser's state out in pieces over the devices (laid.training.engine).

    Each device holds its share, and the vision tower whole where that is not trained (vision). The worst moment is one of two. In a layer's backward pass:
    what is no layer's (embedding, output) stands gathered in the number format of the pass, and so do two layers; the
    gradients of one go out in float32, those of the output wait for the end. At the end of backward: the gradients of
    all that is no layer's go out, as a copy in float32 and the piece that comes back. adapter: only LoRA is trained.
    """
    text, size = text_model(member.model), size_of(need.dtype)
    layer = parameters(text.layers[0])
    seen = parameters(tower(member.model))
    rest = member.parameters - seen - layer * len(text.layers)
    if vision:  # in pieces too, by blocks; what is no block goes with what is no layer
        rest += seen - parameters(tower(member.model).blocks)
        seen = 0
    output = member.words * member.hidden
    if size < 4:
        # The copies that a pass computes with are made layer by layer.
        need.memory["weights"] -= need.trained * size
    whole = seen * size
    need.memory["weights"] = int(whole + (need.memory["weights"] - whole) / need.devices)
    need.memory["gradients"] //= need.devices
    need.memory["optimizer"] //= need.devices
    last = Counter({part: need.memory[part] for part in STANDING})
    if not adapter:
        last["gradients"] += max(rest * (size + 4), rest * (4 + 4 // need.devices) + output * size)
    need.memory["weights"] += (rest + 2 * layer) * size
    need.memory["gradients"] += need.trained // len(text.layers) * 4 if adapter else layer * 4 + output * size
    need.memory = max(need.memory, last, key=_total)


def size_of(dtype: str) -> int:
    """Bytes of a number."""
    return getattr(torch, dtype).itemsize


def _mean(sizes: range) -> float:
    return (sizes[0] + sizes[-1]) / 2


def _total(memory: Counter) -> int:
    return sum(memory.values())
