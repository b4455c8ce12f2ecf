"""`laid rehearse`: every kind of job of a configuration for a few steps, on random weights of its shapes and at its true lengths.

Nothing is downloaded: checkpoints are made, images rendered and resized to as many visual tokens as the real ones have. Each job is
the verb that the workflow calls, in this process and on one device; several GPUs for one training are not rehearsed. Beside each
other stand memory as planned and as measured, and the hours of the whole run at the rates of these jobs. Their seconds hold
starting, loading and hashing too, so that the hours of short rehearsals are upper bounds. Every method is trained and exported;
of the runs of a student, one adapter and one whole checkpoint are evaluated, the others' hours are taken from them, and their
exports are removed at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laid.plan.gpus import Gpu
    from laid.plan.jobs import Job
    from laid.settings import Settings

# Optimiser steps of a training: the second has the optimiser's state beside it. Questions of an evaluation.
STEPS, ASKED = 2, 2
IMAGES = 120  # that questions of small haystacks are drawn from
WRITING = 1e9  # bytes a second, of checkpoints: a guess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, device_arguments

    config_argument(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="where checkpoints and results of the rehearsal go (default <results>/<scale>/rehearsal)",
    )
    device_arguments(parser)


@dataclass
class Row:
    """One rehearsed job. planned, measured: peak bytes of its device (measured: on a GPU alone). hours: of all real jobs of its rule,
    model and method, on as many devices as this one."""

    rule: str
    student: str
    method: str
    seconds: float
    planned: int
    measured: int | None
    hours: float
    failed: str = ""


def run(args: argparse.Namespace) -> int:
    from laid.commands.shared import root_of
    from laid.io import alone
    from laid.settings import load

    settings = load(args.config)
    out = args.out or root_of(settings) / "rehearsal"
    with alone(out):
        return _rehearse(args, settings, out)


def _rehearse(args: argparse.Namespace, settings: Settings, out: Path) -> int:
    import sys
    import warnings
    from shutil import rmtree

    from laid.commands.shared import pick_device
    from laid.io import write_json
    from laid.plan.estimate import Estimator
    from laid.plan.gpus import GIB, gpu_named
    from laid.plan.jobs import jobs_of
    from laid.results.render import Entry, Table, show
    from laid.settings.loading import resolved_file

    device = pick_device(args.device)
    gpu = gpu_named(settings.plan.gpu)
    warnings.simplefilter("ignore")
    full = list(jobs_of(Estimator(settings), gpu))
    short = shortened(settings, out)
    make_checkpoints(settings, short, device)
    config = resolved_file(short, out)
    rows: list[Row] = []
    planned = list(jobs_of(Estimator(short), gpu))
    print(
        f"laid rehearse: about {expected(short, planned, gpu) / 60:.0f} minutes on one {gpu.name}", flush=True
    )
    evaluated = {(j.student, j.method) for j in rehearsed(short, planned) if j.rule == "evaluate"}
    for job, words in jobs(short, planned, out):
        alike = [j for j in full if job and kind_of(settings, j) == kind_of(settings, job)]
        seconds, peak, failed = watched(
            lambda words=words: _verb([*words, "--config", str(config)], args, device), device
        )
        if job is None:
            if failed:
                print(f"laid rehearse: {words[0]}: {failed}", file=sys.stderr)
                return 1
            continue
        if job.rule == "train" and (job.student, job.method) not in evaluated:
            rmtree(words[-1], ignore_errors=True)  # several whole models are more than a disk may hold
        flops = sum(j.count * j.need.flops for j in alike)
        hours = flops / job.need.flops * seconds / 3600
        rows.append(
            Row(job.rule, job.student, job.method, round(seconds, 1), job.need.bytes, peak, hours, failed)
        )
    header = [
        "Job",
        "Model",
        "Method",
        "Seconds",
        "Planned GiB",
        "Measured GiB",
        "Planned / measured",
        "Hours",
        "Failed",
    ]
    cells = [
        [
            row.rule, row.student, row.method, f"{row.seconds:.1f}", f"{row.planned / GIB:.3g}",
            f"{row.measured / GIB:.3g}" if row.measured else "-",
            f"{row.planned / row.measured:.3f}" if row.measured else "-",
            f"{row.hours:.3g}", row.failed,
        ]
        for row in rows
    ]  # fmt: skip
    notes = [
        f"Hours: of all jobs of that kind at this rate, one device each, starting included; {sum(r.hours for r in rows):.3g} in all."
    ]
    show(
        [Table("rehearsal", "Rehearsal", header, [[Entry(c) for c in row] for row in cells], notes, names=3)]
    )
    write_json(out / "rehearsal.json", [asdict(row) for row in rows])
    return 1 if any(row.failed for row in rows) else 0


def shortened(settings: Settings, out: Path) -> Settings:
    """The same models, methods and lengths, on few rendered images and questions of the largest sizes."""
    from laid.plan.tokens import lengths_of
    from laid.settings import TrainedMethod

    asked = settings.haystacks
    longest = max(asked.test.sizes)
    members = [settings.models.teacher, *settings.models.students]
    trained = [name for name, method in settings.methods.items() if isinstance(method, TrainedMethod)]
    on_gpu = {}
    for rule in ("features", "teacher_cache", "train", "evaluate"):
        granted = getattr(settings.resources, rule)
        one = min(1, granted.gpu)
        on_gpu[rule] = {"gpu": one, "gpu_of": dict.fromkeys(granted.gpu_of, one)}
    return settings.changed(
        {
            "results": str(out),
            "seeds": 1,
            "data": {
                "source": "rendered",
                "rendered": {"train": max(IMAGES, 6 * asked.train.max_size), "val": max(IMAGES, 2 * longest)},
            },
            "haystacks": {
                "vocabulary": "all",
                "train": {
                    "questions": STEPS * settings.training.batch_size,
                    "min_size": asked.train.max_size,
                },
                "validation": {"questions": 2, "sizes": [2]},
                "test": {"questions": ASKED},
            },
            "models": {"checkpoints": {name: str(out / "models" / name) for name in members}},
            "methods": {name: {"epochs": 1.0} for name in trained},
            "training": {"checkpoint_minutes": 0, "validation": None},
            "beyond": {"table": False},
            "plan": {"images": {"tokens": lengths_of(settings).visual, "spread": 0}},
            "resources": on_gpu,
        }
    )


def kind_of(settings: Settings, job: Job) -> tuple:
    """What jobs have in common of which one is rehearsed: evaluations of runs that are loaded in the same way are alike."""
    from laid.settings import TrainedMethod

    method = settings.methods.get(job.method)
    if job.rule == "evaluate" and isinstance(method, TrainedMethod):
        return job.rule, job.student, "adapter" if method.lora else "checkpoint"
    return job.rule, job.student, job.method


def rehearsed(short: Settings, planned: list[Job]) -> list[Job]:
    """The first job of every kind, at the largest test size."""
    size, found = max(short.haystacks.test.sizes), {}
    for job in planned:
        if not job.sizes or size in job.sizes:
            found.setdefault(kind_of(short, job), job)
    return list(found.values())


def expected(short: Settings, planned: list[Job], gpu: Gpu) -> float:
    """Seconds that the rehearsal takes on that GPU by the plan's rates, making checkpoints and exports included.

    Half of a job's start is Python and its libraries, which are there.
    """
    from laid.plan.speed import START

    found = rehearsed(short, planned)
    made = {job.student: 2 * job.need.parameters for job in found}
    work = sum(3600 * job.hours(gpu, None) - START / 2 + job.need.disk / WRITING for job in found)
    return work + sum(made.values()) / WRITING


def make_checkpoints(settings: Settings, short: Settings, device: str) -> None:
    """Random weights of each member's shapes, with a tokenizer of the words that questions need."""
    from laid.io import atomic_path
    from laid.plan.shapes import member_config, meta_model
    from laid.toy.family import build_processor
    from laid.toy.render import CATEGORIES

    processor = build_processor(sorted(CATEGORIES), round(784 * short.plan.images.tokens))
    encoder = processor.encoder
    for name, folder in short.models.checkpoints.items():
        config, _ = member_config(settings, name)
        config.image_token_id, config.vision_start_token_id = encoder.pad_id, encoder.start_id
        config.vision_end_token_id = encoder.end_id
        config.video_token_id = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        model = meta_model(config, settings.evaluation.dtype, device=device)
        with atomic_path(folder, sum(p.nbytes for p in model.parameters())) as beside:
            model.save_pretrained(beside)
            processor.save(beside)


