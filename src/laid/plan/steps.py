"""What the jobs do with a GPU, rehearsed: a training step, the teacher's pass, the reading of a prompt.

Each runs the project's own code (laid.training.step, laid.training.teacher, laid.models.forward) on the meta device.

All layers of a decoder are alike, so that bytes of each stage and FLOPs are affine in their number: a deep model is rehearsed
with DEPTHS layers and extrapolated. Not where gradients appear during the pass: the worst moment of its backward stage
may then be another one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from laid.distill.distillation import TeacherOutputs
from laid.errors import LaidError
from laid.models.attention import cache_for
from laid.models.decoder import geometry, layer_indices, text_model, vision_tower
from laid.models.forward import Batch, last_logits
from laid.plan.rehearsal import Cost, Rehearsal, as_if_real, rehearse
from laid.plan.shapes import meta_model
from laid.settings import TrainedMethod
from laid.settings.training import Training
from laid.training.data import Piece
from laid.training.step import forward_backward, lesson_of
from laid.training.student import compute_in, make_trainable
from laid.training.teacher import teacher_outputs

DEPTHS = (4, 6)


def by_depth(
    config: PreTrainedConfig, layers: Sequence[int], rehearsal: Callable[[PreTrainedConfig, list[int]], Cost]
) -> Cost:
    """What `rehearsal(config, layers)` costs, extrapolated from DEPTHS layers where the model has more.

    layers: those that something special happens to; near the start or the end they keep their place.
    """
    low, high = DEPTHS
    full = config.get_text_config().num_hidden_layers
    near = [layer - full if layer >= full - low else layer for layer in layers]
    if full <= high or not all(-low <= layer < low for layer in near):
        return rehearsal(config, list(layers))
    a, b = (rehearsal(_with_layers(config, depth), near) for depth in DEPTHS)

    def there(x: float, y: float) -> int:
        return round(y + (full - high) * (y - x) / (high - low))

    stages = {
        stage: Counter({part: there(a.stages[stage][part], held[part]) for part in held})
        for stage, held in b.stages.items()
    }
    return Cost(
        stages, there(a.linear, b.linear), there(a.attention, b.attention), there(a.trained, b.trained)
    )


def _with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return config


class MetaTeacher:
    """Stands for a teacher's cache: tensors of its shapes, counted as the part "teacher".

    config: the teacher's. dtype: what the student computes in, which its tensors are brought to.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: str = "meta"):
        shape = geometry(config)
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.depth, self.words, self.dtype = shape.layers, config.get_text_config().vocab_size, dtype
        self.device = device
        self.rehearsal: Rehearsal | None = None

    def outputs(
        self, indices: Sequence[int], tokens: int, layers: Sequence[int], logits: bool = True
    ) -> TeacherOutputs:
        def of(heads: int) -> Tensor:
            return self._new(len(indices), heads, tokens, self.head_dim, dtype=self.dtype)

        words = self._new(len(indices), 2, self.words, dtype=torch.float32) if logits else None
        return TeacherOutputs(words, {layer: (of(self.heads), of(self.kv_heads)) for layer in layers})

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(*shape, dtype=dtype, device=self.device)
        if self.rehearsal is not None:
            self.rehearsal.add(tensor, "teacher")
        return tensor


def meta_batch(
    config: PreTrainedConfig, batch: int, tokens: int, visual: int, dtype: torch.dtype, device: str = "meta"
) -> Batch:
    """Inputs of `batch` prompts of `tokens` tokens, `visual` of them visual; content only on another device."""
    mask = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    mask[:, :visual] = True
    hidden = config.get_text_config().hidden_size
    return Batch(
        ids=torch.ones(batch, tokens, dtype=torch.long, device=device),
        positions=torch.arange(tokens, device=device).expand(3, batch, -1).contiguous(),
        lengths=torch.full((batch,), tokens, device=device),
        image_mask=mask,
        features=torch.randn(batch * visual, hidden, dtype=dtype, device=device) if visual else None,
    )


