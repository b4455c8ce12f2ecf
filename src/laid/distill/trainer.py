"""Post-training of a student: SFT, KD, LAid and its ablations are one recipe with other weights in eq. 8."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laid import provenance
from laid.config import slice_for
from laid.data.questions import read_questions
from laid.distill.alignment import HeadAlignment
from laid.distill.attention_rows import RowMatching, attention_rows
from laid.distill.capture import LayerQK, QKCapture
from laid.distill.checkpoint import Checkpoint
from laid.distill.gaps import open_gaps
from laid.distill.kl import forward_kl, generalised_jsd
from laid.distill.objective import Objective
from laid.distill.samples import Sample, batches_of, build_samples
from laid.distill.schedule import (
    DistanceSchedule,
    LambdaSchedule,
    distance_to_answer,
    learning_rate_factor,
    reach,
)
from laid.distill.teacher_cache import TeacherCache
from laid.errors import LaidError
from laid.io import atomic_path, safe_join, sha256_json, write_json
from laid.methods import length_gain
from laid.methods.decoder import geometry, layer_indices, rotate, text_model
from laid.methods.gain import RopeGain
from laid.models.features import ImageFeatures
from laid.models.forward import Batch, collate, hidden_states, logits_at
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.progress import Progress


class Trainer:
    """One run: a student, a method, a seed.

    config: the validated configuration. student: checkpoint folder or hub id. cache: the teacher's folder, needed as
    soon as a teacher's loss has weight. out: where model/, log.jsonl and run.json appear, all at once, at the end.
    Raises LaidError for a method that is not trained, a missing cache, or layers that do not fit.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        method: str,
        seed: int,
        name: str,
        student: str | Path,
        cache: str | Path | None,
        coco_root: str | Path,
        questions: str | Path,
        out: str | Path,
        device: str = "cpu",
    ):
        self.start = time.perf_counter()
        if "lambda_sft" not in config["methods"].get(method, {}):
            trained = [m for m, v in config["methods"].items() if "lambda_sft" in v]
            raise LaidError(f"{method!r} is not a trained method; trained methods: {', '.join(trained)}")
        self.config, self.method, self.seed, self.name = config, method, seed, name
        self.method_settings, self.settings = config["methods"][method], config["training"]
        self.out, self.device = Path(out), device
        self.inputs: dict[str, Any] = {"questions": questions, "student": student}
        torch.manual_seed(seed)
        self._setup_student(student)
        self._setup_objective()
        self._setup_teacher(cache, questions)
        self._setup_data(coco_root, questions)
        self._setup_optimizer()
        self.log: list[dict[str, Any]] = []
        self.interrupted = False

    # ---------------------------------------------------------------- set-up

    def _setup_student(self, student: str | Path) -> None:
        s = self.settings
        attention = self.config["evaluation"]["attention"]
        self.model = load_model(student, getattr(torch, s["dtype"]), attention, self.device)
        self.processor = Processor.load(student)
        self.geometry = geometry(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        lora = self.method_settings["lora"]
        if lora is not None:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(
                self.model,
                LoraConfig(
                    r=lora["rank"],
                    lora_alpha=lora["alpha"],
                    lora_dropout=lora["dropout"],
                    # the language model's layers only: the vision tower has projections of the same names
                    target_modules=rf".*language_model\.layers\.\d+\..*\.({'|'.join(lora['targets'])})",
                ),
            )
        else:
            for part in (text_model(self.model), self.model.get_output_embeddings()):
                part.requires_grad_(True)
        if s["train_vision"]:
            raise LaidError(
                "training.train_vision: true needs features that are computed anew in every step; set it to false"
            )
        if s["gradient_checkpointing"]:
            text_model(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        gain = self.method_settings["gain"]
        self.gain = None
        if gain is not None:
            self.gain = RopeGain(
                self.model,
                gain["layers"],
                gain["granularity"],
                gain["length_aware"],
                gain["reference"],
                gain["exponent"],
            ).to(self.device)
            self.gain.attach(self.model)

    def _setup_objective(self) -> None:
        m = self.method_settings
        anneal = m["alignment"]["anneal"]
        self.objective = Objective(
            laid=LambdaSchedule(m["lambda_laid"], anneal),
            kl=LambdaSchedule(m["lambda_kl"]),
            sft=LambdaSchedule(m["lambda_sft"]),
            rows=LambdaSchedule(m["lambda_rows"]),
        )
        if not any(self.objective.needs(part) for part in ("laid", "kl", "sft", "rows")):
            raise LaidError(f"methods.{self.method}: every lambda is 0, there is nothing to train")
        self.labelled = m["questions"] == "train"
        if not self.labelled and self.objective.needs("sft"):
            raise LaidError(
                f"methods.{self.method}: lambda_sft is {m['lambda_sft']:g}, but questions: long are used without their"
                " labels; set it to 0"
            )
        self.distance = DistanceSchedule(**m["distance"])

    def _setup_teacher(self, cache: str | Path | None, questions: str | Path) -> None:
        self.cache: TeacherCache | None = None
        self.pairs: list[tuple[int, int]] = []
        self.alignments, self.rows = nn.ModuleDict(), nn.ModuleDict()
        needs = [part for part in ("laid", "kl", "rows") if self.objective.needs(part)]
        if not needs:
            return
        if cache is None:
            raise LaidError(
                f"method {self.method} learns from the teacher ({', '.join(needs)}): give --teacher-cache"
            )
        self.cache = TeacherCache(cache, questions)
        if self.cache.index.get("labelled", True) != self.labelled:
            made, wanted = ("without", "with") if self.labelled else ("with", "without")
            raise LaidError(
                f"{self.cache.folder}: was made {made} labels, method {self.method} learns {wanted} them:"
                f" make the cache {'without' if self.labelled else 'with'} --without-labels"
            )
        self.inputs["teacher_cache"] = Path(cache) / "index.json"
        if not self.objective.needs("laid") and not self.objective.needs("rows"):
            return
        a, g, c = self.method_settings["alignment"], self.geometry, self.cache
        depth = self.cache.index["model_layers"]
        for student_layer, teacher_layer in a["pairs"]:
            pair = (layer_indices(student_layer, g.layers)[0], layer_indices(teacher_layer, depth)[0])
            self.pairs.append(pair)
            key = f"{pair[0]}-{pair[1]}"
            self.alignments[key] = HeadAlignment(
                g.heads, g.kv_heads, c.heads, c.kv_heads, g.head_dim, c.head_dim, a["key_weights"], a["projection"],
                "uniform" if a["init"] == "fit" else a["init"],
            )  # fmt: skip
            if self.objective.needs("rows"):
                self.rows[key] = RowMatching(g.heads, c.heads)
        self.alignments.to(self.device)
        self.rows.to(self.device)
        self.to_fit = a["init"] == "fit" and self.objective.needs("laid")

    def _setup_data(self, coco_root: str | Path, questions: str | Path) -> None:
        evaluation = self.config["evaluation"]
        self.features = ImageFeatures(
            self.model,
            self.processor,
            lambda path: safe_join(coco_root, path),
            limit_bytes=int(evaluation["feature_cache_gb"] * 2**30),
        )
        self.samples = build_samples(
            read_questions(questions), self.features, evaluation["order_seed"], self.labelled
        )
        if self.cache is not None:
            mine, theirs = [len(s.prompt.ids) for s in self.samples], self.cache.index["lengths"]
            if mine != theirs:
                at = next(
                    (k for k, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs))
                )
                raise LaidError(
                    f"{self.cache.folder}: teacher and student do not see the same tokens: question {at} has"
                    f" {theirs[at : at + 1]} tokens for the teacher and {mine[at : at + 1]} for the student:"
                    " both need one tokenizer and one image size"
                )
        batch, s = self.settings["batch_size"], self.settings
        per_epoch = len(self.samples) // batch
        if per_epoch == 0:
            raise LaidError(
                f"{questions}: {len(self.samples)} questions do not fill one batch of {batch} (training.batch_size)"
            )
        epochs = self.method_settings["epochs"] or s["epochs"]
        self.per_epoch, self.steps = per_epoch, max(1, round(epochs * per_epoch))

    def _setup_optimizer(self) -> None:
        s, m = self.settings, self.method_settings
        groups = [
            ("lr", [p for p in self.model.parameters() if p.requires_grad], m["lr"] or s["lr"]),
            ("lr_weights", [*self.alignments.parameters(), *self.rows.parameters()], s["lr_weights"]),
            ("lr_gain", list(self.gain.parameters()) if self.gain is not None else [], s["lr_gain"]),
        ]
        groups = [(name, parameters, rate) for name, parameters, rate in groups if parameters]
        self.trained = [p for _, parameters, _ in groups for p in parameters]
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for _, parameters, rate in groups],
            betas=(0.9, 0.999), weight_decay=s["weight_decay"], fused=True,
        )  # fmt: skip
        self.peaks = [rate for _, _, rate in groups]

    # ---------------------------------------------------------------- one step

    def _batch(self, indices: list[int], step: int) -> tuple[Batch, Tensor | None]:
        """Inputs of these samples, with gaps opened as far as `step` allows, and labels (B, 2), if they have any."""
        samples = [self.samples[k] for k in indices]
        features = [f for s in samples for f in self.features.get(s.paths)]
        inputs = collate([s.prompt for s in samples], features)
        gaps = self.method_settings["gaps"]
        if gaps["reach"]:
            for row, sample in enumerate(samples):
                length = len(sample.prompt.ids)
                rng = np.random.default_rng([self.seed, 3, step, sample.index])
                inputs.positions[:, row, :length] = self._stretched(sample, step, rng)
        labels = torch.from_numpy(np.stack([s.labels for s in samples])) if self.labelled else None
        return inputs.to(self.device), labels.to(self.device) if labels is not None else None

    def _stretched(self, sample: Sample, step: int, rng: np.random.Generator) -> Tensor:
        gaps = self.method_settings["gaps"]
        positions = torch.from_numpy(sample.prompt.positions)
        if rng.random() >= gaps["share"]:
            return positions
        span = sample.prompt.span
        far = reach(step / self.steps, span, max(span, gaps["reach"]), gaps["start"], gaps["end"])
        return open_gaps(positions, sample.prompt.block_starts.tolist(), sample.text_start, far, rng)

    def _loss_step(self, indices: list[int], step: int) -> dict[str, Tensor]:
        """The parts of eq. 8 for one batch: {"sft": ..., "kl": ..., "laid": ..., "rows": ...}, those with weight."""
        inputs, labels = self._batch(indices, step)
        layers = sorted({s for s, _ in self.pairs})
        if layers:
            with QKCapture(self.model, layers) as capture:
                hidden = hidden_states(self.model, inputs)
                caught = capture.take()
        else:
            hidden, caught = hidden_states(self.model, inputs), {}
        rows = torch.arange(len(indices), device=hidden.device).repeat_interleave(2)
        columns = torch.stack([inputs.lengths - 2, inputs.lengths - 1], 1).flatten()
        logits = logits_at(self.model, hidden, rows, columns).view(len(indices), 2, -1)
        parts: dict[str, Tensor] = {}
        if self.objective.needs("sft"):
            parts["sft"] = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        if self.objective.needs("kl"):
            parts["kl"] = self._divergence(logits, self.cache.logits(indices).to(logits.device))
        if self.pairs:
            parts |= self._teacher_parts(inputs, caught, indices, step)
        return parts

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        m = self.method_settings
        if m["divergence"] == "jsd":
            return generalised_jsd(student, teacher, m["jsd_beta"], m["temperature"])
        return forward_kl(student, teacher, m["temperature"])

    def _teacher_parts(
        self, inputs: Batch, caught: Mapping[int, LayerQK], indices: list[int], step: int
    ) -> dict[str, Tensor]:
        """L_LAid (eq. 7), summed over layer pairs, and the matching of attention rows at the answer position."""
        a, mask, progress = self.method_settings["alignment"], inputs.token_mask, step / self.steps
        answer = inputs.lengths - 2
        distance = distance_to_answer(inputs.positions, answer)
        far = self.method_settings["gaps"]["reach"] or None
        weights = self.distance.weights(distance, progress, mask, far)
        parts: dict[str, Tensor] = {}
        for s, t in self.pairs:
            own = caught[s]
            q_t, k_t = (x.to(own.q) for x in self.cache.queries_keys(t, indices, inputs.ids.shape[1]))
            alignment = self.alignments[f"{s}-{t}"]
            if self.objective.needs("laid"):
                if a["rotation"] == "after":
                    theirs = tuple(rotate(x, own.cos, own.sin) for x in (q_t, k_t))
                    loss = self._align(alignment, *own.rotated(), *theirs, mask, weights)
                else:
                    loss = self._align(alignment, own.q, own.k, q_t, k_t, mask, weights)
                parts["laid"] = parts.get("laid", 0.0) + loss
            if self.objective.needs("rows"):
                at = answer[:, None]
                student = attention_rows(*own.rotated(), at, mask)
                with torch.no_grad():
                    # The teacher's rows are those of its own, unstretched positions.
                    plain = self._plain_rotation(inputs, indices, own)
                    teacher = attention_rows(rotate(q_t, *plain), rotate(k_t, *plain), at, mask)
                loss = self.rows[f"{s}-{t}"](student, teacher, weights)
                parts["rows"] = parts.get("rows", 0.0) + loss
        return parts

    def _align(self, alignment: HeadAlignment, q_s, k_s, q_t, k_t, mask, weights) -> Tensor:
        a = self.method_settings["alignment"]
        if self.to_fit:
            alignment.fit_(q_s.detach(), k_s.detach(), q_t, k_t, mask)
        return alignment(q_s, k_s, q_t, k_t, mask, weights, a["norm"], a["normalize"])

    def _plain_rotation(self, inputs: Batch, indices: list[int], own: LayerQK) -> tuple[Tensor, Tensor]:
        positions = collate([self.samples[k].prompt for k in indices], []).positions.to(inputs.ids.device)
        return text_model(self.model).rotary_emb(own.q, positions)

    # ---------------------------------------------------------------- training

    def train(self) -> dict[str, Any]:
        """Run (or go on with) the training, write the run folder and return its record."""
        s = self.settings
        key = sha256_json(
            {
                "settings": slice_for(
                    "train", dict(self.config), method=self.method, student=self.name, seed=self.seed
                ),
                "inputs": {
                    k: provenance.fingerprint(Path(v)) for k, v in self.inputs.items() if Path(v).exists()
                },
                "seed": self.seed,
            }
        )
        checkpoint = Checkpoint(
            self.out.parent / f".{self.out.name}.checkpoint", key, s["checkpoint_minutes"]
        )
        done = self._resume(checkpoint)
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "interrupted", True))
        label = f"{self.name} {self.method} seed {self.seed}"
        self.model.train()
        order: list[list[int]] = []
        try:
            with Progress(self.steps, label, unit="steps") as bar:
                bar.update(done)
                for step in range(done, self.steps):
                    epoch, at = divmod(step, self.per_epoch)
                    if at == 0 or not order:
                        order = batches_of(
                            [len(x.prompt.ids) for x in self.samples], s["batch_size"], [self.seed, 4, epoch]
                        )
                    line = self._step(order[at], step)
                    if (step + 1) % s["log_every"] == 0 or step == self.steps - 1:
                        self.log.append(line)
                        bar.update(0, **{k: v for k, v in line.items() if k.startswith("loss")})
                    bar.update(1)
                    if step + 1 < self.steps and (checkpoint.due() or self.interrupted):
                        self._save_checkpoint(checkpoint, step + 1)
                    if self.interrupted:
                        raise SystemExit(143)
        finally:
            signal.signal(signal.SIGTERM, before)
        record = self._save()
        checkpoint.remove()
        return record

    def _step(self, indices: list[int], step: int) -> dict[str, Any]:
        """One optimiser step over `indices`, in pieces of per_device_batch; returns a line for the log."""
        s = self.settings
        progress = step / self.steps
        factor = learning_rate_factor(step, self.steps, s["warmup"], s["schedule"])
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        torch.manual_seed(
            self.seed * 1_000_003 + step
        )  # dropout follows from the step alone, so that resuming is exact
        pieces = [
            indices[k : k + s["per_device_batch"]] for k in range(0, len(indices), s["per_device_batch"])
        ]
        sums: dict[str, float] = {}
        for piece in pieces:
            parts = self._loss_step(piece, step)
            self.to_fit = False
            total = self.objective.total(parts, progress)
            if not bool(torch.isfinite(total)):
                raise LaidError(
                    f"{self.name} {self.method}: the loss is {float(total)} at step {step + 1} of {self.steps};"
                    f" lower the learning rate ({self.peaks[0]:g})"
                )
            share = len(piece) / len(indices)
            (total * share).backward()
            for part, value in (*parts.items(), ("", total)):
                key = f"loss_{part}" if part else "loss"
                sums[key] = sums.get(key, 0.0) + share * float(value.detach())
        norm = nn.utils.clip_grad_norm_(self.trained, s["max_grad_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        line = {
            "step": step + 1,
            **{k: round(v, 6) for k, v in sums.items()},
            "grad_norm": round(float(norm), 6),
        }
        line |= {"lr": self.peaks[0] * factor, "distance_emphasis": self.distance.emphasis(progress)}
        for part in ("laid", "kl", "sft", "rows"):
            if self.objective.needs(part):
                line[f"lambda_{part}"] = getattr(self.objective, part)(progress)
        if self.gain is not None:
            gains = self.gain.gains().detach()
            line |= {
                "gain_min": float(gains.min()),
                "gain_mean": float(gains.mean()),
                "gain_max": float(gains.max()),
            }
            if self.gain.length_aware:
                line["exponent_mean"] = float(self.gain.exponent.detach().mean())
        return line

    # ---------------------------------------------------------------- saving

    def _modules(self) -> dict[str, nn.Module]:
        found = {"model": self.model, "alignments": self.alignments, "rows": self.rows}
        return found | ({"gain": self.gain} if self.gain is not None else {})

    def _save_checkpoint(self, checkpoint: Checkpoint, step: int) -> None:
        trained = {id(p) for p in self.trained}
        tensors = {
            f"{name}/{key}": parameter.detach()
            for name, module in self._modules().items()
            for key, parameter in module.named_parameters()
            if id(parameter) in trained
        }
        checkpoint.save(step, tensors, self.optimizer, self.log)

    def _resume(self, checkpoint: Checkpoint) -> int:
        """Steps already done: 0, or where the checkpoint stands; weights, optimiser and log are then restored."""
        found = checkpoint.load(self.optimizer)
        if found is None:
            return 0
        step, tensors, self.log = found
        with torch.no_grad():
            for name, module in self._modules().items():
                for key, parameter in module.named_parameters():
                    if f"{name}/{key}" in tensors:
                        parameter.copy_(tensors[f"{name}/{key}"])
        self.to_fit = False
        print(
            f"{self.name} {self.method} seed {self.seed}: goes on after step {step} of {self.steps}",
            flush=True,
        )
        return step

    def _save(self) -> dict[str, Any]:
        """Export the student and write the run folder."""
        self.model.eval()
        record = {
            "student": self.name,
            "method": self.method,
            "seed": self.seed,
            "steps": self.steps,
            "final": self.log[-1],
            "provenance": provenance.collect(
                "train", self.config, {k: v if Path(v).exists() else f"hub:{v}" for k, v in self.inputs.items()},
                student=self.name, method=self.method, seed=self.seed,
            ),
        }  # fmt: skip
        weights = {
            f"{kind}.{pair}.{key}": parameter.detach().cpu().tolist()
            for kind, modules in (("alignment", self.alignments), ("rows", self.rows))
            for pair, module in modules.items()
            for key, parameter in module.named_parameters()
        }
        if self.gain is not None:
            weights |= {f"gain.{key}": p.detach().cpu().tolist() for key, p in self.gain.named_parameters()}
        with atomic_path(self.out) as folder:
            folder.mkdir()
            self._export(folder / "model")
            (folder / "log.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in self.log), encoding="utf-8"
            )
            write_json(folder / "learned.json", weights, indent=None)
            write_json(folder / "run.json", record)
        write_json(self.out.parent / f"{self.out.name}.cost.json", provenance.cost(self.start))
        return record

    def _export(self, folder: Path) -> None:
        """A PEFT adapter where nothing but LoRA was trained, else a plain checkpoint with gain and adapter folded in."""
        model = self.model
        if self.method_settings["lora"] is not None:
            if self.gain is None:
                model.save_pretrained(str(folder), safe_serialization=True)
                return
            self.gain.detach()
            model = model.merge_and_unload()
        if self.gain is not None:
            self.gain.detach()
            length_gain.export_(model, self.gain)
        model.save_pretrained(str(folder))
        self.processor.save(folder)
