"""The teacher's one pass over the training questions, kept on disk for all epochs, students and ablations.

Kept per conversation: the logits at the two positions of a one-token answer, exact; of longer answers the TOP largest of each
position, with the sum of the others at the temperatures of the methods (laid.distill.kl says what the divergence is short of);
and for chosen layers queries and keys of all tokens, before rotation. In float8 each head of each token has a power of two of its own, so that what is read back is exact in
bfloat16. The cache is computed at ordinary positions; gaps open for the student only. It is made of shards written
whole, and an index written last: a killed pass goes on with the next shard.

Opening a cache checks every shard's size, tensors and shapes, which costs a read of its header. A training hashes all of
it once, before its first step (`TeacherCache.verify`), and so does `laid verify`: a changed byte is found at the cost of
a read.
"""

from __future__ import annotations

import itertools
import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from typing_extensions import TypedDict

from laid import provenance
from laid.data.chat import image_file, named_images, read_chats
from laid.data.images import require_images
from laid.distill.distillation import ROWS, Said, TeacherOutputs
from laid.distill.kl import TopK
from laid.errors import LaidError
from laid.io import (
    atomic_path,
    parsed,
    read_json,
    remove_half_written,
    require_place,
    require_room,
    safe_join,
    sha256_file,
    sha256_json,
    size_text,
    write_json,
)
from laid.models import parallel
from laid.models.decoder import geometry, layer_indices
from laid.models.features import ImageFeatures
from laid.models.forward import answers_at, collate
from laid.models.loading import empty_model, load_model, source_of
from laid.models.processing import Processor
from laid.progress import Progress
from laid.settings import Settings, TrainedMethod
from laid.training.samples import Sample, build_samples
from laid.training.student import answer_states

FORMAT = "laid-teacher-cache/1"
FILES = ("shard-*.safetensors", "index.json", "cost.json")
TOP = 128  # logits of a token of a long answer: a kilobyte
SHARD = 512  # questions
SHARD_BYTES = 256 << 20  # what a pass holds in memory, and loses when it is killed


class Shard(TypedDict):
    file: str
    first: int
    questions: int
    sha256: str


class MadeFrom(TypedDict):
    questions: str


class Record(TypedDict):
    data: MadeFrom


class Top(TypedDict):
    logits: int
    temperatures: list[float]
    words: int


class Index(TypedDict):
    """index.json, as far as it is read. lengths: tokens of each question. float8_error: in float8 alone. answers, top: where
    answers are of several tokens."""

    layers: list[int]
    model_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    lengths: list[int]
    answers: NotRequired[list[int]]
    top: NotRequired[Top]
    shards: list[Shard]
    provenance: Record
    float8_error: NotRequired[dict[str, float]]


@dataclass(frozen=True)
class Kept:
    """What a cache keeps of a teacher: of which layers, in which format.

    vocabulary is None where it is not known (a cache that is read). temperatures: at which the logits that are not kept are summed;
    top: how many are.
    """

    layers: Sequence[int]
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int | None
    dtype: str = "bfloat16"
    temperatures: tuple[float, ...] = (1.0,)
    top: int = TOP

    def shapes(self, tokens: int, answers: Sequence[int]) -> dict[str, tuple[int | None, ...]]:
        """Tensor -> shape, of one shard. answers: answer tokens of its questions."""
        exact, cut = sum(map(_exact, answers)), sum(n for n in answers if not _exact(n))
        shapes: dict[str, tuple[int | None, ...]] = {}
        if exact:
            shapes["logits"] = (exact, 2, self.vocabulary)
        if cut:
            shapes |= {f"top.{name}": (cut, self.top) for name in ("values", "ids")}
            shapes["top.rest"] = (cut, len(self.temperatures))
        for layer in self.layers:
            for name, heads in (("q", self.heads), ("k", self.kv_heads)):
                shapes[f"{name}.{layer}"] = (tokens, heads * self.head_dim)
                if self.dtype == "float8":
                    shapes[f"{name}.{layer}.exponent"] = (tokens, heads)
                    shapes[f"{name}.{layer}.error"] = (2,)
        return shapes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's queries and keys, over all layers."""
        width = {"float32": 4, "bfloat16": 2, "float8": 1}[self.dtype]
        return (
            len(self.layers)
            * (self.heads + self.kv_heads)
            * (self.head_dim * width + (self.dtype == "float8"))
        )

    def sizes(self, samples: Sequence[Sample]) -> tuple[int, int]:
        """Bytes of (logits, queries and keys); the shards' headers add some hundred bytes each."""
        logits = sum(self.said_bytes(len(sample.labels)) for sample in samples)
        return logits, sum(map(_tokens, samples)) * self.token_bytes

    def said_bytes(self, answers: int) -> int:
        """Bytes of the logits of a question with so many answer tokens."""
        return (
            8 * self.vocabulary if _exact(answers) else answers * (8 * self.top + 4 * len(self.temperatures))
        )


