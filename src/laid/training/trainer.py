"""Post-training of a student: SFT, KD, LAid and its ablations are one recipe with other weights in eq. 8."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laid import provenance
from laid.data.questions import read_questions
from laid.distill.gaps import open_gaps
from laid.distill.objective import PARTS
from laid.distill.schedule import learning_rate_factor, reach
from laid.errors import LaidError
from laid.io import atomic_path, read_json, safe_join, sha256_json, write_json
from laid.models.features import ImageFeatures
from laid.models.forward import Batch, collate
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.progress import Progress
from laid.settings import TrainedMethod, slice_for
from laid.training.checkpoint import Checkpoint
from laid.training.losses import Losses, objective_of
from laid.training.online import OnlineTeacher
from laid.training.parallel import Alone
from laid.training.samples import Sample, batches_of, build_samples
from laid.training.student import make_trainable
from laid.training.teacher_cache import TeacherCache

LEARNED = {"alignments": "alignment", "gain": "gain"}  # module -> prefix in learned.json


class Trainer:
    """One run: a student, a method, a seed.

    config: the validated configuration. student: checkpoint folder or hub id. cache: the teacher's folder,
    needed as soon as a teacher's loss has weight, unless `teacher` is given: a checkpoint that answers as training goes,
    on `teacher_device` (None: the student's). out: where model/, log.jsonl and run.json appear, all at
    once, at the end. parallel: this process among those of the run (laid.training.parallel), instead of device.
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
        features_folder: str | Path | None = None,
        parallel: Alone | None = None,
        teacher: str | Path | None = None,
        teacher_device: str | None = None,
    ):
        self.start = time.perf_counter()
        if "lambda_sft" not in config["methods"].get(method, {}):
            trained = [m for m, v in config["methods"].items() if isinstance(v, TrainedMethod)]
            raise LaidError(f"{method!r} is not a trained method; trained methods: {', '.join(trained)}")
        self.config, self.method, self.seed, self.name = config, method, seed, name
        self.method_settings, self.settings = config["methods"][method], config["training"]
        self.out = Path(out)
        self.parallel = parallel or Alone(device, getattr(torch, self.settings["dtype"]))
        self.device = self.parallel.device
        self.inputs: dict[str, Any] = {"questions": questions, "student": student}
        torch.manual_seed(seed)
        self.model = self._load_student(self.parallel.load_device)
        self.processor = Processor.load(student)
        self.cache: TeacherCache | None = None
        self.online: OnlineTeacher | None = None
        self._setup_teacher(cache, questions, teacher, teacher_device or self.device)
        self.losses = Losses(self.model, self.method_settings, self.cache or self.online, self.parallel)
        self.forward, self.optimizer = self.parallel.prepare(self.losses, self._make_optimizer)
        self._setup_data(coco_root, questions, features_folder)
        self._check_tokens(coco_root, questions, features_folder)
        self.log: list[dict[str, Any]] = []
        self.interrupted = False

    # ---------------------------------------------------------------- set-up

    def _load_student(self, device: str) -> nn.Module:
        """The student as it starts: its adapter in place, what is trained marked and in float32."""
        attention = self.config["evaluation"]["attention"]
        model = load_model(self.inputs["student"], self.parallel.dtype, attention, device)
        return make_trainable(model, self.method_settings["lora"], self.settings)

    def _setup_teacher(
        self, cache: str | Path | None, questions: str | Path, teacher: str | Path | None, device: str
    ) -> None:
        m = self.method_settings
        self.objective, self.labelled = objective_of(m), m["questions"] == "train"
        if not any(self.objective.needs(part) for part in PARTS):
            raise LaidError(f"methods.{self.method}: every lambda is 0, there is nothing to train")
        if not self.labelled and self.objective.needs("sft"):
            raise LaidError(
                f"methods.{self.method}: lambda_sft is {m['lambda_sft']:g}, but questions: long are used without"
                " their labels; set it to 0"
            )
        needs = [part for part in PARTS if part != "sft" and self.objective.needs(part)]
        if not needs:
            return
        if teacher is not None:
            if cache is not None:
                raise LaidError(
                    "--teacher and --teacher-cache: two sources of one teacher's answers; give one"
                )
            model = load_model(
                teacher, self.parallel.dtype, self.config["evaluation"]["attention"], device
            ).requires_grad_(False)
            aligned = self.objective.needs("laid") or self.objective.needs("rows")
            layers = sorted({t for _, t in m["alignment"]["pairs"]}) if aligned else []
            self.online = OnlineTeacher(model, layers, self._teacher_batch)
            self.inputs["teacher"] = teacher
            return
        if cache is None:
            raise LaidError(
                f"method {self.method} learns from the teacher ({', '.join(needs)}): give --teacher-cache, or --teacher"
            )
        self.cache = TeacherCache(cache, questions)
        if self.cache.labelled != self.labelled:
            made, wanted = ("without", "with") if self.labelled else ("with", "without")
            raise LaidError(
                f"{self.cache.folder}: was made {made} labels, method {self.method} learns {wanted} them:"
                f" make the cache {'without' if self.labelled else 'with'} --without-labels"
            )
        self.inputs["teacher_cache"] = Path(cache) / "index.json"

    def _setup_data(
        self, coco_root: str | Path, questions: str | Path, features_folder: str | Path | None
    ) -> None:
        evaluation = self.config["evaluation"]
        self.images_in_step = self.settings["train_vision"]
        self.features = ImageFeatures(
            self.model,
            self.processor,
            lambda path: safe_join(coco_root, path),
            limit_bytes=int(evaluation["feature_cache_gb"] * 2**30),
            store=None if self.images_in_step else features_folder,
        )
        # Of several processes none needs the images of all samples.
        ahead = self.parallel.world == 1 and not self.images_in_step
        self.samples = build_samples(
            read_questions(questions), self.features, evaluation["order_seed"], self.labelled, ahead
        )
        batch, s = self.settings["batch_size"], self.settings
        per_epoch = len(self.samples) // batch
        if per_epoch == 0:
            raise LaidError(
                f"{questions}: {len(self.samples)} questions do not fill one batch of {batch}"
                " (training.batch_size)"
            )
        epochs = self.method_settings["epochs"] or s["epochs"]
        self.per_epoch, self.steps = per_epoch, max(1, round(epochs * per_epoch))

    def _check_tokens(
        self, coco_root: str | Path, questions: str | Path, features_folder: str | Path | None
    ) -> None:
        """Teacher and student must see the same tokens; of an online teacher, its samples are made for that."""
        if self.cache is not None:
            theirs, whose = self.cache.index["lengths"], str(self.cache.folder)
        elif self.online is not None:
            evaluation, teacher = self.config["evaluation"], self.inputs["teacher"]
            self.teacher_features = ImageFeatures(
                self.online.model,
                Processor.load(teacher),
                lambda path: safe_join(coco_root, path),
                limit_bytes=int(evaluation["feature_cache_gb"] * 2**30),
                store=features_folder,
            )
            self.teacher_samples = build_samples(
                read_questions(questions),
                self.teacher_features,
                evaluation["order_seed"],
                self.labelled,
                False,
            )
            theirs, whose = [len(s.prompt.ids) for s in self.teacher_samples], str(teacher)
        else:
            return
        mine = [len(s.prompt.ids) for s in self.samples]
        if mine != theirs:
            at = next(
                (k for k, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs))
            )
            raise LaidError(
                f"{whose}: teacher and student do not see the same tokens: question {at} has"
                f" {theirs[at : at + 1]} tokens for the teacher and {mine[at : at + 1]} for the student:"
                " both need one tokenizer and one image size"
            )

    def _teacher_batch(self, indices: Sequence[int]) -> Batch:
        """What an online teacher reads: its own features, positions without gaps."""
        samples = [self.teacher_samples[k] for k in indices]
        features = [f for s in samples for f in self.teacher_features.get(s.paths)]
        return collate([s.prompt for s in samples], features).to(next(self.online.model.parameters()).device)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over what this process holds of the student, and over what is learned beside it."""
        s, m, gain = self.settings, self.method_settings, self.losses.gain
        groups = [
            ("lr", [p for p in self.model.parameters() if p.requires_grad], m["lr"] or s["lr"]),
            (
                "lr_weights",
                [*self.losses.alignments.parameters()],
                s["lr_weights"],
            ),
            ("lr_gain", list(gain.parameters()) if gain is not None else [], s["lr_gain"]),
        ]
        groups = [(name, parameters, rate) for name, parameters, rate in groups if parameters]
        self.trained = [p for _, parameters, _ in groups for p in parameters]
        self.peaks = [rate for _, _, rate in groups]
        return torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for _, parameters, rate in groups],
            betas=(0.9, 0.999), weight_decay=s["weight_decay"], fused=True,
        )  # fmt: skip

    # ---------------------------------------------------------------- one step

    def _batch(self, indices: list[int], step: int) -> tuple[Batch, Tensor | None, Tensor]:
        """Inputs, gaps opened as far as `step` allows; labels (B, 2) if there are any; positions without gaps."""
        samples = [self.samples[k] for k in indices]
        features = [] if self.images_in_step else [f for s in samples for f in self.features.get(s.paths)]
        inputs = collate([s.prompt for s in samples], features)
        if self.images_in_step:
            inputs.images = self._images([path for s in samples for path in s.paths])
        plain = inputs.positions
        if self.method_settings["gaps"]["reach"]:
            inputs.positions = plain.clone()
            for row, sample in enumerate(samples):
                length = len(sample.prompt.ids)
                rng = np.random.default_rng([self.seed, 3, step, sample.index])
                inputs.positions[:, row, :length] = self._stretched(sample, step, rng)
        labels = torch.from_numpy(np.stack([s.labels for s in samples])) if self.labelled else None
        return inputs.to(self.device), labels.to(self.device) if labels is not None else None, plain

    def _images(self, paths: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels, grid_thw, order) of laid.models.forward.Batch.images: what features are made from in the step."""
        each = {path: k for k, path in enumerate(dict.fromkeys(paths))}
        pixels, grid = self.processor.pixels([self.features.file(path) for path in each])
        return pixels, grid, torch.tensor([each[path] for path in paths])

    def _stretched(self, sample: Sample, step: int, rng: np.random.Generator) -> Tensor:
        gaps = self.method_settings["gaps"]
        positions = torch.from_numpy(sample.prompt.positions)
        if rng.random() >= gaps["share"]:
            return positions
        span = sample.prompt.span
        far = reach(step / self.steps, span, max(span, gaps["reach"]), gaps["end"])
        starts = sample.prompt.block_starts.tolist()
        return open_gaps(positions, starts, sample.text_start, far, rng, draw=gaps["draw"])

    def _loss_step(self, indices: list[int], step: int) -> dict[str, Tensor]:
        """The parts of eq. 8 for one batch, those with weight: {"sft", "kl", "laid", "rows"}."""
        inputs, labels, plain = self._batch(indices, step)
        return self.forward(inputs, labels, indices, step / self.steps, plain)

    # ---------------------------------------------------------------- training

    def train(self) -> dict[str, Any]:
        """Run (or go on with) the training, write the run folder and return its record."""
        s = self.settings
        checkpoint = Checkpoint(
            self.out.parent / f".{self.out.name}.checkpoint",
            self.parallel.agree(self._key),
            s["checkpoint_minutes"],
            self.parallel,
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
                    interrupted, due = map(bool, self.parallel.sum([self.interrupted, checkpoint.due()]))
                    if interrupted or (due and step + 1 < self.steps):
                        checkpoint.save(step + 1, self._trained_tensors(), self.optimizer, self.log)
                    if interrupted:
                        print(
                            f"{label}: stopped after step {step + 1}; the same command goes on from there",
                            flush=True,
                        )
                        raise SystemExit(143)
        finally:
            signal.signal(signal.SIGTERM, before)
        record = self._save()
        if self.parallel.main:
            checkpoint.remove()
        return record

    def _key(self) -> str:
        """What makes this run this run: settings, inputs and seed, and not by how many processes it is done."""
        return sha256_json(
            {
                "settings": slice_for(
                    "train", self.config, method=self.method, student=self.name, seed=self.seed
                ),
                "inputs": {
                    k: provenance.fingerprint(Path(v)) for k, v in self.inputs.items() if Path(v).exists()
                },
                "seed": self.seed,
            }
        )

    def _step(self, indices: list[int], step: int) -> dict[str, Any]:
        """One optimiser step over `indices`, in pieces of per_device_batch; returns a line for the log."""
        s, gain = self.settings, self.losses.gain
        progress = step / self.steps
        factor = learning_rate_factor(step, self.steps, s["warmup"], s["schedule"])
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        sums: dict[str, float] = {}
        for piece in self.parallel.pieces(indices, s["per_device_batch"]):
            # Dropout follows from step and samples alone, so that resuming is exact, in however many processes.
            torch.manual_seed(self.seed * 1_000_003 + step + (indices.index(piece[0]) << 32))
            parts = self._loss_step(piece, step)
            total = self.losses.total(parts, progress)
            share = len(piece) / len(indices)
            self.parallel.backward(total * share)
            for part, value in (*parts.items(), ("", total)):
                key = f"loss_{part}" if part else "loss"
                sums[key] = sums.get(key, 0.0) + share * float(value.detach())
        sums = dict(zip(sums, self.parallel.sum(sums.values()), strict=True))
        if not math.isfinite(sums["loss"]):
            raise LaidError(
                f"{self.name} {self.method}: the loss is {sums['loss']} at step {step + 1}"
                f" of {self.steps}; lower the learning rate ({self.peaks[0]:g})"
            )
        norm = self.parallel.step(self.optimizer, self.trained, s["max_grad_norm"])
        line = {
            "step": step + 1,
            **{k: round(v, 6) for k, v in sums.items()},
            "grad_norm": round(norm, 6),
        }
        line |= {"lr": self.peaks[0] * factor, "distance_emphasis": progress}
        for part in ("laid", "kl", "sft", "rows"):
            if self.objective.needs(part):
                line[f"lambda_{part}"] = getattr(self.objective, part)(progress)
        if gain is not None:
            gains = gain.gains().detach()
            line |= {
                "gain_min": float(gains.min()),
                "gain_mean": float(gains.mean()),
                "gain_max": float(gains.max()),
            }
            if gain.length_aware:
                line["exponent_mean"] = float(gain.exponent.detach().mean())
        return line

    # ---------------------------------------------------------------- saving

    def made(self) -> dict[str, Any] | None:
        """The record of the run that lies in `out`, if it is this very run: same code, settings, inputs, libraries."""
        if not (self.out / "run.json").is_file():
            return None
        record = read_json(self.out / "run.json")
        return record if record.get("provenance") == self._provenance() else None

    def _provenance(self) -> dict[str, Any]:
        inputs = {k: v if Path(v).exists() else f"hub:{v}" for k, v in self.inputs.items()}
        return provenance.collect(
            "train", self.config, inputs, student=self.name, method=self.method, seed=self.seed
        )

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, **self.losses.learned()}

    def _trained_tensors(self) -> dict[str, Tensor]:
        """All that is trained, whole, by name; every process calls it."""
        return {
            f"{name}/{key}": self.parallel.whole(parameter)
            for name, module in self._modules().items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what is trained to these values; each process takes its part."""
        for name, module in self._modules().items():
            for key, parameter in module.named_parameters():
                if f"{name}/{key}" in tensors:
                    self.parallel.set_(parameter, tensors[f"{name}/{key}"])

    def _resume(self, checkpoint: Checkpoint) -> int:
        """Steps already done: 0, or the checkpoint's; weights, optimiser and log are then restored."""
        found = checkpoint.load(self.optimizer)
        if found is None:
            return 0
        step, tensors, self.log = found
        self._put(tensors)
        self.losses.to_fit = False
        print(
            f"{self.name} {self.method} seed {self.seed}: goes on after step {step} of {self.steps}",
            flush=True,
        )
        return step

    def _save(self) -> dict[str, Any]:
        """Export the student and write the run folder; of several processes, the main one."""
        if self.parallel.sharded:
            tensors = self._trained_tensors()
            if self.parallel.main:  # the student as it was loaded, with the weights that were trained
                self.model = self._load_student("cpu")
                self._put(tensors)
        self.model.eval()
        record = {
            "student": self.name,
            "method": self.method,
            "seed": self.seed,
            "steps": self.steps,
            "final": self.log[-1],
            "provenance": self._provenance(),
        }
        weights = {
            f"{LEARNED[name]}.{key}": parameter.detach().cpu().tolist()
            for name, module in self.losses.learned().items()
            for key, parameter in module.named_parameters()
        }
        if not self.parallel.main:
            return record
        with atomic_path(self.out) as folder:
            folder.mkdir()
            self._export(folder / "model")
            lines = (json.dumps(line, sort_keys=True) + "\n" for line in self.log)
            (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
            write_json(folder / "learned.json", weights, indent=None)
            write_json(folder / "run.json", record)
        cost = provenance.cost(self.start) | {"processes": self.parallel.world}
        write_json(self.out.parent / f"{self.out.name}.cost.json", cost)
        return record

    def _export(self, folder: Path) -> None:
        """A PEFT adapter where only LoRA was trained, else a plain checkpoint, gain and adapter folded in."""
        model, gain = self.model, self.losses.gain
        if self.method_settings["lora"] is not None:
            if gain is None:
                # An adapter names its base: a hub id as it is, a folder by the student's name, so that the same
                # training gives the same bytes wherever it is run.
                base = str(self.inputs["student"])
                base = self.name if Path(base).exists() else base
                model.peft_config["default"].base_model_name_or_path = base
                model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
                (folder / "README.md").unlink(
                    missing_ok=True
                )  # an empty form that names this machine's paths
                return
            gain.detach()
            model = model.merge_and_unload()
        if gain is not None:
            gain.detach()
            # A length-aware gain folds for one length: that of the longest prompt it was trained on.
            gain.fold_(model, max(len(s.prompt.ids) for s in self.samples))
        model.to(self.parallel.dtype).save_pretrained(str(folder))
        self.processor.save(folder)
