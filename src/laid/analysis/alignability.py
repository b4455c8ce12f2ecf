"""How much of a student's queries and keys equation 7 can reach, for any two checkpoints.

Equation 7 pulls every head of the student to a mixture of the teacher's heads. Whether there is such a mixture can be
measured before any training: least squares on half of the questions, R^2 on the other half, with three kinds of mixture,

    real      sum_j w_j x_j     one weight per teacher head: equation 7 itself
    complex   sum_j c_jf x_jf   a complex weight per teacher head and frequency: all linear maps of single heads that commute
                                with RoPE's rotation, so that scores keep their form
    linear    W [x_1 ... x_h]   any linear map of all the teacher's heads: what a learned projection could reach

x_j is a teacher head before rotation, x_jf its rotation pair f as a complex number (laid.analysis.spectrum.pairs). Each
mixture has a constant of its own, and R^2 is over that constant. How much the constant alone explains of the raw mean square
is told beside: that is what the loss falls through where the mixtures reach nothing.

Queries are those of the question's tokens, keys those of visual tokens. Keys are taken by KV head, with weights of their own:
equation 7, whose keys share the weights of the queries, can reach at most as much.

Only second moments are kept, in float64, (teacher heads x head_dim) x (all heads x head_dim) per pair of layers, and the
errors of each held-out question: a question's tokens are seen once and forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laid import provenance
from laid.analysis.attention import LayerVisitor
from laid.data.chat import image_file, read_chats
from laid.errors import LaidError
from laid.methods.registry import load_with_method
from laid.models.capture import LayerQK
from laid.models.decoder import Geometry, geometry, layer_indices, text_model
from laid.models.features import ImageFeatures
from laid.models.forward import collate, hidden_states
from laid.models.loading import source_of
from laid.progress import Progress
from laid.settings import Settings, TrainedMethod
from laid.training.data import require_same_tokens
from laid.training.samples import Sample, build_samples

FORMAT = "laid-alignability/1"
SIDES = ("queries", "keys")
KINDS = ("real", "complex", "linear")
RIDGE = 1e-6  # relative to the mean square of what is mixed
RESAMPLES = 1000


class Moments:
    """Sums over tokens from which all mixtures follow. x: (tokens, teacher_heads, dim_t), y: (tokens, heads, dim_s)."""

    def __init__(self) -> None:
        self.tokens = 0
        self.x: Tensor | float = 0.0
        self.y: Tensor | float = 0.0
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.shapes = (*x.shape[1:], *y.shape[1:])
        x, y = x.double().flatten(1), y.double().flatten(1)
        self.tokens += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy = self.xx + x.T @ x, self.xy + x.T @ y

    def fit(self, kinds: Sequence[str] = KINDS) -> Fit:
        """The least-squares mixture of each kind."""
        heads_t, dim_t, heads_s, dim_s = self.shapes
        mean_x, mean_y = self.x / self.tokens, self.y / self.tokens
        gram = (self.xx / self.tokens - torch.outer(mean_x, mean_x)).view(heads_t, dim_t, heads_t, dim_t)
        cross = (self.xy / self.tokens - torch.outer(mean_x, mean_y)).view(heads_t, dim_t, heads_s, dim_s)
        weights = {kind: MIXTURES[kind](gram, cross) for kind in kinds}
        return Fit(mean_x.view(heads_t, dim_t), mean_y.view(heads_s, dim_s), weights)


@dataclass
class Fit:
    """mean_x: (teacher_heads, dim_t), mean_y: (heads, dim_s); weights: (teacher_heads, dim_t, heads, dim_s) of each kind."""

    mean_x: Tensor
    mean_y: Tensor
    weights: dict[str, Tensor]

    def missed(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """(heads,) sums of squares over the tokens of Moments.add's x and y: "raw" of y, "centred" of y around the constant,
        and of each kind of mixture what it leaves."""
        x, y = x.double() - self.mean_x, y.double()
        sums, y = {"raw": y.square().sum((0, 2))}, y - self.mean_y
        sums["centred"] = y.square().sum((0, 2))
        for kind, weights in self.weights.items():
            sums[kind] = (y - torch.einsum("tjd,jdhe->the", x, weights)).square().sum((0, 2))
        return sums


def real_weights(gram: Tensor, cross: Tensor) -> Tensor:
    """Equation 7. gram: (heads_t, dim, heads_t, dim), cross: (heads_t, dim, heads_s, dim); the shape of cross is returned."""
    w = _solve(torch.einsum("jdkd->jk", gram), torch.einsum("jdhd->jh", cross))
    return torch.einsum("jh,de->jdhe", w, torch.eye(gram.shape[1], dtype=w.dtype, device=w.device))


def complex_weights(gram: Tensor, cross: Tensor) -> Tensor:
    """One complex number per teacher head and frequency; shapes as in real_weights."""
    halves = (2, gram.shape[1] // 2)  # dims f and f + dim / 2 are the parts a, b of a + ib
    gram, cross = (x.unflatten(1, halves).unflatten(-1, halves) for x in (gram, cross))

    def conjugate_product(x: Tensor) -> Tensor:  # (frequencies, j, k): conj(x_jf) x_kf
        p = torch.einsum("jpfkqf->pqfjk", x)
        return torch.complex(p[0, 0] + p[1, 1], p[0, 1] - p[1, 0])

    w = _solve(conjugate_product(gram), conjugate_product(cross))
    turn = torch.stack([torch.stack([w.real, w.imag]), torch.stack([-w.imag, w.real])])  # part in, part out
    alone = torch.eye(halves[1], dtype=gram.dtype, device=gram.device)
    return torch.einsum("pqfjh,fg->jpfhqg", turn, alone).flatten(4).flatten(1, 2)


def linear_weights(gram: Tensor, cross: Tensor) -> Tensor:
    """Any linear map; head_dim may differ. gram: (heads_t, dim_t, heads_t, dim_t), cross: (heads_t, dim_t, heads_s, dim_s)."""
    wide = gram.shape[0] * gram.shape[1]
    return _solve(gram.reshape(wide, wide), cross.reshape(wide, -1)).view(cross.shape)


MIXTURES = {"real": real_weights, "complex": complex_weights, "linear": linear_weights}


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    gram = gram.clone()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True)
    return torch.linalg.solve(gram, cross)


def explained(missed: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """What is explained, given Fit.missed of every held-out question: by the "constant" (of the raw mean square) and by each
    kind (of the centred): the share over all heads, its 95 % interval over questions, and per head. None: not defined.
    """
    sums = {name: np.array([question[name] for question in missed]) for name in missed[0]}
    n = len(missed)
    draws = np.random.default_rng([0, n]).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    shares: dict[str, Any] = dict.fromkeys(("constant", *KINDS))
    for name, left, whole in [("constant", "centred", "raw"), *((kind, kind, "centred") for kind in KINDS)]:
        if left in sums:
            a, b = sums[left], sums[whole]
            low, high = np.quantile(1 - (draws @ a.sum(1)) / (draws @ b.sum(1)), [0.025, 0.975])
            shares[name] = {
                "share": _rounded(1 - a.sum() / b.sum()),
                "interval": [_rounded(low), _rounded(high)],
                "heads": [_rounded(value) for value in 1 - a.sum(0) / b.sum(0)],
            }
    return shares


def _rounded(value: float) -> float:
    return round(float(value), 6)


def layer_pairs(settings: Settings, layers: int, teacher_layers: int) -> dict[tuple[int, int], bool]:
    """Pairs of a student's and a teacher's layer, and whether they are of the same relative depth.

    Every student layer with that of the teacher, last to last and first to first, and the pairs that the methods align.
    Raises LaidError for a pair that a method names and the models do not have.
    """
    step = (teacher_layers - 1) / max(1, layers - 1)
    found = {
        (layer, teacher_layers - 1 - round((layers - 1 - layer) * step)): True for layer in range(layers)
    }
    for method in settings.methods.values():
        for own, theirs in method.alignment.pairs if isinstance(method, TrainedMethod) else ():
            pair = (layer_indices(own, layers)[0], layer_indices(theirs, teacher_layers)[0])
            found.setdefault(pair, False)
    return dict(sorted(found.items()))


class Reader:
    """A model that reads samples; images are seen when a sample needs them."""

    def __init__(self, settings: Settings, source: str | Path, coco_root: str | Path, device: str) -> None:
        loaded = load_with_method(settings, "base", source, None, device)
        self.model, self.shape = loaded.model, geometry(loaded.model)
        self.theta = text_model(self.model).rotary_emb.inv_freq.double().cpu()
        self.device = next(self.model.parameters()).device
        self.features = ImageFeatures(self.model, loaded.processor, image_file(coco_root), limit_bytes=0)

    @torch.inference_mode()
    def heads(self, sample: Sample, layers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Per layer, queries of the question's tokens and keys of the visual tokens, each (tokens, heads, head_dim)."""
        inputs = collate([sample.prompt], self.features.get(sample.paths)).to(self.device)
        visual, found = inputs.image_mask[0], {}

        def visit(layer: int, qk: LayerQK) -> None:
            # A copy: what is kept must not keep the queries of all tokens. The last token is an answer.
            q = qk.q[0, :, sample.text_start : -1].transpose(0, 1).clone()
            found[layer] = {"queries": q, "keys": qk.k[0].transpose(0, 1)[visual.to(qk.k.device)]}

        with LayerVisitor(self.model, layers, visit):
            hidden_states(self.model, inputs)
        return found