def _exact(answers: int) -> bool:
    """Whether all logits of an answer of so many tokens, the end of the turn among them, are kept."""
    return answers == 2


def _tokens(sample: Sample) -> int:
    return len(sample.prompt.ids)


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., head_dim) -> float8 e4m3 of the same shape and exponents int8 (...): x is about the one times 2 ** the other.

    The exponent is the least at which the largest element stays within e4m3's 448.
    """
    fraction, exponent = x.float().abs().amax(-1).frexp()  # the fraction of 448 is 0.875
    exponent = (exponent - 8 - (fraction <= 0.875).int()).clamp(-120, 120)  # so that two to it is a float32
    return torch.ldexp(x.float(), -exponent[..., None]).to(torch.float8_e4m3fn), exponent.to(torch.int8)


def from_float8(values: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """bfloat16, which holds e4m3's four bits times a power of two exactly."""
    return torch.ldexp(values.float(), exponents.int()[..., None]).bfloat16()


def cache_size(
    settings: Settings,
    teacher: str | Path,
    coco_root: str | Path,
    questions: str | Path,
) -> str:
    """What `build_cache` would write, in a line, without running or even loading the teacher's weights."""
    model = empty_model(teacher)
    features = ImageFeatures(model, Processor.load(teacher), image_file(coco_root))
    samples = build_samples(read_chats(questions, settings.evaluation.order_seed), features, ahead=False)
    return _size_line(_kept(settings, model), samples)


def _kept(settings: Settings, model: torch.nn.Module) -> Kept:
    asked, shape = settings.teacher_cache, geometry(model)
    layers = layer_indices(asked.layers, shape.layers) if asked.layers else ()
    words = model.config.get_text_config().vocab_size
    trained = (method for method in settings.methods.values() if isinstance(method, TrainedMethod))
    temperatures = tuple(sorted({1.0, *(method.temperature for method in trained)}))
    return Kept(
        layers, shape.heads, shape.kv_heads, shape.head_dim, words, asked.dtype, temperatures, min(TOP, words - 1)
    )  # fmt: skip


def _size_line(kept: Kept, samples: Sequence[Sample]) -> str:
    logits, heads = kept.sizes(samples)
    return (
        f"teacher cache: {len(samples)} questions, {sum(map(_tokens, samples))} tokens: {size_text(logits)} of logits,"
        f" {size_text(heads)} of queries and keys of {len(kept.layers)} layers in {kept.dtype}, {size_text(logits + heads)} in all"
    )


