"""What heads look at: the needle's share of attention over haystack size, and the spectrum of position differences.

Figure 4 of the paper shows a "normalised key activation" per head over haystack size and does not define it. Our reading:
the softmax share, which normalises the activations exp(q k) of all keys, that falls on the needle image's keys (its block of
tokens, delimiters included). Rows looked at are the last token of the anchor's name, of the target's name, and of the prompt
(where the answer is given); a head is taken at the row where it sees most of the needle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from laid import provenance
from laid.analysis import spectrum
from laid.analysis.attention_rows import attention_rows
from laid.data.questions import Question, haystack_file, read_questions
from laid.errors import LaidError
from laid.evaluation.evaluate import Asked, Evaluator
from laid.methods.registry import load_with_method
from laid.models.capture import LayerQK, QKCapture
from laid.models.decoder import geometry, text_model
from laid.models.forward import collate, hidden_states
from laid.models.loading import source_of
from laid.progress import Progress
from laid.settings import Settings

FORMAT = "laid-analysis/1"
ROWS = ("anchor", "target", "answer")
RESAMPLES = 1000


class LayerVisitor(QKCapture):
    """Hands each layer's queries and keys to `visit(layer, LayerQK)` as soon as the layer is done, and forgets them."""

    def __init__(self, model: torch.nn.Module, layers: Iterable[int], visit: Callable[[int, LayerQK], None]):
        super().__init__(model, layers)
        self.visit = visit

    def attach(self) -> Self:
        super().attach()
        for layer in self.layers:
            self._handles.append(
                self._text.layers[layer].self_attn.register_forward_hook(self._visit_hook(layer))
            )
        return self

    def _visit_hook(self, layer: int):
        def hook(*_):
            self.visit(layer, LayerQK(**self._caught.pop(layer)))

        return hook


def rows_of(asked: Asked, tokenizer) -> list[int]:
    """Token indices of ROWS in a prompt. Raises LaidError when the question's words are not found in its tokens."""
    ids = asked.prompt.ids.tolist()
    start = int(np.flatnonzero(asked.prompt.image_mask)[-1]) + 1
    found = []
    for name, last in ((asked.question.anchor, False), (asked.question.target, True)):
        words = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        places = [at for at in range(start, len(ids)) if ids[at : at + len(words)] == words]
        if not places:
            raise LaidError(
                f"question {asked.question.id}: the tokens of {name!r} are not found in its prompt"
            )
        found.append(places[-1 if last else 0] + len(words) - 1)
    return [*found, len(ids) - 1]


def block_of(asked: Asked, image: int) -> slice:
    """Tokens of an image, its delimiters included."""
    starts = asked.prompt.block_starts
    end = starts[image + 1] if image + 1 < len(starts) else np.flatnonzero(asked.prompt.image_mask)[-1] + 2
    return slice(int(starts[image]), int(end))


