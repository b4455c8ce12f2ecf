"""What jobs ask for and what they would cost: sections resources and plan."""

from typing import Annotated

from pydantic import Field

from laid.settings.base import Count, Distinct, Natural, NonNegative, Positive, Section


class Job(Section):
    """What one job asks for."""

    threads: Count = 1
    """CPU threads of one job."""
    mem_mb: Annotated[int, Field(ge=100)] = 3000
    """Memory in MB; a retry asks for more."""
    runtime: Count = 30
    """Time limit in minutes; a retry asks for more."""
    gpu: Natural = 0
    """GPUs of one job."""
    gpu_of: dict[str, Natural] = {}
    """GPUs of a job on these models, by name, where they are not `gpu`: a teacher that one GPU cannot hold takes two, its students one."""

    def gpus(self, member: str | None) -> int:
        """GPUs of a job on this model; None: on no model in particular."""
        return self.gpu_of.get(member, self.gpu)


class Resources(Section):
    """What the jobs of each rule ask for; no effect on results. Partition, account and GPU type belong in the profile."""

    data: Job = Job()
    """Making the COCO data and the haystacks."""
    pretrain: Job = Job()
    """Pretraining one member of the family."""
    features: Job = Job()
    """Computing visual features, where evaluation.keep_features asks for it."""
    teacher_cache: Job = Job()
    """Running the teacher over the training questions."""
    train: Job = Job()
    """Post-training one student."""
    evaluate: Job = Job()
    """Evaluating one model."""
    tables: Job = Job()
    """Tables, figures, reports."""


class PlanImages(Section):
    """Visual tokens per image, where photographs differ."""

    tokens: Positive | None = None
    """Their average; null: that of COCO's images under Qwen2.5-VL's limits, or of the rendered scenes."""
    spread: NonNegative | None = None
    """Their standard deviation; null: likewise."""


class Plan(Section):
    """What `laid plan` assumes; no effect on results."""

    gpu: str = "A800-80GB"
    """The GPU that jobs run on, by its name in laid.plan.gpus; the default is the paper's. Jobs without a GPU (`resources.<rule>.gpu: 0`) are checked against mem_mb."""
    compare: Distinct[str] = ["H100-80GB", "H200-141GB"]
    """Other GPUs whose hours are listed too."""
    utilisation: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the peak FLOP/s that jobs are assumed to reach; null: what each kind of pass reached when it was measured (bench/GPU.md)."""
    images: PlanImages = PlanImages()