def build_cache(
    settings: Settings,
    teacher: str | Path,
    coco_root: str | Path,
    questions: str | Path,
    out: str | Path,
    device: str = "cpu",
    features_folder: str | Path | None = None,
    other: ImageFeatures | None = None,
) -> dict[str, Any]:
    """Run the teacher once over `questions` and write the cache to folder `out`; returns its index.

    features_folder: keeps visual features for other runs (laid.models.feature_store). other: another model's, which sees the
    images as they are opened. Finished shards of a pass that was killed (same teacher, questions, settings and code) are
    taken up, not computed again.
    Raises LaidError for inputs that are missing or wrong. Of processes that share the teacher (laid.models.parallel) the first
    alone writes, and returns the index.
    """
    require_place(out, *FILES)
    read = read_chats(questions, settings.evaluation.order_seed)
    images = named_images(read)
    require_images(coco_root, images, [questions])
    inputs = {"teacher": source_of(teacher), "questions": questions, "images": (coco_root, images)}
    record = provenance.collect("teacher_cache", settings, inputs)
    model = load_model(
        teacher, getattr(torch, settings.training.dtype), settings.evaluation.attention, device
    )
    processor = Processor.load(teacher)
    features = ImageFeatures(
        model,
        processor,
        image_file(coco_root),
        limit_bytes=int(settings.evaluation.feature_cache_gb * 2**30),
        store=features_folder,
    )
    if other is not None:
        features.alongside(other)
    samples = build_samples(read, features, ahead=False)
    kept = _kept(settings, model)
    print(_size_line(kept, samples), flush=True)
    answers = [len(sample.labels) for sample in samples]
    cut = not all(map(_exact, answers))
    key = sha256_json(
        {
            "inputs": record["data"],
            **({"temperatures": kept.temperatures} if cut else {}),
            "settings": record["settings"],
            "code": record["code"].get("source"),
            "libraries": record["libraries"],
        }
    )
    parent = Path(out).parent
    partial = parent / f".{Path(out).name}.partial-{key[:12]}"
    partial.mkdir(parents=True, exist_ok=True)
    if parallel.first():
        remove_half_written(partial)
    there = sum(file.stat().st_size for file in partial.iterdir())
    require_room(
        partial, sum(kept.sizes(samples)) - there, "the teacher's cache",
        "choose another folder, fewer teacher_cache.layers, or dtype: float8",
    )  # fmt: skip
    features.prepare((path for sample in samples for path in sample.paths), "images")
    lengths = [_tokens(s) for s in samples]
    ranges = shard_ranges(lengths, kept.token_bytes, [kept.said_bytes(n) for n in answers])
    shards = []
    with Progress(len(samples), "teacher cache", unit="questions") as bar:
        for number, part in enumerate(ranges):
            file = partial / f"shard-{number:05d}.safetensors"
            shapes = kept.shapes(sum(lengths[k] for k in part), [answers[k] for k in part])
            if parallel.agree(lambda: not file.is_file() or _shard_problem(file, shapes)):  # noqa: B023 (called here)
                tensors = _teacher_pass(
                    model,
                    features,
                    [samples[k] for k in part],
                    kept,
                    settings.evaluation.batch_tokens,
                )
                if parallel.first():
                    with atomic_path(file, sum(t.nbytes for t in tensors.values())) as beside:
                        save_file(tensors, beside)
            bar.update(len(part))
            if parallel.first():
                shards.append(
                    {"file": file.name, "first": part[0], "questions": len(part), "sha256": sha256_file(file)}
                )
    if not parallel.first():
        return {}
    index = {
        "format": FORMAT,
        "layers": list(kept.layers),
        "model_layers": geometry(model).layers,
        "heads": kept.heads,
        "kv_heads": kept.kv_heads,
        "head_dim": kept.head_dim,
        "lengths": lengths,
        "shards": shards,
        "provenance": record,
    }
    if cut:
        mean, largest = _outside(partial, shards, kept.temperatures.index(1.0))
        index["answers"] = answers
        index["top"] = {
            "logits": kept.top,
            "temperatures": list(kept.temperatures),
            "words": kept.vocabulary,
            "outside": {"mean": mean, "largest": largest},
        }
        print(
            f"teacher cache: the {kept.top} largest logits of each token of a long answer; the others have {100 * mean:.3g} % of"
            f" the probability, {100 * largest:.3g} % at most",
            flush=True,
        )
    if kept.dtype == "float8":
        index["float8_error"] = _float8_error(partial, shards, kept.layers)
        for name, error in index["float8_error"].items():
            print(f"teacher cache: {name} in float8, relative error {100 * error:.2f} % (rms)", flush=True)
    write_json(partial / "index.json", index, indent=None)
    with atomic_path(out) as folder:
        partial.rename(folder)
    for stale in parent.glob(f".{Path(out).name}.partial-*"):  # of passes with other settings, never finished
        shutil.rmtree(stale, ignore_errors=True)
    return index


