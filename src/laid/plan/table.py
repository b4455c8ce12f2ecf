"""A plan as tables, as JSON, and beside the paper's hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from laid.models.loading import parameter_label
from laid.plan.estimate import Estimator
from laid.plan.gpus import GIB, USABLE, Gpu
from laid.plan.jobs import Job
from laid.plan.rehearsal import PARTS
from laid.plan.speed import IMAGES, START
from laid.results.render import Entry, Table

PAPER = {"7B": 74, "3B": 43}  # hours on 4 x A800 80 GB (arXiv 2512.21576)
PAPER_GPUS = 4
NAMED = 3  # methods that a row lists; more are counted there and listed below
STAGES = ("features", "teacher_cache", "train", "evaluate")


def together(jobs: Sequence[Job]) -> list[Job]:
    """Jobs that need just the same, of one rule and student, as one with their number."""
    found: list[Job] = []
    for job in jobs:
        for k, other in enumerate(found):
            same = (job.rule, job.student, job.sizes) == (other.rule, other.student, other.sizes)
            if same and job.rule == "evaluate" and job.need == other.need:
                method = f"{other.method}, {job.method}"
                found[k] = replace(
                    other, count=other.count + job.count, method=method, label=f"{_name(other)} {method}"
                )
                break
        else:
            found.append(job)
    return found


def _name(job: Job) -> str:
    return job.label.split(" ")[0]


def job_tables(jobs: Sequence[Job], gpu: Gpu, utilisation: float | None, estimator: Estimator) -> list[Table]:
    """What every job does and what memory it takes, one row per job in both, like ones together.

    Two tables, because all columns side by side are wider than any terminal.
    """
    parts = [p for p in (*PARTS, "process") if any(job.need.memory[p] for job in jobs)]
    names = ["Job", "What", "Images"]
    # What a reader looks for first stands first: a narrow terminal shows a table in parts.
    work = [
        "Jobs",
        "Devices",
        "GPU-hours",
        "Hours",
        "Size",
        "Trained",
        "Longest",
        "Tokens",
        "FLOP",
        "Disk GB",
    ]
    memory = ["Peak GiB", "Has GiB", *(p.capitalize() for p in parts)]
    rows, breaks, before, many = {"work": [], "memory": []}, set(), None, {}
    for job in together(jobs):
        if before is not None and (job.rule, job.student) != before:
            breaks.add(len(rows["work"]))
        before = (job.rule, job.student)
        n, on_gpu = job.need, job.gpu is not None
        methods = job.method.split(", ")
        label = job.label
        if len(methods) > NAMED:
            label = f"{_name(job)} {len(methods)} methods"
            many[f"{label}: {job.method}."] = None
        name = [
            job.rule,
            label,
            "" if not job.sizes else str(job.sizes[0]) if len(job.sizes) == 1 else f"{min(job.sizes)}..{max(job.sizes)}",
        ]  # fmt: skip
        about = [
            str(job.count),
            str(job.devices if on_gpu else "CPU"),
            _number(job.gpu_hours(gpu, utilisation)) if on_gpu else "",
            _number(job.hours(gpu, utilisation)) if on_gpu else "",
            parameter_label(n.parameters),
            parameter_label(n.trained) if n.trained else "",
            f"{n.longest:,}",
            _short(n.tokens),
            _short(n.flops),
            _number(n.disk / 1e9),
        ]
        takes = [
            _number(n.bytes / GIB) + ("" if job.fits else " !"),
            _number(job.has / GIB),
            *(_number(n.memory[p] / GIB) if n.memory[p] else "" for p in parts),
        ]
        for kind, texts in (("work", about), ("memory", takes)):
            rows[kind].append([Entry(text) for text in (*name, *texts)])
    sources = "; ".join(f"{name} {m.source}" for name, m in estimator.members.items())
    notes = [
        "Hours, longest prompt, tokens, FLOP and disk of one job; GPU-hours of all jobs of the row, GPUs that wait for one another counted.",
        f"Hours on {gpu.name}: {_speed(utilisation)}.",
        "Size: weights. FLOP: matrix products and attention, causal attention at half.",
        f"Tokens: {estimator.lengths.visual:g} visual ones an image; longest prompt: three standard deviations above.",
        *many,
        f"Shapes: {sources}.",
    ]
    held = ["GiB by part, at the worst moment of one device; ! does not fit."]
    if any(job.gpu for job in jobs):
        held.append(f"Of a {gpu.name}'s {gpu.gib:g} GiB {USABLE:.0%} may be used.")
    return [
        Table("plan", "The plan", [*names, *work], rows["work"], notes, breaks, names=3),
        Table("memory", "Memory of each job", [*names, *memory], rows["memory"], held, breaks, names=3),
    ]


def _speed(utilisation: float | None) -> str:
    """What hours are made of, in words."""
    at = f"{utilisation:.0%} of peak" if utilisation else "the shares of peak that bench/gpu.py measured"
    return f"at {at}, {START:g} s to start each job, {IMAGES:g} images a second where they are first read"


def gpu_table(jobs: Sequence[Job], gpus: Sequence[Gpu], utilisation: float | None) -> Table:
    """GPU-hours of each stage on each GPU."""
    header = ["GPU", "Usable GiB", "Peak TFLOP/s", "Jobs that do not fit", *STAGES, "GPU-hours in all"]
    rows = []
    for gpu in gpus:
        on_gpu = [job for job in jobs if job.gpu]
        hours = [sum(j.gpu_hours(gpu, utilisation) for j in on_gpu if j.rule == stage) for stage in STAGES]
        unfit = sum(job.count for job in on_gpu if job.need.bytes > gpu.usable)
        texts = [gpu.name, _number(gpu.usable / GIB), f"{gpu.half:g}", str(unfit), *map(_number, hours)]
        rows.append([Entry(text) for text in (*texts, _number(sum(hours)))])
    note = f"{_speed(utilisation).capitalize()} (plan.utilisation; bench/GPU.md)."
    return Table("gpus", "GPU-hours of all jobs", header, rows, [note], names=1)


def paper_table(
    jobs: Sequence[Job], gpu: Gpu, utilisation: float | None, labels: dict[str, str]
) -> Table | None:
    """The paper's hours of LAid beside ours, where its students are planned."""
    teacher = sum(j.gpu_hours(gpu, utilisation) for j in jobs if j.rule == "teacher_cache")
    rows, sums = [], [0.0, 0.0]
    for job in jobs:
        name = labels.get(job.student, "")
        if job.rule == "train" and job.method == "laid" and name in PAPER and job.gpu:
            theirs, ours = PAPER_GPUS * PAPER[name], job.gpu_hours(gpu, utilisation) / job.count
            sums = [sums[0] + theirs, sums[1] + ours]
            rows.append([name, f"{theirs}", _number(ours), _number(ours / theirs)])
    if not rows:
        return None
    rows.append(["teacher's pass, once for all", "", _number(teacher), ""])
    rows.append(
        ["together", f"{sums[0]:.0f}", _number(sums[1] + teacher), _number((sums[1] + teacher) / sums[0])]
    )
    header = ["LAid, one run", "Paper, A800-hours", f"Plan, {gpu.name}-hours", "Plan / paper"]
    notes = [
        "The paper: about 74 h (7B) and 43 h (3B) on 4 x A800 80 GB = 296 + 172 A800-hours.",
        "It does not say whether the teacher ran in every epoch; here it runs once and its answers are kept.",
        "The plan leaves out sending between GPUs.",
    ]
    return Table(
        "paper", "Beside the paper", header, [[Entry(t) for t in row] for row in rows], notes, names=1
    )