class Analysis:
    """Accumulates over questions what one model's heads do; one pass per batch, no tokens x tokens storage."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator
        self.model, self.tokenizer = evaluator.model, evaluator.processor.tokenizer
        self.geometry = geometry(self.model)
        self.theta = text_model(self.model).rotary_emb.inv_freq.double().cpu().numpy()

    @torch.inference_mode()
    def needles(self, asked: Sequence[Asked]) -> dict[str, Any]:
        """Means over questions of one size.

        share: (layers, heads, rows) of the needles' share of attention; images: the same for all images together;
        uniform: (rows,) the share if all visible tokens got alike; key_norm: (layers, kv_heads) length of keys at the
        needles' visual tokens over that at all visual tokens.
        """
        g = self.geometry
        totals = {
            "share": np.zeros((g.layers, g.heads, len(ROWS))),
            "images": np.zeros((g.layers, g.heads, len(ROWS))),
            "uniform": np.zeros(len(ROWS)),
            "key_norm": np.zeros((g.layers, g.kv_heads)),
        }
        for batch in self.evaluator._batches(asked):
            self._add_needles([asked[k] for k in batch], totals)
        return {key: total / len(asked) for key, total in totals.items()}

    def _add_needles(self, items: Sequence[Asked], totals: dict[str, np.ndarray]) -> None:
        inputs = self._inputs(items)
        rows = torch.tensor([rows_of(item, self.tokenizer) for item in items], device=inputs.ids.device)
        needle, image = torch.zeros(2, *inputs.ids.shape, device=inputs.ids.device)
        for at, item in enumerate(items):
            for which in item.needles:
                needle[at, block_of(item, which)] = 1
            first = int(item.prompt.block_starts[0])
            image[at, first : block_of(item, len(item.paths) - 1).stop] = 1
        pixels = inputs.image_mask.float()

        def visit(layer: int, qk: LayerQK) -> None:
            attention = attention_rows(*qk.rotated(), rows).exp()  # (batch, heads, rows, tokens)
            for key, mask in (("share", needle), ("images", image)):
                totals[key][layer] += torch.einsum("bhrn,bn->hr", attention, mask).double().cpu().numpy()
            length = qk.k.float().norm(dim=-1)  # (batch, kv_heads, tokens)
            means = [(length * m[:, None]).sum(-1) / m.sum(-1)[:, None] for m in (pixels * needle, pixels)]
            totals["key_norm"][layer] += (means[0] / means[1]).sum(0).double().cpu().numpy()

        with LayerVisitor(self.model, range(self.geometry.layers), visit):
            hidden_states(self.model, inputs)
        visible = rows.double() + 1
        totals["uniform"] += (needle.sum(-1, keepdim=True).double() / visible).sum(0).cpu().numpy()

    @torch.inference_mode()
    def coefficients(self, asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        """(questions, layers, heads, frequencies) complex coefficients of laid.analysis.spectrum, and (layers, heads)
        the correlation of the series with the scores as measured.

        Queries are all tokens of the text after the last image, keys the visual tokens.
        """
        g = self.geometry
        bins = max(item.prompt.span for item in asked)
        found = np.zeros((len(asked), g.layers, g.heads, g.head_dim // 2), dtype=complex)
        sums, counts = np.zeros((g.layers, g.heads, bins)), np.zeros(bins)
        for number, item in enumerate(asked):
            self._add_coefficients(item, found[number], sums, counts)
        curves = spectrum.series(found.mean(0), self.theta, np.arange(bins))
        agreement = [spectrum.agreement(curves[layer], sums[layer], counts) for layer in range(g.layers)]
        return found, np.array(agreement)

    def _add_coefficients(self, item: Asked, found: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
        inputs = self._inputs([item])
        mask = inputs.image_mask[0]
        start = block_of(item, len(item.paths) - 1).stop
        at_k, at_q = inputs.positions[0, 0, mask].cpu(), inputs.positions[0, 0, start:].cpu()

        def visit(layer: int, qk: LayerQK) -> None:
            found[layer] = spectrum.coefficients(qk.q[0, :, start:], qk.k[0][:, mask]).cpu().numpy()
            q, k = qk.rotated()
            here = spectrum.measured(q[0, :, start:].cpu(), k[0][:, mask].cpu(), at_q, at_k, len(counts))
            sums[layer] += here[0]
            if layer == 0:
                np.add(counts, here[1], out=counts)

        with LayerVisitor(self.model, range(self.geometry.layers), visit):
            hidden_states(self.model, inputs)

    def _inputs(self, items: Sequence[Asked]):
        features = [f for item in items for f in self.evaluator.features.get(item.paths)]
        return collate([item.prompt for item in items], features).to(self.evaluator.device)


def positions_per_image(asked: Sequence[Asked]) -> tuple[float, float]:
    """(positions of the text around the images, positions an image adds), means over prompts."""
    images = np.array([len(item.paths) for item in asked])
    first = np.array([item.prompt.positions[0, item.prompt.block_starts[0]] for item in asked])
    after = np.array([item.prompt.positions[0, block_of(item, len(item.paths) - 1).stop] for item in asked])
    span = np.array([item.prompt.span for item in asked])
    return float((span - (after - first)).mean()), float(((after - first) / images).mean())


def analyse(
    config: Settings,
    student: str,
    model: str | Path,
    runs: Mapping[str, str | Path | None],
    coco_root: str | Path,
    questions: str | Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Analyse one student under several methods; returns the record that `laid analyse` writes.

    runs: method -> its run folder, None for a method without training. questions: folder of the test files.
    Images are seen once for all methods whose vision tower is the same.
    """
    sizes = sorted(config.haystacks.test.sizes)
    settings = config.analysis
    files = {size: haystack_file(questions, size) for size in sizes}
    entries: dict[int, list[Question]] = {
        size: read_questions(file)[: settings.questions] for size, file in files.items()
    }
    middle = min(sizes, key=lambda size: (abs(size - settings.spectrum_size), size))
    methods: dict[str, Any] = {}
    inputs: dict[str, Any] = {
        "model": source_of(model),
        **{f"questions_{size}": file for size, file in files.items()},
    }
    shared: Evaluator | None = None
    with Progress(len(runs) * len(sizes), f"analyse {student}", unit="sizes") as bar:
        for method, run in runs.items():
            loaded = load_with_method(config, method, model, run, device)
            evaluator = Evaluator(loaded, coco_root, config.evaluation, f"{student} {method}")
            if shared is not None and same_vision(shared.model, loaded.model):
                evaluator.features = shared.features
            shared = shared or evaluator
            analysis = Analysis(evaluator)
            by_size = []
            for size in sizes:
                asked = evaluator.ask(entries[size])
                by_size.append(analysis.needles(asked))
                if size == middle:
                    text, per_image = positions_per_image(asked)
                    cut = text + per_image * config.haystacks.train.max_size
                    found, agreement = analysis.coefficients(asked)
                bar.update(1)
            methods[method] = {
                "needles": {key: [_rounded(one[key]) for one in by_size] for key in by_size[0]},
                "spectrum": _spectrum(found, agreement, analysis.theta, cut, middle),
            }
            if run is not None:
                inputs[f"run_{method}"] = Path(run) / "model"
    shape = geometry(loaded.model)
    return {
        "format": FORMAT,
        "student": student,
        "role": "teacher" if student == config.models.teacher else "student",
        "sizes": sizes,
        "questions": {str(size): len(entries[size]) for size in sizes},
        "rows": list(ROWS),
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "methods": methods,
        "provenance": provenance.collect("analyse", config, inputs, student=student),
    }


def _spectrum(
    found: np.ndarray, agreement: np.ndarray, theta: np.ndarray, cut: float, size: int
) -> dict[str, Any]:
    n, layers, heads, frequencies = found.shape
    mean = found.mean(0)
    shares = spectrum.low_share(mean, theta, cut)
    draws = spectrum.share_draws(found.reshape(n, layers * heads, frequencies), theta, cut, RESAMPLES)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "size": size,
        "wavelengths": _rounded(2 * np.pi / theta),
        "cut": round(cut, 3),
        "real": _rounded(mean.real),
        "imaginary": _rounded(mean.imag),
        "shares": _rounded(shares),
        "share": round(float(shares.mean()), 6),
        "interval": [round(float(low), 6), round(float(high), 6)],
        "draws": _rounded(draws),
        "agreement": [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in agreement],
    }


def same_vision(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same vision tower, weight for weight, so that one's features serve the other."""
    mine, theirs = one.model.visual.state_dict(), other.model.visual.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def _rounded(values: np.ndarray) -> Any:
    return np.vectorize(lambda v: float(f"{v:.6g}"), otypes=[float])(values).tolist()
