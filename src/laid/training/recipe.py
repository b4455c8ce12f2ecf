"""Post-training of a student: SFT, KD, LAid and its ablations are one recipe with other weights in eq. 8.

    laid train --config config.yaml --method laid --seed 0 --student-name small --student DIR --teacher-cache DIR
               --coco DIR --questions FILE.json --out DIR

`prepare` makes what the steps need, `train` runs them; the step itself is `laid.training.step`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laid import provenance
from laid.data.chat import Chat, named_images, read_chats
from laid.data.images import require_images
from laid.distill.objective import PARTS, Objective
from laid.errors import LaidError
from laid.evaluation.held_out import HeldOut
from laid.io import atomic_path, read_record, require_place, require_room, sha256_json, write_json
from laid.methods.registry import Loaded
from laid.models.loading import load_model, source_of
from laid.models.processing import Processor
from laid.progress import Progress
from laid.settings import Settings, TrainedMethod, slice_for
from laid.settings.training import NOT_ASKED
from laid.training.checkpoint import Checkpoint, State
from laid.training.data import read_data, require_same_tokens
from laid.training.engine import Engine, start
from laid.training.export import export_adapter, export_checkpoint, write_run
from laid.training.step import Lesson, Training, lesson_of, training_step
from laid.training.student import make_trainable
from laid.training.teacher import OnlineTeacher, Teacher
from laid.training.teacher_cache import TeacherCache
from laid.training.validation import ACCURACY, Validation, best

# What `out` holds in the end; distill.json is `laid distill`'s.
FILES = ("run.json", "model", "log.jsonl", "learned.json", "distill.json")


@dataclass(frozen=True)
class Run:
    """One run: a student under a method, from a seed.

    name: the student's. student, teacher: checkpoint folders or hub ids; the teacher answers as training goes, on
    teacher_device, in place of teacher_cache, a folder. questions: conversations (laid.data.chat), images below coco. out: where model/,
    log.jsonl, learned.json and run.json appear, all at once, at the end. features: keeps visual features for other runs. validation: files of held-out questions or conversations, for
    training.validation.
    """

    settings: Settings
    method: str
    seed: int
    name: str
    student: str | Path
    coco: str | Path
    questions: str | Path
    out: Path
    teacher_cache: str | Path | None = None
    teacher: str | None = None
    teacher_device: str | None = None
    features: str | Path | None = None
    validation: tuple[str | Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.method} seed {self.seed}"

    @property
    def how(self) -> TrainedMethod:
        """The method's settings. Raises LaidError for a method that is not trained."""
        methods = self.settings.methods
        if not isinstance(methods.get(self.method), TrainedMethod):
            trained = [name for name, method in methods.items() if isinstance(method, TrainedMethod)]
            raise LaidError(f"{self.method!r} is not a trained method; trained methods: {', '.join(trained)}")
        return methods[self.method]

    @property
    def logs(self) -> Path:
        """Where trackers keep what they keep in files, beside `out`."""
        return self.out.parent / f"{self.out.name}.trackers"

    @property
    def from_teacher(self) -> list[str]:
        """The parts of eq. 8 that the teacher gives."""
        return [part for part in PARTS if part != "sft" and Objective.of(self.how).needs(part)]

    @cached_property
    def lessons(self) -> list[Chat]:
        """The conversations to learn from. Raises LaidError where they do not fill a batch."""
        return read_lessons(self.questions, self.settings)

    @cached_property
    def images(self) -> list[str]:
        """The images that the data names by their path, sorted."""
        return named_images(self.lessons)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """What training.validation asks."""
        asked = self.settings.training.validation
        if asked is None:
            return None
        return HeldOut.read(self.validation, self.settings.evaluation.order_seed, asked.questions)

    def inputs(self) -> dict[str, provenance.Input]:
        """What the run is made from, by name, for its record."""
        found: dict[str, provenance.Input] = {
            "questions": self.questions,
            "images": (self.coco, self.images),
            "student": source_of(self.student),
        }
        if self.from_teacher and self.teacher is not None:
            found["teacher"] = source_of(self.teacher)
        elif self.from_teacher:
            found["teacher_cache"] = Path(self.teacher_cache or "") / "index.json"
        if self.held_out is not None:
            found |= {f"validation_{number}": file for number, file in enumerate(self.validation)}
            found["validation_images"] = (self.coco, self.held_out.images)
        return found