def record(
    jobs: Sequence[Job], gpus: Sequence[Gpu], utilisation: float | None, refusals: Sequence[str]
) -> dict[str, Any]:
    """The plan as JSON: every job with plain numbers (bytes, FLOP, hours)."""
    return {
        "format": "laid-plan/1",
        "utilisation": utilisation,
        "gpus": [gpu.name for gpu in gpus],
        "refused": list(refusals),
        "jobs": [
            {
                "rule": job.rule,
                "student": job.student,
                "method": job.method,
                "sizes": list(job.sizes),
                "jobs": job.count,
                "devices": job.devices,
                "parameters": job.need.parameters,
                "trained": job.need.trained,
                "longest_tokens": job.need.longest,
                "tokens": round(job.need.tokens),
                "flop": round(job.need.flops),
                "images": round(job.need.images),
                "share_of_peak": round(utilisation or job.share, 3),
                "memory": {part: int(size) for part, size in job.need.memory.items() if size},
                "peak_bytes": job.need.bytes,
                "has_bytes": job.has,
                "fits": job.fits,
                "disk_bytes": round(job.need.disk),
                "hours": {gpu.name: round(job.hours(gpu, utilisation), 4) for gpu in gpus} if job.gpu else {},
            }
            for job in jobs
        ],
    }


def _number(value: float) -> str:
    """Three figures that matter: 0.0123, 1.23, 12.3, 123, 1,230."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else "<0.001"


def _short(count: float) -> str:
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"
