"""Changes of the configuration that would make a job fit; each is tried before it is suggested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from laid.plan.estimate import Estimator
from laid.plan.gpus import GIB, GPUS
from laid.plan.jobs import Job, need_of

ENOUGH = 3  # suggestions at most


def refusal(estimator: Estimator, job: Job) -> str:
    """One line: the job, what it needs, what it has, what would fit."""
    sizes = f" at {_sizes(job)} images" if job.sizes else ""
    found = ways_out(estimator, job)
    advice = f"would fit: {'; or '.join(found)}" if found else "no single change makes it fit"
    where = f"on a {job.gpu.name}" if job.gpu else f"(resources.{job.rule}.mem_mb)"
    return (
        f"{job.rule} {job.label}{sizes}: needs {job.need.bytes / GIB:.1f} GiB, has {job.has / GIB:.1f} GiB {where};"
        f" {advice}"
    )


def ways_out(estimator: Estimator, job: Job) -> list[str]:
    """Changes of which each alone makes the job fit, cheapest first."""
    found = []
    method = job.method.partition(", ")[0]  # methods in one line need the same
    for text, change in _candidates(estimator, job):
        if len(found) == ENOUGH:
            return found
        other = estimator.under(estimator.config.changed(change))
        need = need_of(other, job.gpu or GPUS["A800-80GB"], job.rule, job.student, method, job.sizes)
        if need.bytes + job.need.memory["process"] <= job.has:
            found.append(text)
    if job.gpu is None:
        return [*found, f"resources.{job.rule}.mem_mb: {-(-job.need.bytes // 10**6)}"][:ENOUGH]
    larger = [gpu for gpu in GPUS.values() if gpu.usable >= job.need.bytes]
    return [*found, *(f"one {min(larger, key=lambda gpu: gpu.gib).name}" for _ in larger[:1])][:ENOUGH]


def _candidates(estimator: Estimator, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to write, the configuration it stands for)."""
    c, e, training = estimator.config, estimator.config.evaluation, estimator.config.training
    if job.need.memory["features"]:
        for gb in (4, 2, 1):
            if gb < e.feature_cache_gb:
                yield f"evaluation.feature_cache_gb: {gb}", {"evaluation": {"feature_cache_gb": gb}}
                break
    if job.rule in ("evaluate", "teacher_cache"):
        if job.gpu and job.reserved < 2:
            more = {"gpu_of": {job.student: 2}} if job.rule == "evaluate" else {"gpu": 2}
            text = str(more).replace("'", "")[1:-1]
            yield f"resources.{job.rule}.{text}", {"resources": {job.rule: more}}
        for tokens in (8192, 4096):
            if tokens < e.batch_tokens and job.need.longest < e.batch_tokens:
                yield f"evaluation.batch_tokens: {tokens}", {"evaluation": {"batch_tokens": tokens}}
    if job.rule == "evaluate":
        for tokens in (8192, 4096, 2048):
            if tokens < (e.chunk_tokens or job.need.longest):
                yield f"evaluation.chunk_tokens: {tokens}", {"evaluation": {"chunk_tokens": tokens}}
    if job.rule == "train":
        if not training.gradient_checkpointing:
            yield (
                "training.gradient_checkpointing: true",
                {"training": {"gradient_checkpointing": True}},
            )
        if training.tokens_per_pass:
            yield "training.tokens_per_pass: 0", {"training": {"tokens_per_pass": 0}}
        if training.per_device_batch > 1:
            yield "training.per_device_batch: 1", {"training": {"per_device_batch": 1}}
        if job.gpu:
            for gpus in (2, 4, 8, 16):
                if gpus > job.need.devices or training.parallel == "ddp":
                    change = {"training": {"parallel": "fsdp2"}, "resources": {"train": {"gpu": gpus}}}
                    yield f"training.parallel: fsdp2 with resources.train.gpu: {gpus}", change
        if c.methods[job.method].lora is None:
            yield f"methods.{job.method}.lora: {{rank: 8}}", {"methods": {job.method: {"lora": {"rank": 8}}}}
    if job.rule in ("train", "teacher_cache"):
        asked = c.haystacks.train
        for size in (asked.max_size // 2, asked.max_size // 4):
            if size >= asked.min_size:
                yield f"haystacks.train.max_size: {size}", {"haystacks": {"train": {"max_size": size}}}


def _sizes(job: Job) -> str:
    return str(job.sizes[0]) if len(job.sizes) == 1 else f"{min(job.sizes)} to {max(job.sizes)}"
