"""All jobs of a configuration, as the workflow would start them, each with what it needs and what it may have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from laid.distill.objective import Objective
from laid.models.decoder import geometry
from laid.models.loading import SPREAD, parameters
from laid.models.parallel import processes
from laid.plan.estimate import Estimator, Need, size_of
from laid.plan.gpus import GIB, Gpu
from laid.plan.speed import IMAGES, START, share_of_peak
from laid.plan.vision import tower
from laid.results.needed import needed, needed_beyond
from laid.settings import Settings, TrainedMethod

PROCESS = int(0.45 * GIB)  # Python and its libraries, where a job's memory is the machine's


@dataclass
class Job:
    """One job, or several that are alike. rule: of the workflow. label: what it is. count: how many like it."""

    rule: str
    label: str
    student: str
    method: str
    sizes: tuple[int, ...]
    count: int
    need: Need
    gpu: Gpu | None
    has: int  # bytes on one device
    reserved: int  # devices that the configuration asks for

    @property
    def fits(self) -> bool:
        return self.need.bytes <= self.has

    @property
    def devices(self) -> int:
        """Devices that are taken while it runs: those it uses, and those reserved beside."""
        return max(self.need.devices, self.reserved)

    @property
    def share(self) -> float:
        """Of a GPU's peak, as jobs of its kind were measured."""
        return share_of_peak(self.need.kind, self.need.parameters, self.need.together)

    def hours(self, gpu: Gpu, utilisation: float | None) -> float:
        """Of one job, on its devices, at that share of peak (None: the measured one), starting and images included."""
        need = self.need
        rate = gpu.rate(need.dtype) * (utilisation or self.share) * need.devices
        return (START + need.images / IMAGES + (need.flops - need.seeing) / rate) / 3600

    def gpu_hours(self, gpu: Gpu, utilisation: float | None) -> float:
        """Of all jobs like it."""
        return self.count * self.devices * self.hours(gpu, utilisation)


def jobs_of(estimator: Estimator, gpu: Gpu) -> Iterator[Job]:
    """The jobs that the tables need, in the order of the data."""
    config = estimator.config
    names, methods = config.models, config.methods
    order = [names.teacher, *names.students]
    cells = sorted(needed(config), key=lambda cell: order.index(cell[0]))
    trained = [
        m for m in dict.fromkeys((s, m) for s, m, _ in cells) if isinstance(methods[m[1]], TrainedMethod)
    ]
    if not config.models.checkpoints:
        for member in order:
            yield _job(estimator, gpu, "pretrain", member, "", (), 1)
    if config.evaluation.keep_features:
        for member in order:
            yield _job(estimator, gpu, "features", member, "", (), 1)
    if any(_taught(methods[m]) for _, m in trained):
        yield _job(estimator, gpu, "teacher_cache", names.teacher, "", (), 1)
    for student, method in trained:
        yield _job(estimator, gpu, "train", student, method, (), config.seeds)
    for student, method in dict.fromkeys((s, m) for s, m, _ in cells):
        sizes = tuple(size for s, m, size in cells if (s, m) == (student, method))
        for part in _parts(config, sizes):
            yield _job(estimator, gpu, "evaluate", student, method, part, 1)
    for student, method in dict.fromkeys((s, m) for s, m, _ in needed_beyond(config)):
        for part in _parts(config, tuple(sorted(config.beyond.sizes))):
            yield _job(estimator, gpu, "evaluate", student, method, part, 1)


def _parts(config: Settings, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes of each evaluation job."""
    return [sizes] if config.evaluation.shard == "model" else [(size,) for size in sizes]


def need_of(
    estimator: Estimator, gpu: Gpu, rule: str, student: str, method: str, sizes: tuple[int, ...]
) -> Need:
    """What a job of that rule needs, under the estimator's configuration."""
    if rule == "train":
        return estimator.train(student, method)
    if rule == "pretrain":
        return estimator.pretrain(student)
    if rule == "features":
        return estimator.features(student)
    if rule == "teacher_cache":
        need = estimator.teacher_cache()
    else:
        need = estimator.evaluate(student, method, sizes)
        # A cell of a trained method answers with one model per seed, one after the other.
        trained = isinstance(estimator.config.methods[method], TrainedMethod)
        runs = estimator.config.seeds if trained else 1
        for part in ("flops", "tokens", "disk", "images", "seeing"):
            setattr(need, part, getattr(need, part) * runs)
    gpus = getattr(estimator.config.resources, rule).gpus(student)
    if gpus > 1 and need.memory["weights"] > SPREAD * gpu.gib * GIB:
        member = estimator.members[student]
        need.devices = processes(member.config, gpus)
        if need.devices > 1:  # a share of everything but the vision tower, which each has whole
            whole = {"weights": parameters(tower(member.model)) * size_of(need.dtype), "cache": 0}
            for part, kept in whole.items():
                need.memory[part] = kept + (need.memory[part] - kept) // need.devices
        else:  # Layers, and their keys and values, lie on one GPU or another and work in turn; a layer may be one too many.
            depth = geometry(member.config).layers
            for part in ("weights", "cache"):
                need.memory[part] = int(need.memory[part] * (1 / gpus + 1 / depth))
    return need


def _job(
    estimator: Estimator, gpu: Gpu, rule: str, student: str, method: str, sizes: tuple[int, ...], count: int
) -> Job:
    need = need_of(estimator, gpu, rule, student, method, sizes)
    asked = getattr(estimator.config.resources, rule)
    reserved = asked.gpus(student)
    on_gpu = reserved > 0
    if not on_gpu:
        need.memory["process"] = PROCESS
    name = estimator.config.models.labels.get(student, student)
    return Job(
        rule=rule,
        label=f"{name} {method}".strip(),
        student=student,
        method=method,
        sizes=sizes,
        count=count,
        need=need,
        gpu=gpu if on_gpu else None,
        has=gpu.usable if on_gpu else asked.mem_mb * 10**6,
        reserved=reserved,
    )


def _taught(method: TrainedMethod) -> bool:
    """Whether a method learns from the teacher's cache."""
    return any(Objective.of(method).needs(part) for part in ("kl", "laid"))