def _outside(folder: Path, shards: Sequence[Mapping[str, Any]], at: int) -> tuple[float, float]:
    """(mean, largest) probability, at temperature 1, of all logits that are not kept; at: the column of that temperature."""
    found = []
    for shard in shards:
        with safe_open(folder / shard["file"], "pt") as file:
            if "top.rest" in file.keys():  # noqa: SIM118
                kept, rest = file.get_tensor("top.values").logsumexp(-1), file.get_tensor("top.rest")[:, at]
                found.append((rest - kept).sigmoid().double())
    outside = torch.cat(found)
    return round(float(outside.mean()), 9), round(float(outside.max()), 9)


def shard_ranges(
    lengths: Sequence[int], token_bytes: int, question_bytes: int | Sequence[int]
) -> list[range]:
    """Consecutive questions that fill a shard: SHARD questions or SHARD_BYTES, whatever comes first, at least
    one.

    lengths: tokens per question; token_bytes, question_bytes: what the cache keeps of each (question_bytes: of all alike, or one by
    one).
    """
    ranges, start, held = [], 0, 0
    said = [question_bytes] * len(lengths) if isinstance(question_bytes, int) else question_bytes
    for k, length in enumerate(lengths):
        size = length * token_bytes + said[k]
        if k > start and (k - start == SHARD or held + size > SHARD_BYTES):
            ranges.append(range(start, k))
            start, held = k, 0
        held += size
    return [*ranges, range(start, len(lengths))]


def _float8_error(
    folder: Path, shards: Sequence[Mapping[str, Any]], layers: Sequence[int]
) -> dict[str, float]:
    """Tensor -> root of (squared error over squared size) of all its elements."""
    found = {}
    for name in (f"{kind}.{layer}" for layer in layers for kind in "qk"):
        total = torch.zeros(2, dtype=torch.float64)
        for shard in shards:
            with safe_open(folder / shard["file"], "pt") as file:
                total += file.get_tensor(f"{name}.error")
        found[name] = round(float((total[0] / total[1].clamp_min(1e-300)).sqrt()), 6)
    return found


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
    kept: Kept,
    batch_tokens: int,
) -> dict[str, torch.Tensor]:
    """Tensors of one shard: logits (N, 2, vocabulary) and top.* (tokens of long answers, ...); q.<layer>, k.<layer> (tokens, heads * head_dim)."""
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
        )
        inputs.answers = answers_at([samples[k].at for k in batch])
        inputs = inputs.to(device)
        states, caught = answer_states(model, inputs, kept.layers)
        for k, said in zip(
            batch, _said(model, states, [len(samples[k].labels) for k in batch], kept), strict=True
        ):
            per_sample[k] |= said
        for row, k in enumerate(batch):
            length = int(inputs.lengths[row])
            for layer, qk in caught.items():
                for name, tensor in (("q", qk.q), ("k", qk.k)):
                    part = tensor[row, :, :length].transpose(0, 1)
                    if kept.dtype != "float8":
                        per_sample[k][f"{name}.{layer}"] = (
                            part.flatten(1).to(getattr(torch, kept.dtype)).cpu()
                        )
                        continue
                    values, exponents = to_float8(part)
                    error = torch.stack([from_float8(values, exponents).double() - part, part.double()])
                    per_sample[k][f"{name}.{layer}"] = values.flatten(1).cpu()
                    per_sample[k][f"{name}.{layer}.exponent"] = exponents.cpu()
                    per_sample[k][f"{name}.{layer}.error"] = error.square().sum((1, 2, 3)).cpu()
    for sample in per_sample:
        for name, tensor in sample.items():
            found.setdefault(name, []).append(tensor)
    joined = {}
    for name, parts in found.items():
        if name == "logits":
            joined[name] = torch.stack(parts)
        else:
            joined[name] = sum(parts) if name.endswith(".error") else torch.cat(parts)
    return {name: tensor.contiguous() for name, tensor in joined.items()}