def train(run: Run, engine: Engine | None = None) -> dict[str, Any]:
    """Run a training, or resume it; write its folder and return its record.

    engine: this process among those of the run (None: a run of its own on the CPU). Raises LaidError for wrong inputs, and for
    a loss that is not a number; SystemExit, after a checkpoint, where a signal stops it.
    """
    started = time.perf_counter()
    engine = engine or start(run.settings.training, log_folder=run.logs)
    if run.settings.training.validation and not engine.asks:
        raise LaidError(f"training.validation: {NOT_ASKED}")
    t, model = prepare(run, engine)
    s = run.settings.training
    checkpoint = Checkpoint(
        run.out.parent / f".{run.out.name}.checkpoint", engine.agree(lambda: _key(run)), s.checkpoint_minutes
    )
    done, log, kept = _restore(run, checkpoint.load(), t, model)
    validation = _validation(run, t, model)
    _require_room(run, t, model)
    model.train()
    with _stop_asked() as stop, _trackers(run, engine), Progress(t.steps, str(run), unit="steps") as bar:
        bar.update(done)
        order, per_epoch = [], len(t.data.samples) // s.batch_size
        for step in range(done, t.steps + 1):
            if validation and validation.due(step, log):
                log[-1] |= (found := validation.measure(t.lesson.student, model))
                if exports_best(run) and best(log) is log[-1]:
                    kept = {name: x.clone() for name, x in _trained(t, model).items()}
                engine.accelerator.log(found, step=step)
                bar.update(0, accuracy=found[ACCURACY])
            if step == t.steps or (validation and validation.over(log)):
                break
            epoch, at = divmod(step, per_epoch)
            if at == 0 or not order:
                order = t.data.order(epoch, s.batch_size)
            line = training_step(t, order[at], step)
            if not math.isfinite(line["loss"]):
                raise LaidError(
                    f"{run}: the loss is {line['loss']} at step {step + 1} of {t.steps}; lower the learning rate"
                    f" ({t.peaks[0]:g})"
                )
            logged = (step + 1) % s.log_every == 0 or step == t.steps - 1
            logged |= validation is not None and validation.after(step + 1)
            if logged:
                log.append(line)
            stopped, due = map(bool, engine.sum([bool(stop), checkpoint.due()]))
            # Before anything is printed: the signal may have ended whoever reads it (`| tee`).
            if stopped or (due and step + 1 < t.steps):
                _save(checkpoint, step + 1, t, model, log, kept)
            if logged:
                engine.accelerator.log(line, step=step + 1)
                bar.update(0, **{name: value for name, value in line.items() if name.startswith("loss")})
            bar.update(1)
            if stopped:
                engine.accelerator.print(
                    f"{run}: stopped after step {step + 1}; the same command goes on from there"
                )
                raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))
    record = _export(run, t, model, log, kept)
    if engine.main:
        checkpoint.remove()
        cost = provenance.cost(started) | {"processes": engine.world}
        write_json(run.out.parent / f"{run.out.name}.cost.json", cost)
    return record


