"""The teacher's one pass over the training questions, kept on disk for all epochs, students and ablations.

Kept per question: the logits at the two answer positions, exact, and for chosen layers the queries and keys before
rotation of all tokens. What lies in the cache was computed at ordinary positions; gaps are opened for the student only.
The cache is made of shards written whole, and an index written last: a killed pass goes on with the next shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from laid import provenance
from laid.data.questions import read_questions
from laid.distill.capture import QKCapture
from laid.distill.samples import Sample, build_samples
from laid.errors import LaidError
from laid.io import atomic_path, read_json, safe_join, sha256_file, sha256_json, write_json
from laid.methods.decoder import geometry, layer_indices
from laid.models.features import ImageFeatures
from laid.models.forward import collate, hidden_states, logits_at
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.progress import Progress

FORMAT = "laid-teacher-cache/1"
SHARD = 512  # questions


def build_cache(
    config: Mapping[str, Any],
    teacher: str | Path,
    coco_root: str | Path,
    questions: str | Path,
    out: str | Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Run the teacher once over `questions` and write the cache to folder `out`; returns its index."""
    from laid.evaluation.evaluate import source_of

    settings = config["teacher_cache"]
    record = provenance.collect(
        "teacher_cache", config, {"teacher": source_of(teacher), "questions": questions}
    )
    model = load_model(
        teacher, getattr(torch, config["training"]["dtype"]), config["evaluation"]["attention"], device
    )
    processor = Processor.load(teacher)
    features = ImageFeatures(
        model,
        processor,
        lambda path: safe_join(coco_root, path),
        limit_bytes=int(config["evaluation"]["feature_cache_gb"] * 2**30),
    )
    samples = build_samples(read_questions(questions), features, config["evaluation"]["order_seed"])
    shape = geometry(model)
    layers = layer_indices(settings["layers"], shape.layers) if settings["layers"] else ()
    dtype = getattr(torch, settings["dtype"])
    tokens = sum(len(s.prompt.ids) for s in samples)
    width = (shape.heads + shape.kv_heads) * shape.head_dim * len(layers) * dtype.itemsize
    print(
        f"teacher cache: {len(samples)} questions, {tokens} tokens, {tokens * width / 1e6:.0f} MB of queries and keys",
        flush=True,
    )
    key = sha256_json(
        {"inputs": record["data"], "settings": record["settings"], "code": record["code"].get("source")}
    )
    partial = Path(out).parent / f".{Path(out).name}.partial-{key[:12]}"
    partial.mkdir(parents=True, exist_ok=True)
    shards = []
    with Progress(len(samples), "teacher cache", unit="questions") as bar:
        for number, start in enumerate(range(0, len(samples), SHARD)):
            part = samples[start : start + SHARD]
            file = partial / f"shard-{number:05d}.safetensors"
            if not file.is_file():
                tensors = _teacher_pass(
                    model, features, part, layers, dtype, config["evaluation"]["batch_tokens"]
                )
                with atomic_path(file) as beside:
                    save_file(tensors, beside)
            shards.append(
                {"file": file.name, "first": start, "questions": len(part), "sha256": sha256_file(file)}
            )
            bar.update(len(part))
    index = {
        "format": FORMAT,
        "layers": list(layers),
        "model_layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "lengths": [len(s.prompt.ids) for s in samples],
        "shards": shards,
        "provenance": record,
    }
    write_json(partial / "index.json", index, indent=None)
    with atomic_path(out) as folder:
        partial.rename(folder)
    return index