def see_images(model: nn.Module, inputs: Batch, images: int, order: Tensor) -> None:
    """Let the model make the features of `inputs` itself, from `images` images, as training.train_vision has it.

    The tower's parts run as they are; what its own forward makes of a grid's content does not, as there is none: windows
    become whole images, which keep as many bytes. order: 0 to images - 1. Raises LaidError for another family.
    """
    tower, config = vision_tower(model), model.config.vision_config
    if model.config.model_type != "qwen2_5_vl":
        raise LaidError(
            f"training.train_vision can be planned for qwen2_5_vl alone, these models are {model.config.model_type}: set it"
            " to false and add what their vision tower keeps for backward yourself"
        )
    merge = config.spatial_merge_size**2
    each = -(-len(inputs.features) // images) * merge
    patches, device = each * images, inputs.features.device
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.empty(patches, values, device=device)
    # Chunks of attention are read off by tolist, which a tensor without content does not have.
    bounds = np.arange(images + 1) * each

    def features(pixels: Tensor, _grid: Tensor) -> SimpleNamespace:
        hidden = tower.patch_embed(pixels)
        turn = hidden.new_empty(2, patches, config.hidden_size // config.num_heads)
        for block in tower.blocks:
            hidden = block(hidden, cu_seqlens=bounds, position_embeddings=tuple(turn))
        return SimpleNamespace(pooler_output=tower.merger(hidden).split(each // merge))

    model.model.get_image_features = features
    inputs.features, inputs.images = None, (pixels, pixels, order)


def training_step(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    method: TrainedMethod,
    training: Training,
    tokens: int,
    visual: int,
    attention: str = "sdpa",
    sharded: bool = False,
    images: int = 1,
) -> Cost:
    """One forward and backward pass of `per_device_batch` samples, the optimiser's state in place.

    method, training: those sections of the configuration. Gradients of earlier passes are there where one pass is not
    the whole batch. sharded: a format below float32 is fully_shard's, the whole pass is in it; else autocast's
    (laid.training.engine). images: in each sample, all different; where training.train_vision says so, the tower's
    pass over them is in the memory, but not in the FLOPs, which laid.plan.vision has in closed form.
    """
    if training.train_vision:
        asleep = training.changed({"train_vision": False})
        given = (student, teacher, method), (tokens, visual, attention, sharded)
        counted = training_step(*given[0], asleep, *given[1])
        cost = _training_step(*given[0], training, *given[1], images)
        return replace(cost, linear=counted.linear, attention=counted.attention)
    own, theirs = zip(*method.alignment.pairs)
    if training.per_device_batch >= training.batch_size:
        return _training_step(student, teacher, method, training, tokens, visual, attention, sharded)

    def rehearsal(config: PreTrainedConfig, layers: list[int]) -> Cost:
        near = method.changed({"alignment": {"pairs": [list(pair) for pair in zip(layers, theirs)]}})
        return _training_step(config, teacher, near, training, tokens, visual, attention, sharded)

    return by_depth(student, own, rehearsal)


def _training_step(student, teacher, method, training, tokens, visual, attention, sharded, images=0) -> Cost:
    dtype, batch = getattr(torch, training.dtype), training.per_device_batch
    autocast = dtype if dtype != torch.float32 and not sharded else None
    model = meta_model(student, training.dtype, attention)
    model = make_trainable(model, method.lora, training).train()
    device = "cpu" if autocast else "meta"
    served = MetaTeacher(teacher, dtype, device)
    lesson = lesson_of(model, method, served)
    compute_in(lesson.student, autocast or torch.float32, device)
    for module in lesson.learned.values():
        module.to("meta")
    order = torch.arange(batch * images)  # has content, unlike all that follows
    with (
        as_if_real(lesson.student, lesson.distillation, *lesson.learned.values())
        if autocast
        else nullcontext()
    ):
        learned = [p for module in lesson.learned.values() for p in module.parameters()]
        trained = [p for p in model.parameters() if p.requires_grad]
        # What is trained is float32; sharded, a pass in another format computes with a copy.
        masters = [torch.empty_like(p) for p in trained] if dtype != torch.float32 and sharded else []
        if masters:
            for p in trained:
                p.data = p.data.to(dtype)
        inputs = meta_batch(student, batch, tokens, visual, dtype, device)
        if method.dilution.reach:
            inputs.score_bias = torch.zeros(batch, tokens, device=device)
        labels = torch.ones(batch, 2, dtype=torch.long, device=device)
        if images:
            see_images(model, inputs, batch * images, order)
        with rehearse() as rehearsal:
            served.rehearsal = rehearsal
            rehearsal.follow(lesson.student, text_model(model))
            hold_weights(rehearsal, model)
            for master in masters:
                rehearsal.add(master, "weights")
            given = (inputs.ids, inputs.positions, inputs.image_mask, inputs.features)
            for tensor in (*given, *(inputs.images or ())[:1]):
                if tensor is not None:
                    rehearsal.add(tensor, "activations")
            states = [
                torch.empty_like(p, dtype=torch.float32) for p in (*trained, *learned) for _ in range(2)
            ]
            for state in states:
                rehearsal.add(state, "optimizer")
            gradients: dict[torch.Tensor, torch.Tensor] = {}

            def keep(p: torch.Tensor) -> None:
                if p not in gradients:
                    gradients[p] = torch.empty_like(p, dtype=torch.float32) if masters else p.grad
                    rehearsal.add(gradients[p], "gradients")
                if masters:
                    p.grad = None

            for p in trained:
                if batch < training.batch_size:
                    gradients[p] = torch.empty_like(p, dtype=torch.float32)
                    rehearsal.add(gradients[p], "gradients")
                    p.grad = None if masters else gradients[p]
                p.register_post_accumulate_grad_hook(keep)
            forward_backward(lesson, Piece.of(range(batch), inputs, labels), 0.5)
    rehearsal.cost.trained = sum(p.numel() for p in (*trained, *learned))
    return rehearsal.cost


def teacher_pass(
    teacher: PreTrainedConfig, layers: Sequence[int], dtype: str, batch: int, tokens: int, visual: int,
    attention: str = "sdpa",
) -> Cost:  # fmt: skip
    """One pass of the teacher over `batch` prompts, queries and keys of `layers` caught."""

    def rehearsal(config: PreTrainedConfig, layers: list[int]) -> Cost:
        model = meta_model(config, dtype, attention)
        chosen = layer_indices(layers, geometry(config).layers) if layers else ()
        with torch.no_grad(), rehearse() as counted:
            hold_weights(counted, model)
            inputs = meta_batch(config, batch, tokens, visual, getattr(torch, dtype))
            logits, caught = teacher_outputs(model, inputs, chosen)
            for qk in caught.values():  # brought to the cache's layout one by one
                qk.q.transpose(1, 2).flatten(2).to(torch.bfloat16, copy=True)
            del logits, caught
        return counted.cost

    return by_depth(teacher, layers, rehearsal)


def reading(
    config: PreTrainedConfig, dtype: str, batch: int, tokens: int, visual: int, chunk: int, keep: bool,
    attention: str = "sdpa",
) -> Cost:  # fmt: skip
    """The reading of `batch` prompts up to the first answer's logits, in chunks, keys and values kept if `keep`."""

    def rehearsal(config: PreTrainedConfig, _: list[int]) -> Cost:
        model = meta_model(config, dtype, attention)
        with torch.no_grad(), rehearse() as counted:
            hold_weights(counted, model)
            inputs = meta_batch(config, batch, tokens, visual, getattr(torch, dtype))
            cache = (
                cache_for(tokens, lambda tensor: counted.add(tensor, "cache"))
                if keep or 0 < chunk < tokens
                else None
            )
            last_logits(model, inputs, chunk, cache)
            del inputs, cache
        return counted.cost

    return by_depth(config, (), rehearsal)


def hold_weights(rehearsal: Rehearsal, model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        rehearsal.add(tensor, "weights")