def prepare(run: Run, engine: Engine) -> tuple[Training, nn.Module]:
    """All that the steps need, and the student inside it. Raises LaidError for wrong inputs."""
    method, settings = run.how, run.settings.training
    # One process looks: several that read thousands of names at once from a shared disk are slow.
    engine.agree(lambda: require_sensible(run))
    torch.manual_seed(run.seed)
    model = load_student(run, engine.load_device)
    processor = Processor.load(run.student)
    teacher = _teacher(run, engine)
    lesson = lesson_of(model, method, teacher)
    lesson.every_weight = engine.world > 1

    def adamw() -> torch.optim.Optimizer:
        groups = [{"params": weights, "lr": rate} for weights, rate in _groups(run, model, lesson)]
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=settings.weight_decay, fused=True)

    lesson.student, optimizer = engine.prepare(lesson.student, lesson.learned.values(), adamw)
    packed = settings.per_device_batch if settings.tokens_per_pass else 0
    data = read_data(
        model, processor, run.questions, run.coco, run.settings.evaluation, method,
        None if settings.train_vision else run.features,
        ahead=engine.world == 1 and not settings.train_vision,  # of several processes none needs the images of all
        other=teacher.features if isinstance(teacher, OnlineTeacher) else None,
        seed=run.seed, device=engine.device, in_step=settings.train_vision, packed=packed,
    )  # fmt: skip
    per_epoch = len(data.samples) // settings.batch_size
    if teacher is not None:
        require_same_tokens(data.lengths, teacher.lengths, str(run.teacher or run.teacher_cache))
    (weights, _), *others = groups = _groups(run, model, lesson)
    beside = [p for learned, _ in others for p in learned]
    steps = max(1, round((method.epochs or settings.epochs) * per_epoch))
    peaks = [rate for _, rate in groups]
    return Training(settings, lesson, data, engine, optimizer, weights, beside, peaks, steps), model


def load_student(run: Run, device: str) -> nn.Module:
    """The student as it starts: its adapter in place, what is trained marked and in float32."""
    settings = run.settings
    dtype = getattr(torch, settings.training.dtype)
    model = load_model(run.student, dtype, settings.evaluation.attention, device)
    return make_trainable(model, run.how.lora, settings.training)


def made(run: Run) -> dict[str, Any] | None:
    """The record of the run that lies in `out`, if it is this very run: same code, settings, inputs, libraries."""
    if not (run.out / "run.json").is_file():
        return None
    record = read_record(run.out / "run.json")
    return record if record.get("provenance") == _provenance(run) else None


# ------------------------------------------------------------------ before the first step


def read_lessons(file: str | Path, settings: Settings) -> list[Chat]:
    """The conversations of a training file. Raises LaidError where they do not fill a batch."""
    chats, batch = read_chats(file), settings.training.batch_size
    if len(chats) < batch:
        raise LaidError(
            f"{file}: {len(chats)} questions do not fill one batch of {batch} (training.batch_size)"
        )
    return chats


def require_sensible(run: Run) -> None:
    """Raise LaidError, before any model is loaded, where a method has nothing to learn, or nothing to learn it from, where
    questions do not fill a batch or images are missing, and where `out` holds something else or cannot be written."""
    parts = run.from_teacher
    if not parts and not Objective.of(run.how).needs("sft"):
        raise LaidError(f"methods.{run.method}: every lambda is 0, there is nothing to train")
    if parts and run.teacher is not None and run.teacher_cache is not None:
        raise LaidError("--teacher and --teacher-cache: two sources of one teacher's answers; give one")
    if parts and run.teacher is None and run.teacher_cache is None:
        raise LaidError(
            f"method {run.method} learns from the teacher ({', '.join(parts)}): give --teacher-cache, or --teacher"
        )
    require_place(run.out, *FILES)
    if run.how.dilution.reach and all(chat.needles is None for chat in run.lessons):
        raise LaidError(
            f"methods.{run.method}.dilution needs to know which images an answer rests on, and no conversation of"
            f' {run.questions} says so ("needles": [0]): give them, or set dilution.reach to 0'
        )
    require_images(run.coco, run.images, [run.questions])
    if run.settings.training.validation is None and run.validation:
        raise LaidError(
            f"--validation {run.validation[0]}: the configuration asks nothing: set training.validation, for one {{every: 100}}"
        )
    if run.settings.training.validation is not None and not run.validation:
        raise LaidError("training.validation is set: give files of held-out questions with --validation")
    if run.held_out is not None:
        require_images(run.coco, run.held_out.images, run.validation)


