"""What bench/distill_step.py takes the time and the memory of: a training step of each method, with random weights and inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from laid.io import write_json
from laid.models.decoder import text_model
from laid.models.forward import collate, embed
from laid.models.prompts import EncodedPrompt, mrope_positions
from laid.settings import TrainedMethod
from laid.training.data import Piece
from laid.training.step import forward_backward, lesson_of
from laid.training.teacher import OnlineTeacher, teacher_outputs
from laid.training.teacher_cache import FORMAT, TeacherCache

QUESTION = 40  # tokens after the last image: the question, how to answer, and the answer


class Job:
    """A student, what it learns from, and an optimiser; sample k has counts[k] tokens.

    shape: sizes of student, teacher and images. settings: of the method. kind: where the teacher's part comes from:
    "cache", "online", "naive" (output_attentions of both models) or None; "pass" is the teacher's pass into the cache alone.
    folder: for the cache.
    """

    def __init__(self, shape, settings, kind, counts, dtype, device, folder, checkpointing):
        self.settings = TrainedMethod().changed(settings)
        self.kind, self.device, self.folder = kind, device, folder
        eager = kind == "naive"
        self.teacher_model = None
        if kind in ("online", "naive", "pass"):
            self.teacher_model = build(shape["teacher"], shape, dtype, device, eager).requires_grad_(False)
        self.shape, self.counts, self.dtype = shape, counts, dtype
        if kind in ("naive", "pass"):
            self.teacher_batches = [self._batch(shape["teacher"], count)[0] for count in counts]
        if kind == "pass":
            return
        self.model = build(shape["student"], shape, dtype, device, eager)
        if checkpointing:
            text_model(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.batches = [self._batch(shape["student"], count) for count in counts]
        self.lesson = lesson_of(self.model, self.settings, self._teacher())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        parameters += [p for module in self.lesson.learned.values() for p in module.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(self, sample: int) -> None:
        if self.kind == "pass":
            return self._teacher_pass(sample)
        inputs, labels = self.batches[sample]
        if self.kind == "naive":
            self._naive(inputs, labels, sample).backward()
        else:
            forward_backward(self.lesson, Piece.of([sample], inputs, labels), 0.5)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return None

    def _batch(self, member, count):
        """(inputs, labels) of one sample of exactly `count` tokens: text, images as large as the shape's, a question."""
        rng = np.random.default_rng([count, member["hidden"]])
        per_image = self.shape["image"][0] * self.shape["image"][1]
        images = max(0, count - QUESTION - 8) // (per_image + 2)
        prefix = count - QUESTION - images * (per_image + 2)
        mask = np.zeros(count, dtype=bool)
        starts = prefix + np.arange(images) * (per_image + 2)
        for start in starts:
            mask[start + 1 : start + 1 + per_image] = True
        ids = np.random.default_rng(count).integers(1, 512, count)
        positions = mrope_positions(prefix, [self.shape["image"]] * images, QUESTION)
        features = [
            torch.from_numpy(rng.standard_normal((per_image, member["hidden"]), dtype=np.float32)).to(
                self.dtype
            )
            for _ in range(images)
        ]
        inputs = collate([EncodedPrompt(ids, positions, starts, mask)], features)
        return inputs.to(self.device), torch.tensor([[7, 8]], device=self.device)

    def _teacher(self):
        if self.kind == "cache":
            return write_cache(self.folder, self.shape["teacher"], self.counts)
        if self.kind == "online":
            seen = [self._batch(self.shape["teacher"], count)[0] for count in self.counts]
            return OnlineTeacher(self.teacher_model, lambda indices: seen[indices[0]])
        return None

    def _teacher_pass(self, sample: int) -> None:
        inputs = self.teacher_batches[sample]
        logits, caught = teacher_outputs(self.teacher_model, inputs, (self.shape["teacher"]["layers"] - 1,))
        kept = {"logits": logits.float().cpu()}
        for qk in caught.values():
            for name, tensor in (("q", qk.q), ("k", qk.k)):
                kept[name] = tensor[0].transpose(0, 1).flatten(1).to(torch.bfloat16).cpu().contiguous()
        save_file(kept, self.folder / "pass.safetensors")

    def _naive(self, inputs, labels, sample):
        """What comes to mind first: both models give all attentions and all logits; rows are compared head mean to head mean."""

        def run(model, batch):
            out = text_model(model)(
                inputs_embeds=embed(model, batch),
                position_ids=batch.positions,
                use_cache=False,
                output_attentions=True,
            )
            return model.get_output_embeddings()(out.last_hidden_state), out.attentions

        with torch.no_grad():
            theirs, attended = run(self.teacher_model, self.teacher_batches[sample])
        own, attentions = run(self.model, inputs)
        rows = min(own.shape[-1], theirs.shape[-1])
        loss = F.cross_entropy(own[:, -2:].float().flatten(0, 1), labels.flatten())
        loss = loss + F.kl_div(
            own[..., :rows].float().log_softmax(-1),
            theirs[..., :rows].float().softmax(-1),
            reduction="batchmean",
        )
        return loss + F.mse_loss(attentions[-1].mean(1).float(), attended[-1].mean(1).float())


def build(member, shape, dtype, device, eager=False):
    """A model of these sizes, random weights, a vision tower as small as can be."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": member["words"],
            "hidden_size": member["hidden"],
            "intermediate_size": member["mlp"],
            "num_hidden_layers": member["layers"],
            "num_attention_heads": member["heads"],
            "num_key_value_heads": member["kv"],
            "head_dim": member["dim"],
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(shape["sections"])},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": member["hidden"],
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=False,
        attn_implementation="eager" if eager else "sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.model.visual.requires_grad_(False)
    return model


def write_cache(folder: Path, teacher, counts):
    """A TeacherCache of these sizes in `folder`, with random content, opened.

    Its one shard is written piece by piece, so that the peak of this process is that of its steps.
    """
    layers = [0, teacher["layers"] - 1]
    shapes = {"logits": ("F32", (len(counts), 2, teacher["words"]), 4)}
    for layer in layers:
        for name, heads in (("q", teacher["heads"]), ("k", teacher["kv"])):
            shapes[f"{name}.{layer}"] = ("BF16", (sum(counts), heads * teacher["dim"]), 2)
    header, at = {}, 0
    for name, (dtype, shape, width) in shapes.items():
        size = math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / "shard-00000.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for dtype, shape, width in shapes.values():
            piece = torch.randn(1 << 16, dtype=torch.float32 if dtype == "F32" else torch.bfloat16)
            raw = piece.view(torch.uint8).numpy().tobytes()
            for start in range(0, math.prod(shape) * width, len(raw)):
                file.write(raw[: math.prod(shape) * width - start])
    index = {
        "format": FORMAT,
        "labelled": True,
        "layers": layers,
        "model_layers": teacher["layers"],
        "heads": teacher["heads"],
        "kv_heads": teacher["kv"],
        "head_dim": teacher["dim"],
        "lengths": list(counts),
        "shards": [{"file": "shard-00000.safetensors", "first": 0, "questions": len(counts), "sha256": ""}],
        "provenance": {"data": {"questions": ""}},
    }
    write_json(folder / "index.json", index)
    return TeacherCache(folder)
