"""The teacher's one pass over the training questions, kept on disk for all epochs, students and ablations.

Kept per question: the logits at the two answer positions, exact, and for chosen layers the queries and keys
of all tokens before rotation. What lies in the cache was computed at ordinary positions; gaps are opened for
the student only. The cache is made of shards written whole, and an index written last: a killed pass goes on
with the next shard.

Opening a cache checks every shard's size, tensors and shapes, which costs a read of its header. Hashing all
of it, which finds a changed byte too, costs a read of the whole: `TeacherCache.verify`.
"""

from __future__ import annotations

import itertools
import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from laid import provenance
from laid.data.questions import read_questions
from laid.distill.online import teacher_outputs
from laid.distill.samples import Sample, build_samples
from laid.errors import LaidError
from laid.io import atomic_path, read_json, safe_join, sha256_file, sha256_json, write_json
from laid.methods.decoder import geometry, layer_indices
from laid.models.features import ImageFeatures
from laid.models.forward import collate
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.progress import Progress

FORMAT = "laid-teacher-cache/1"
SHARD = 512  # questions
SHARD_BYTES = 256 << 20  # what a pass holds in memory, and loses when it is killed


def build_cache(
    config: Mapping[str, Any],
    teacher: str | Path,
    coco_root: str | Path,
    questions: str | Path,
    out: str | Path,
    device: str = "cpu",
    labelled: bool = True,
    features_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Run the teacher once over `questions` and write the cache to folder `out`; returns its index.

    labelled=False: the questions' answers are not read (see laid.distill.samples); the cache serves methods with
    questions: long. features_folder: keeps visual features for other runs (laid.models.feature_store). Finished
    shards of a pass that was killed (same teacher, questions, settings and code) are taken up, not computed again.
    Raises LaidError for inputs that are missing or wrong.
    """
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
        store=features_folder,
    )
    samples = build_samples(read_questions(questions), features, config["evaluation"]["order_seed"], labelled)
    shape = geometry(model)
    layers = layer_indices(settings["layers"], shape.layers) if settings["layers"] else ()
    dtype = getattr(torch, settings["dtype"])
    tokens = sum(len(s.prompt.ids) for s in samples)
    width = (shape.heads + shape.kv_heads) * shape.head_dim * len(layers) * dtype.itemsize
    print(
        f"teacher cache: {len(samples)} questions, {tokens} tokens,"
        f" {tokens * width / 1e6:.0f} MB of queries and keys",
        flush=True,
    )
    key = sha256_json(
        {
            "inputs": record["data"],
            "settings": record["settings"],
            "code": record["code"].get("source"),
            "labelled": labelled,
        }
    )
    parent = Path(out).parent
    partial = parent / f".{Path(out).name}.partial-{key[:12]}"
    partial.mkdir(parents=True, exist_ok=True)
    vocabulary = model.config.get_text_config().vocab_size
    lengths = [len(s.prompt.ids) for s in samples]
    shards = []
    with Progress(len(samples), "teacher cache", unit="questions") as bar:
        for number, part in enumerate(shard_ranges(lengths, width, 8 * vocabulary)):
            file = partial / f"shard-{number:05d}.safetensors"
            shapes = {"logits": (len(part), 2, vocabulary)}
            tokens = sum(lengths[k] for k in part)
            for layer in layers:
                shapes |= {f"q.{layer}": (tokens, shape.heads * shape.head_dim)}
                shapes |= {f"k.{layer}": (tokens, shape.kv_heads * shape.head_dim)}
            if not file.is_file() or _shard_problem(file, shapes):
                tensors = _teacher_pass(
                    model,
                    features,
                    [samples[k] for k in part],
                    layers,
                    dtype,
                    config["evaluation"]["batch_tokens"],
                )
                with atomic_path(file) as beside:
                    save_file(tensors, beside)
            shards.append(
                {"file": file.name, "first": part[0], "questions": len(part), "sha256": sha256_file(file)}
            )
            bar.update(len(part))
    index = {
        "format": FORMAT,
        "labelled": labelled,
        "layers": list(layers),
        "model_layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "lengths": lengths,
        "shards": shards,
        "provenance": record,
    }
    write_json(partial / "index.json", index, indent=None)
    with atomic_path(out) as folder:
        partial.rename(folder)
    for stale in parent.glob(f".{Path(out).name}.partial-*"):  # of passes with other settings, never finished
        shutil.rmtree(stale, ignore_errors=True)
    return index


def shard_ranges(lengths: Sequence[int], token_bytes: int, question_bytes: int) -> list[range]:
    """Consecutive questions that fill a shard: SHARD questions or SHARD_BYTES, whatever comes first, at least
    one.

    lengths: tokens per question; token_bytes, question_bytes: what the cache keeps of each.
    """
    ranges, start, held = [], 0, 0
    for k, length in enumerate(lengths):
        size = length * token_bytes + question_bytes
        if k > start and (k - start == SHARD or held + size > SHARD_BYTES):
            ranges.append(range(start, k))
            start, held = k, 0
        held += size
    return [*ranges, range(start, len(lengths))]


def _shard_problem(file: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> str | None:
    """What is wrong with a shard as far as its header tells; None where it holds just these tensors, whole.

    A None in a shape stands for any size.
    """
    try:
        with safe_open(file, "pt") as shard:
            found = {name: tuple(shard.get_slice(name).get_shape()) for name in list(shard.keys())}
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({' '.join(str(error).split())})"
    for name in sorted(found.keys() | shapes.keys()):
        have, want = found.get(name, ()), shapes.get(name, ())
        if len(have) != len(want) or any(b not in (None, a) for a, b in zip(have, want)):
            return f"{name} has shape {have}, expected {want}"
    return None


@torch.inference_mode()
def _teacher_pass(
    model,
    features: ImageFeatures,
    samples: Sequence[Sample],
    layers: Sequence[int],
    dtype: torch.dtype,
    batch_tokens: int,
) -> dict[str, torch.Tensor]:
    """Tensors of one shard: logits (N, 2, vocabulary); q.<layer>, k.<layer> (tokens, heads * head_dim)."""
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
        logits, caught = teacher_outputs(model, inputs, layers)
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

    questions: the file that is trained on. Raises LaidError when the index or a shard is missing, cut short
    or of other shapes than the index says, or when `questions` is not the file the cache was made from.
    """

    def __init__(self, folder: str | Path, questions: str | Path | None = None):
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise LaidError(
                f"{self.folder}: not a teacher cache ({FORMAT}); make it with `laid teacher-cache`"
            )
        self.index = index
        try:
            self.layers, self.lengths = index["layers"], index["lengths"]
            self.depth, self.labelled = index["model_layers"], index.get("labelled", True)
            self.heads, self.kv_heads, self.head_dim = (index[k] for k in ("heads", "kv_heads", "head_dim"))
            self.shards = [(s["file"], s["first"], s["questions"], s["sha256"]) for s in index["shards"]]
            made_from = index["provenance"]["data"]["questions"]
        except (KeyError, TypeError) as error:
            raise LaidError(f"{self.folder}/index.json: broken ({error}); make the cache again") from None
        if questions is not None and sha256_file(questions) != made_from:
            raise LaidError(f"{self.folder}: was made from other questions than {questions}: make it again")
        self.firsts = [first for _, first, _, _ in self.shards]
        if self.firsts != [0, *(first + count for _, first, count, _ in self.shards)][:-1] or (
            self.firsts and self.firsts[-1] + self.shards[-1][2] != len(self.lengths)
        ):
            raise LaidError(
                f"{self.folder}/index.json: its shards do not cover its {len(self.lengths)} questions;"
                " make the cache again"
            )
        self.starts: list[list[int]] = []  # per shard: where each of its questions' tokens begin
        self.open: list[Any] = []
        for name, first, count, _ in self.shards:
            self.starts.append([0, *itertools.accumulate(self.lengths[first : first + count])])
            self.open.append(self._checked(safe_join(self.folder, name), count, self.starts[-1][-1]))

    def _checked(self, file: Path, count: int, tokens: int) -> Any:
        """The shard, open; LaidError where its header does not fit the index."""
        shapes: dict[str, tuple[int | None, ...]] = {"logits": (count, 2, None)}
        for layer in self.layers:
            shapes[f"q.{layer}"] = (tokens, self.heads * self.head_dim)
            shapes[f"k.{layer}"] = (tokens, self.kv_heads * self.head_dim)
        problem = _shard_problem(file, shapes)
        if problem:
            raise LaidError(f"{file}: {problem}; make the cache again")
        return safe_open(file, "pt")

    def verify(self) -> None:
        """Hash every shard. Raises LaidError for the first whose bytes are not those that were written."""
        for name, _, _, digest in self.shards:
            if sha256_file(safe_join(self.folder, name)) != digest:
                raise LaidError(f"{self.folder / name}: changed since it was written; make the cache again")

    def logits(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, 2, vocabulary) float32 logits at the answer and after it."""
        return torch.stack([self._slice(k, "logits", whole=False) for k in indices])

    def queries_keys(
        self, layer: int, indices: Sequence[int], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, k) of an absolute teacher layer, padded right, float32.

        q: (B, heads, tokens, head_dim), k: (B, kv_heads, tokens, head_dim). Raises LaidError for a layer not
        kept.
        """
        if layer not in self.layers:
            raise LaidError(
                f"{self.folder}: holds teacher layers {self.layers}, layer {layer} is asked for:"
                " name it in teacher_cache.layers"
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
        shard = bisect_right(self.firsts, question) - 1
        at = question - self.firsts[shard]
        tensor = self.open[shard].get_slice(name)
        if not whole:
            return tensor[at : at + 1][0]
        starts = self.starts[shard]
        return tensor[starts[at] : starts[at + 1]]