def _teacher(run: Run, engine: Engine) -> Teacher | None:
    if not run.from_teacher:
        return None
    method, settings = run.how, run.settings
    if run.teacher is not None:
        device = run.teacher_device or str(engine.device)
        dtype = getattr(torch, settings.training.dtype)
        model = load_model(run.teacher, dtype, settings.evaluation.attention, device).requires_grad_(False)
        read = read_data(
            model,
            Processor.load(run.teacher),
            run.questions,
            run.coco,
            settings.evaluation,
            method,
            run.features,
            packed=settings.training.tokens_per_pass,
        )
        place = next(model.parameters()).device
        return OnlineTeacher(model, lambda k: read.inputs(k).to(place), read.lengths, read.features)
    cache = TeacherCache(run.teacher_cache, run.questions)
    if engine.main:
        cache.verify()
    return cache


def _require_room(run: Run, t: Training, model: nn.Module) -> None:
    """Raise LaidError where the student, or one more checkpoint on the way, would not fit the disk."""
    trained = 4 * sum(p.numel() for p in _parameters(t, model).values())
    whole = sum(p.numel() for p in model.parameters()) * getattr(torch, run.settings.training.dtype).itemsize
    exported = trained if _exports_adapter(run, t) else whole
    held = 4 if exports_best(run) else 3  # weights and both moments, and the best weights so far
    if t.engine.main:
        require_room(
            run.out.parent, max(exported, held * trained), "a checkpoint of this run, or its student,"
        )


def exports_best(run: Run) -> bool:
    """Whether the run leaves the student of its best validation, not that of its last step."""
    asked = run.settings.training.validation
    return asked is not None and asked.export == "best"


def _validation(run: Run, t: Training, model: nn.Module) -> Validation | None:
    if run.held_out is None:
        return None
    loaded = Loaded(model, t.data.features.processor)
    settings = run.settings.evaluation.changed({"scoring": "logits"})
    train_vision = run.settings.training.train_vision
    store = None if train_vision else run.features
    return Validation(
        run.settings.training.validation,
        run.held_out,
        lambda share: share.asker(loaded, run.coco, settings, f"{run}: validation", store),
        t.engine,
        t.steps,
        train_vision,
    )


def _exports_adapter(run: Run, t: Training) -> bool:
    """Whether the run leaves an adapter; a gain is folded into weights, which then are a checkpoint of their own."""
    return run.how.lora is not None and t.lesson.gain is None


def _groups(run: Run, model: nn.Module, lesson: Lesson) -> list[tuple[list[nn.Parameter], float]]:
    """(weights, their highest learning rate): the student's, w, the gains'."""
    settings = run.settings.training
    groups = [([p for p in model.parameters() if p.requires_grad], run.how.lr or settings.lr)]
    for name, rate in (("alignment", settings.lr_weights), ("gain", settings.lr_gain)):
        if name in lesson.learned and (weights := list(lesson.learned[name].parameters())):
            groups.append((weights, rate))
    return groups


# ------------------------------------------------------------------ around the steps


@contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """Signals that ask to stop: SIGTERM and SIGINT are noted here and wait for the step at hand; a second SIGINT does not."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _trackers(run: Run, engine: Engine) -> Iterator[None]:
    """training.trackers, through Accelerate, as long as the steps go on."""
    if run.settings.training.trackers:
        about = {"student": run.name, "method": run.method, "seed": run.seed}
        # One folder a run, and no DVC experiment of it: several runs go on at once, and none owns the repository.
        dvclive = {"dir": str(run.logs / "dvclive"), "save_dvc_exp": False, "dvcyaml": None}
        engine.accelerator.init_trackers("laid", about, {"dvclive": dvclive})
    try:
        yield
    finally:
        for tracker in engine.accelerator.trackers:
            tracker.finish()


def _key(run: Run) -> str:
    """What identifies a run: settings, inputs and seed, but not the number of processes."""
    inputs = {name: provenance.fingerprint(value, kept=True) for name, value in run.inputs().items()}
    settings = slice_for("train", run.settings, method=run.method, student=run.name, seed=run.seed)
    return sha256_json({"settings": settings, "inputs": inputs, "seed": run.seed})


def _provenance(run: Run) -> dict[str, Any]:
    return provenance.collect(
        "train", run.settings, run.inputs(), student=run.name, method=run.method, seed=run.seed
    )


def _parameters(t: Training, model: nn.Module | None) -> dict[str, nn.Parameter]:
    """All that is trained, by name; without a model, what is learned beside it."""
    return {
        f"{name}/{key}": parameter
        for name, module in {**({"model": model} if model is not None else {}), **t.lesson.learned}.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _trained(t: Training, model: nn.Module) -> dict[str, Tensor]:
    """All that is trained, whole, in the main process; every process calls it."""
    return {name: t.engine.whole(parameter) for name, parameter in _parameters(t, model).items()}


def _save(
    checkpoint: Checkpoint,
    step: int,
    t: Training,
    model: nn.Module,
    log: list[dict],
    kept: dict[str, Tensor],
) -> None:
    tensors = {f"weights/{name}": tensor for name, tensor in _trained(t, model).items()}
    tensors |= {f"optimizer/{name}": x for name, x in t.engine.optimizer_tensors(t.optimizer)}
    tensors |= {f"best/{name}": tensor for name, tensor in kept.items()}
    if t.engine.main:
        checkpoint.save(State(step, tensors, log))


def _restore(
    run: Run, state: State | None, t: Training, model: nn.Module
) -> tuple[int, list[dict], dict[str, Tensor]]:
    """(Steps already done, their log, the best weights so far): weights and optimiser are set to a checkpoint's, if there is one."""
    if state is None:
        return 0, [], {}
    t.engine.restore_optimizer(t.optimizer, _below("optimizer/", state.tensors))
    for name, parameter in _parameters(t, model).items():
        t.engine.set_(parameter, state.tensors[f"weights/{name}"])
    t.engine.accelerator.print(f"{run}: goes on after step {state.step} of {t.steps}")
    return state.step, state.log, _below("best/", state.tensors) if t.engine.main else {}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _export(
    run: Run, t: Training, model: nn.Module, log: list[dict], kept: dict[str, Tensor]
) -> dict[str, Any]:
    """Export the student and write the run folder, by the main process; returns its record.

    kept: the weights of the best validation, which are exported where they are asked for.
    """
    record = {
        "student": run.name,
        "method": run.method,
        "seed": run.seed,
        "steps": log[-1]["step"],
        "final": log[-1],
        "provenance": t.engine.agree(lambda: _provenance(run)),
    }
    if run.held_out is not None:
        record["best"] = best(log)
        record["exported"] = (best(log) if exports_best(run) else log[-1])["step"]
    if exports_best(run):
        set_here = _parameters(t, None if t.engine.sharded else model) if t.engine.main else {}
        for name, parameter in set_here.items():
            t.engine.set_(parameter, kept[name])
    if t.engine.sharded:
        tensors = kept if exports_best(run) else _trained(t, model)
        if t.engine.main:  # the student as it was loaded, with the weights that were trained
            model = load_student(run, "cpu")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(tensors[f"model/{name}"])
    if not t.engine.main:
        return record
    model.eval()
    with atomic_path(run.out) as folder:
        folder.mkdir()
        if _exports_adapter(run, t):
            base = str(
                run.student
            )  # a hub id as it is; a folder by the student's name, the same wherever it lies
            export_adapter(model, run.name if Path(base).exists() else base, folder / "model")
        else:
            dtype, processor = getattr(torch, run.settings.training.dtype), t.data.features.processor
            export_checkpoint(model, t.lesson.gain, dtype, processor, folder / "model")
        write_run(folder, log, t.lesson.learned, record)
    return record