@torch.inference_mode()
def _teacher_pass(
    model,
    features: ImageFeatures,
    samples: Sequence[Sample],
    layers: Sequence[int],
    dtype: torch.dtype,
    batch_tokens: int,
) -> dict[str, torch.Tensor]:
    """Tensors of one shard: logits (N, 2, vocabulary); q.<layer>, k.<layer> (tokens of all samples, heads * head_dim)."""
    device = next(model.parameters()).device
    found: dict[str, list] = {}
    order = sorted(range(len(samples)), key=lambda k: len(samples[k].prompt.ids))
    per_sample: list[dict[str, torch.Tensor]] = [{} for _ in samples]
    at = 0
    while at < len(order):
        batch = [order[at]]
        while at + len(batch) < len(order):
            longest = len(samples[order[at + len(batch)]].prompt.ids)
            if longest * (len(batch) + 1) > batch_tokens:
                break
            batch.append(order[at + len(batch)])
        at += len(batch)
        inputs = collate(
            [samples[k].prompt for k in batch], [f for k in batch for f in features.get(samples[k].paths)]
        ).to(device)
        if layers:
            with QKCapture(model, layers) as capture:
                hidden = hidden_states(model, inputs)
                caught = capture.take()
        else:
            hidden, caught = hidden_states(model, inputs), {}
        rows = torch.arange(len(batch), device=device).repeat_interleave(2)
        columns = torch.stack([inputs.lengths - 2, inputs.lengths - 1], 1).flatten()
        logits = logits_at(model, hidden, rows, columns).view(len(batch), 2, -1)
        for row, k in enumerate(batch):
            length = int(inputs.lengths[row])
            per_sample[k]["logits"] = logits[row].float().cpu()
            for layer, qk in caught.items():
                for name, tensor in (("q", qk.q), ("k", qk.k)):
                    flat = tensor[row, :, :length].transpose(0, 1).flatten(1)
                    per_sample[k][f"{name}.{layer}"] = flat.to(dtype).cpu()
    for sample in per_sample:
        for name, tensor in sample.items():
            found.setdefault(name, []).append(tensor)
    return {
        name: (torch.stack if name == "logits" else torch.cat)(parts).contiguous()
        for name, parts in found.items()
    }


class TeacherCache:
    """Reads a cache folder; shards are mapped, not loaded.

    Raises LaidError when the index or a shard is missing, cut short or changed, or when `questions` is not the file
    the cache was made from.
    """

    def __init__(self, folder: str | Path, questions: str | Path | None = None):
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise LaidError(
                f"{self.folder}: not a teacher cache ({FORMAT}); make it with `laid teacher-cache`"
            )
        self.index, self.layers = index, index["layers"]
        self.heads, self.kv_heads, self.head_dim = (index[k] for k in ("heads", "kv_heads", "head_dim"))
        if questions is not None and sha256_file(questions) != index["provenance"]["data"]["questions"]:
            raise LaidError(f"{self.folder}: was made from other questions than {questions}: make it again")
        self.open: list[Any] = []
        self.offsets: list[list[int]] = []
        for shard in index["shards"]:
            file = safe_join(self.folder, shard["file"])
            try:
                self.open.append(safe_open(file, "pt"))
            except (OSError, SafetensorError) as error:
                raise LaidError(f"{file}: cannot be read ({error}); make the cache again") from None
            lengths = index["lengths"][shard["first"] : shard["first"] + shard["questions"]]
            starts = [0]
            for length in lengths:
                starts.append(starts[-1] + length)
            self.offsets.append(starts)
        self.size = index["shards"][0]["questions"] if index["shards"] else 0

    def digest(self) -> str:
        """Hex SHA-256 that stands for the whole content: the index names every shard's own."""
        return sha256_json(
            {k: v for k, v in self.index.items() if k != "provenance"}
            | {"data": self.index["provenance"]["data"]}
        )

    def logits(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, 2, vocabulary) float32 logits at the answer and after it."""
        return torch.stack([self._slice(k, "logits", whole=False) for k in indices])

    def queries_keys(
        self, layer: int, indices: Sequence[int], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, k) of an absolute teacher layer: (B, heads, tokens, head_dim), (B, kv_heads, tokens, head_dim), padded right."""
        if layer not in self.layers:
            raise LaidError(
                f"{self.folder}: holds teacher layers {self.layers}, layer {layer} is asked for: name it in teacher_cache.layers"
            )
        out = []
        for name, heads in (("q", self.heads), ("k", self.kv_heads)):
            padded = torch.zeros(len(indices), tokens, heads * self.head_dim)
            for row, k in enumerate(indices):
                found = self._slice(k, f"{name}.{layer}")
                padded[row, : len(found)] = found
            out.append(padded.view(len(indices), tokens, heads, self.head_dim).transpose(1, 2))
        return out[0], out[1]

    def _slice(self, question: int, name: str, whole: bool = True) -> torch.Tensor:
        shard, at = divmod(question, self.size)
        tensor = self.open[shard].get_slice(name)
        if not whole:
            return tensor[at : at + 1][0]
        starts = self.offsets[shard]
        return tensor[starts[at] : starts[at + 1]]