def _said(model, states: torch.Tensor, answers: Sequence[int], kept: Kept) -> list[dict[str, torch.Tensor]]:
    """Per question, what is kept of its logits. states: (N, hidden) at the answer tokens of all, answers: how many each has."""
    head, parts = model.get_output_embeddings(), states.split(list(answers))
    exact = [part for part, n in zip(parts, answers, strict=True) if _exact(n)]
    whole = iter(head(torch.cat(exact)).view(len(exact), 2, -1)) if exact else iter(())
    found = []
    for part, n in zip(parts, answers, strict=True):
        if _exact(n):
            found.append({"logits": next(whole).float().cpu()})
            continue
        tops = [TopK.of(head(rows).float(), kept.top, kept.temperatures) for rows in part.split(ROWS)]
        rest = [torch.stack([top.rest[t] for t in kept.temperatures], -1) for top in tops]
        columns = {
            "values": [top.values for top in tops],
            "ids": [top.ids.int() for top in tops],
            "rest": rest,
        }
        found.append({f"top.{name}": torch.cat(rows).cpu() for name, rows in columns.items()})
    return found


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
        self.index = parsed(index, Index, self.folder / "index.json")
        self.layers, self.lengths, self.depth = index["layers"], index["lengths"], index["model_layers"]
        self.heads, self.kv_heads, self.head_dim = (index[k] for k in ("heads", "kv_heads", "head_dim"))
        self.shards = [(s["file"], s["first"], s["questions"], s["sha256"]) for s in index["shards"]]
        made_from = index["provenance"]["data"]["questions"]
        self.kept = Kept(
            self.layers, self.heads, self.kv_heads, self.head_dim, None,
            "float8" if "float8_error" in index else "bfloat16",  # float32 is read as bfloat16 is
        )  # fmt: skip
        self.answers, self.words = index.get("answers") or [2] * len(self.lengths), None
        if len(self.answers) != len(self.lengths) or min(self.answers, default=2) < 2:
            raise LaidError(
                f"{self.folder}/index.json: answers of {len(self.answers)} questions, lengths of {len(self.lengths)};"
                " make the cache again"
            )
        if top := index.get("top"):
            self.words = top["words"]
            self.kept = replace(self.kept, temperatures=tuple(top["temperatures"]), top=top["logits"])
        if questions is not None and provenance.fingerprint(Path(questions)) != made_from:
            read_chats(questions)  # a broken file says so itself
            raise LaidError(f"{self.folder}: was made from other questions than {questions}: make it again")
        self.firsts = [first for _, first, _, _ in self.shards]
        if self.firsts != [0, *(first + count for _, first, count, _ in self.shards)][:-1] or (
            self.firsts and self.firsts[-1] + self.shards[-1][2] != len(self.lengths)
        ):
            raise LaidError(
                f"{self.folder}/index.json: its shards do not cover its {len(self.lengths)} questions;"
                " make the cache again"
            )
        self.starts: list[list[int]] = []  # per shard: where its questions' tokens begin
        self.said: list[list[int]] = []  # per question of a shard: where its logits lie, in either tensor
        self.open: list[Any] = []
        for name, first, count, _ in self.shards:
            self.starts.append([0, *itertools.accumulate(self.lengths[first : first + count])])
            answers = self.answers[first : first + count]
            places = {True: 0, False: 0}
            self.said.append([])
            for n in answers:
                self.said[-1].append(places[_exact(n)])
                places[_exact(n)] += 1 if _exact(n) else n
            shapes = self.kept.shapes(self.starts[-1][-1], answers)
            self.open.append(self._checked(safe_join(self.folder, name), shapes))

    def _checked(self, file: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> Any:
        """The shard, open; LaidError where its header does not fit the index."""
        problem = _shard_problem(file, shapes)
        if problem:
            raise LaidError(f"{file}: {problem}; make the cache again")
        return safe_open(file, "pt")

    def verify(self) -> None:
        """Hash every shard. Raises LaidError for the first whose bytes are not those that were written."""
        hashes = {name: digest for name, _, _, digest in self.shards}
        for problem in provenance.changed(self.folder, hashes):
            raise LaidError(f"{problem}; make the cache again")

    def logits(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, 2, vocabulary) float32 logits of questions with answers of one token, at the answer and after it."""
        return torch.stack([self._rows(k, "logits") for k in indices])

    def top(self, indices: Sequence[int]) -> TopK:
        """The largest logits at the answer tokens of questions with longer answers, one question after the other."""
        values, ids, rest = (
            torch.cat([self._rows(k, f"top.{name}") for k in indices]) for name in ("values", "ids", "rest")
        )
        by_temperature = dict(zip(self.kept.temperatures, rest.unbind(-1), strict=True))
        return TopK(values, ids.long(), by_temperature, self.words)

    def _said(self, indices: Sequence[int]) -> Said | list[tuple[torch.Tensor, Said]]:
        """The logits at the answer tokens of `indices`, as TeacherOutputs has them."""
        counts = [self.answers[k] for k in indices]
        kinds = set(map(_exact, counts))
        if kinds == {True}:
            return self.logits(indices)
        if kinds == {False}:
            return self.top(indices)
        found = []
        places = torch.arange(sum(counts)).split(counts)
        for exact in (True, False):
            mine = [at for at, n in enumerate(counts) if _exact(n) is exact]
            own = [indices[at] for at in mine]
            said = self.logits(own).flatten(0, 1) if exact else self.top(own)
            found.append((torch.cat([places[at] for at in mine]), said))
        return found

    def queries_keys(
        self, layer: int, indices: Sequence[int], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, k) of an absolute teacher layer, padded right, in the format they are kept in (float8: bfloat16).

        q: (B, heads, tokens, head_dim); k: (B, kv_heads, tokens, head_dim).
        Raises LaidError for a layer not kept.
        """
        if layer not in self.layers:
            raise LaidError(
                f"{self.folder}: holds teacher layers {self.layers}, layer {layer} is asked for:"
                " name it in teacher_cache.layers"
            )
        out = []
        for name, heads in (("q", self.heads), ("k", self.kv_heads)):
            parts = []
            for k in indices:
                found = self._rows(k, f"{name}.{layer}").unflatten(1, (heads, self.head_dim))
                if self.kept.dtype == "float8":
                    found = from_float8(found, self._rows(k, f"{name}.{layer}.exponent"))
                parts.append(found)
            padded = torch.zeros(len(indices), tokens, heads, self.head_dim, dtype=parts[0].dtype)
            for row, found in enumerate(parts):
                padded[row, : len(found)] = found
            out.append(padded.transpose(1, 2))
        return out[0], out[1]

    def outputs(
        self, indices: Sequence[int], tokens: int, layers: Sequence[int], logits: bool = True
    ) -> TeacherOutputs:
        """As laid.training.teacher.Teacher has it."""
        heads = {layer: self.queries_keys(layer, indices, tokens) for layer in layers}
        return TeacherOutputs(self._said(indices) if logits else None, heads)

    def _rows(self, question: int, name: str) -> torch.Tensor:
        """A question's part of a tensor: (2, vocabulary) of logits, (answer tokens, ...) of top.*, else (tokens, ...)."""
        shard = bisect_right(self.firsts, question) - 1
        at = question - self.firsts[shard]
        tensor = self.open[shard].get_slice(name)
        said = self.said[shard][at]
        if name == "logits":
            return tensor[said : said + 1][0]
        if name.startswith("top."):
            return tensor[said : said + self.answers[question]]
        starts = self.starts[shard]
        return tensor[starts[at] : starts[at + 1]]
