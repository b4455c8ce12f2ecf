"""The parts of equation 8 for one batch: a pass of the student, compared with labels and a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laid.distill.alignment import HeadAlignment
from laid.distill.gain import RopeGain
from laid.distill.joint_rows import joint_rows
from laid.distill.kl import forward_kl
from laid.distill.objective import Objective
from laid.distill.schedule import DistanceSchedule, LambdaSchedule, distance_to_answer
from laid.errors import LaidError
from laid.models.capture import LayerQK, QKCapture
from laid.models.decoder import geometry, layer_indices, rotate, text_model
from laid.models.forward import Batch, hidden_states, logits_at, with_features
from laid.training.parallel import Alone


class Teacher(Protocol):
    """What a teacher gives, from its cache or by a pass of its own (laid.training.online).

    heads, kv_heads, head_dim: of its attention. depth: its number of layers.
    """

    heads: int
    kv_heads: int
    head_dim: int
    depth: int

    def logits(self, indices: Sequence[int]) -> Tensor:
        """(B, 2, vocabulary) logits at the answer and after it."""

    def queries_keys(self, layer: int, indices: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Before rotation: (B, heads, tokens, head_dim) and (B, kv_heads, tokens, head_dim), padded right, of any format."""


def objective_of(settings: Mapping[str, Any]) -> Objective:
    """Equation 8's lambdas from a method's settings."""
    return Objective(
        laid=LambdaSchedule(settings["lambda_laid"], settings["alignment"]["anneal"]),
        kl=LambdaSchedule(settings["lambda_kl"]),
        sft=LambdaSchedule(settings["lambda_sft"]),
        rows=LambdaSchedule(settings["lambda_rows"], settings["alignment"]["anneal"]),
    )