def jobs(short: Settings, planned: list[Job], out: Path) -> Iterator[tuple]:
    """(the job as it is planned, None for what only makes inputs; the verb's words without --config)."""
    from laid.settings import TrainedMethod

    root = out / short.scale
    coco, asked = root / "coco", root / "haystacks"
    yield None, ["data", "--out", str(coco)]
    yield None, ["haystacks", "--coco", str(coco), "--out", str(asked)]
    train, size = str(asked / "train.json"), max(short.haystacks.test.sizes)
    test = str(asked / f"test/visual_haystack_{size}.json")
    for job in rehearsed(short, planned):
        model, run = short.models.checkpoints[job.student], root / "runs" / job.student / job.method / "seed0"
        common = ["--coco", str(coco), "--questions"]
        if job.rule == "features":
            yield job, ["features", "--model", model, *common, train, test]
        elif job.rule == "teacher_cache":
            yield (
                job,
                ["teacher-cache", "--teacher", model, *common, train, "--out", str(root / "teacher_cache")],
            )
        elif job.rule == "train":
            cache = ["--teacher-cache", str(root / "teacher_cache")]
            named = ["--method", job.method, "--seed", "0", "--student-name", job.student, "--student", model]
            yield job, ["train", *named, *cache, *common, train, "--out", str(run)]
        elif job.rule == "evaluate":
            trained = isinstance(short.methods[job.method], TrainedMethod)
            runs = ["--runs", str(run)] if trained else []
            named = ["--student-name", job.student, "--method", job.method, "--model", model, *runs]
            yield (
                job,
                ["evaluate", *named, *common, test, "--out", str(root / "cells" / job.student / job.method)],
            )


def watched(work: Callable[[], None], device: str) -> tuple[float, int | None, str]:
    """(seconds, peak bytes on a GPU, what went wrong) of work()."""
    import gc
    import traceback

    import torch

    from laid.errors import LaidError

    if on_gpu := device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start, failed = time.perf_counter(), ""
    try:
        work()
    except LaidError as error:
        failed = str(error)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, ImportError) as error:
        traceback.print_exc()  # the other jobs are rehearsed all the same
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return time.perf_counter() - start, peak, failed


def _verb(words: list[str], args: argparse.Namespace, device: str) -> None:
    """Run a verb of laid as the command line would."""
    import importlib

    module = importlib.import_module(f"laid.commands.{words[0].replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"laid {words[0]}")
    module.add_arguments(parser)
    computes = ["--device", device, "--threads", str(args.threads)]
    module.run(parser.parse_args([*words[1:], *(computes if words[0] not in ("data", "haystacks") else [])]))