def token_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """How many queries and keys Reader.heads finds in samples."""
    return {
        "queries": sum(len(s.prompt.ids) - s.text_start - 1 for s in samples),
        "keys": sum(int(s.prompt.image_mask.sum()) for s in samples),
    }


def kinds_between(student: Geometry, teacher: Geometry, same_frequencies: bool) -> list[str]:
    """Which mixtures are defined: heads of one width can be mixed, and pairs of one frequency."""
    if student.head_dim != teacher.head_dim:
        return ["linear"]
    return list(KINDS) if same_frequencies and student.axes == teacher.axes else ["real", "linear"]


def measure(
    settings: Settings,
    name: str,
    student: str | Path,
    teacher: str | Path,
    coco_root: str | Path,
    questions: str | Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure one student against one teacher; returns the record that `laid alignability` writes.

    The first analysis.alignment_questions of the file are read: mixtures are fitted on every second one and measured on the
    others. Raises LaidError for fewer than two, and where the models do not see the same tokens.
    """
    order = settings.evaluation.order_seed
    entries = read_chats(questions, order)[: settings.analysis.alignment_questions]
    if len(entries) < 2:
        raise LaidError(
            f"{questions}: 1 question to read, at least 2 are needed: mixtures are fitted on one half of the questions and"
            " measured on the other (analysis.alignment_questions)"
        )
    readers = [Reader(settings, source, coco_root, device) for source in (teacher, student)]
    theirs, own = (build_samples(entries, r.features, ahead=False) for r in readers)
    lengths = [[len(s.prompt.ids) for s in samples] for samples in (own, theirs)]
    require_same_tokens(*lengths, str(questions))
    shapes = [reader.shape for reader in readers]
    same = readers[0].theta.shape == readers[1].theta.shape and bool(
        torch.allclose(readers[0].theta, readers[1].theta)
    )
    kinds = kinds_between(shapes[1], shapes[0], same)
    pairs = layer_pairs(settings, shapes[1].layers, shapes[0].layers)
    layers = [sorted({pair[k] for pair in pairs}) for k in (1, 0)]  # the teacher's, the student's
    places = [(pair, side) for pair in pairs for side in SIDES]
    moments, missed = {place: Moments() for place in places}, {place: [] for place in places}
    with Progress(len(entries), f"alignability {name}", unit="questions") as bar:
        for half in (0, 1):
            fits = {place: moments.pop(place).fit(kinds) for place in places} if half else {}
            for samples in zip(theirs[half::2], own[half::2], strict=True):
                x, y = (r.heads(s, on) for r, s, on in zip(readers, samples, layers, strict=True))
                for pair, side in places:
                    mine = y[pair[0]][side]
                    heads = x[pair[1]][side].to(mine.device), mine
                    if half:
                        sums = fits[pair, side].missed(*heads)
                        missed[pair, side].append({kind: found.cpu().numpy() for kind, found in sums.items()})
                    else:
                        moments[pair, side].add(*heads)
                bar.update(1)
    return {
        "format": FORMAT,
        "student": name,
        "layers": shapes[1].layers,
        "teacher_layers": shapes[0].layers,
        "questions": {"fitted": len(entries[0::2]), "held_out": len(entries[1::2])},
        "tokens": {"fitted": token_counts(own[0::2]), "held_out": token_counts(own[1::2])},
        "ridge": RIDGE,
        "pairs": [
            {
                "layer": pair[0], "teacher_layer": pair[1], "same_depth": same_depth,
                **{side: explained(missed[pair, side]) for side in SIDES},
            }
            for pair, same_depth in pairs.items()
        ],
        "provenance": provenance.collect(
            "alignability",
            settings,
            {"student": source_of(student), "teacher": source_of(teacher), "questions": Path(questions)},
            student=name,
        ),
    }  # fmt: skip