class Losses(nn.Module):
    """A student under one trained method: its gain, what is learned of the teacher's heads, and the losses.

    model: the student, adapters in place; gain hooks are attached to it. settings: the method's section of
    the configuration. teacher: needed where a teacher's part has weight. parallel: the other processes, if any.
    autocast: the number format of the student's pass, None for that of its weights; losses are computed in float32
    either way. Raises LaidError where layers or heads do not fit.

    A module, so that whatever shards a model sees the whole pass as one forward of one root.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, Any],
        teacher: Teacher | None = None,
        parallel: Alone | None = None,
    ):
        super().__init__()
        self.model, self.settings, self.teacher = model, settings, teacher
        self.parallel, self.autocast = parallel or Alone(), None
        self.objective = objective_of(settings)
        self.distance = DistanceSchedule(settings["distance"]["strength"])
        self.pairs: list[tuple[int, int]] = []
        self.alignments = nn.ModuleDict()
        self.gain: RopeGain | None = None
        self.to_fit = False
        device = next(model.parameters()).device
        gain = settings["gain"]
        if gain is not None:
            self.gain = RopeGain(model, gain["length_aware"], gain["reference"], gain["exponent"])
            if self.gain.geometry.query_norm and gain["length_aware"]:
                raise LaidError(
                    "gain.length_aware: such a gain cannot fold into this student, whose heads share one norm of their"
                    " queries: set it to false"
                )
            self.gain.to(device).attach(model)
        if self.objective.needs("laid") or self.objective.needs("rows"):
            self._pair_layers()
            self.alignments.to(device)

    def _pair_layers(self) -> None:
        a, g, t = self.settings["alignment"], geometry(self.model), self.teacher
        if self.objective.needs("laid") and getattr(t, "queries", "all") != "all":
            raise LaidError(
                "lambda_laid has weight, but the teacher's cache keeps the queries of question tokens alone: set"
                " teacher_cache.queries to all and make it again"
            )
        turned = (a["rotation"] == "after" and self.objective.needs("laid")) or self.objective.needs("rows")
        if turned and g.head_dim != t.head_dim:
            raise LaidError(
                f"alignment.rotation: after and lambda_rows turn the teacher's heads by the student's RoPE, but head_dim is"
                f" {g.head_dim} in the student and {t.head_dim} in the teacher: compare before rotation, with"
                " alignment.projection: true"
            )
        for student_layer, teacher_layer in a["pairs"]:
            pair = (layer_indices(student_layer, g.layers)[0], layer_indices(teacher_layer, t.depth)[0])
            self.pairs.append(pair)
            key = f"{pair[0]}-{pair[1]}"
            self.alignments[key] = HeadAlignment(
                g.heads, g.kv_heads, t.heads, t.kv_heads, g.head_dim, t.head_dim, a["key_weights"], a["projection"],
            )  # fmt: skip
        self.to_fit = a["init"] == "fit" and self.objective.needs("laid")

    def learned(self) -> dict[str, nn.Module]:
        """What is learned beside the student: {"alignments"} and "gain" where there is one."""
        found: dict[str, nn.Module] = {"alignments": self.alignments}
        return found | ({"gain": self.gain} if self.gain is not None else {})

    def total(self, parts: Mapping[str, Tensor], progress: float) -> Tensor:
        """L_total of equation 8."""
        return self.objective.total(parts, progress)

    def forward(
        self,
        inputs: Batch,
        labels: Tensor | None,
        indices: Sequence[int],
        progress: float,
        plain: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The parts that ever have weight, scalars: {"sft", "kl", "laid", "rows"}.

        inputs: B samples whose last two tokens predict the answer and the end of the turn. labels: (B, 2)
        token ids; None where "sft" has no weight. indices: what the teacher knows the samples by. progress:
        in [0, 1]. plain: (3, B, T) positions before gaps were opened (None: inputs.positions).
        """
        logits, caught = self._pass(inputs)
        parts: dict[str, Tensor] = {}
        if self.objective.needs("sft"):
            if labels is None:
                raise LaidError("lambda_sft has weight, but these samples have no labels")
            parts["sft"] = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        if self.objective.needs("kl"):
            parts["kl"] = forward_kl(
                logits, self.teacher.logits(indices).to(logits.device), self.settings["temperature"]
            )
        if self.pairs:
            parts |= self._teacher_parts(inputs, caught, indices, progress, plain)
        if self.parallel.sharded and not parts.keys() & {"sft", "kl"}:
            # Sharded weights are gathered for backward where a layer's output has a gradient: let every layer's have one.
            parts = {name: part + 0.0 * logits.float().sum() for name, part in parts.items()}
        return parts

    def _pass(self, inputs: Batch) -> tuple[Tensor, dict[int, LayerQK]]:
        """(B, 2, vocabulary) logits at the answer and after it; queries and keys of the aligned layers."""
        layers = sorted({s for s, _ in self.pairs})
        caught: dict[int, LayerQK] = {}
        with torch.autocast(inputs.ids.device.type, self.autocast) if self.autocast else nullcontext():
            inputs = with_features(self.model, inputs)
            if layers:
                with QKCapture(self.model, layers) as capture:
                    hidden = hidden_states(self.model, inputs)
                    caught = capture.take()
            else:
                hidden = hidden_states(self.model, inputs)
            rows = torch.arange(len(inputs.ids), device=hidden.device).repeat_interleave(2)
            columns = torch.stack([inputs.lengths - 2, inputs.lengths - 1], 1).flatten()
            return logits_at(self.model, hidden, rows, columns).view(len(inputs.ids), 2, -1), caught

    def _teacher_parts(
        self,
        inputs: Batch,
        caught: Mapping[int, LayerQK],
        indices: Sequence[int],
        progress: float,
        plain: Tensor | None,
    ) -> dict[str, Tensor]:
        """L_LAid (eq. 7), and the matching of attention rows, summed over layer pairs."""
        a, mask = self.settings["alignment"], inputs.token_mask
        answer = inputs.lengths - 2
        far = self.settings["gaps"]["reach"] or None
        weights = self.distance.weights(distance_to_answer(inputs.positions, answer), progress, mask, far)
        parts: dict[str, Tensor] = {}
        for s, t in self.pairs:
            own, key = caught[s], f"{s}-{t}"
            q_t, k_t = (
                x.to(own.q.device) for x in self.teacher.queries_keys(t, indices, inputs.ids.shape[1])
            )
            if self.objective.needs("laid"):
                if a["rotation"] == "after":
                    compared = (*own.rotated(), *(rotate(x, own.cos, own.sin) for x in (q_t, k_t)))
                else:
                    compared = (own.q, own.k, q_t, k_t)
                if self.to_fit:
                    with self.parallel.set_by_main(self.alignments[key].parameters()):
                        self.alignments[key].fit_(*(x.detach() for x in compared), mask)
                loss = self.alignments[key](*compared, mask, weights, a["norm"], a["normalize"])
                parts["laid"] = parts.get("laid", 0.0) + loss
            if self.objective.needs("rows"):
                positions = inputs.positions if plain is None else plain.to(inputs.ids.device)
                loss = self._joint_rows(own, q_t, k_t, inputs, positions, progress)
                parts["rows"] = parts.get("rows", 0.0) + loss
        self.to_fit = False
        return parts

    def _joint_rows(
        self, own: LayerQK, q_t: Tensor, k_t: Tensor, inputs: Batch, plain: Tensor, progress: float
    ) -> Tensor:
        """Rows of the questions over the images of the batch (laid.distill.joint_rows)."""
        far = self.settings["gaps"]["reach"] or None
        return joint_rows(
            (own.q, own.k),
            (q_t, k_t),
            inputs.positions,
            plain,
            inputs.image_mask,
            inputs.token_mask,
            inputs.lengths - 2,
            text_model(self.model).rotary_emb,
            lambda distance: self.distance.weights(distance, progress, None, far),
        )
