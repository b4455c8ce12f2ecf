"""Which models play which role, and the small-scale family: sections models and family."""

from typing import Annotated

from pydantic import Field

from laid.settings.base import Count, Distinct, Label, Natural, NonNegative, Place, Positive, Section, Share

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Models(Section):
    """Which model is the teacher and which are students."""

    teacher: ModelName = "teacher"
    """Name of the teacher."""
    students: Annotated[Distinct[ModelName], Field(min_length=1)] = ["medium", "small"]
    """Names of the students."""
    checkpoints: dict[str, Place] = {}
    """Checkpoint of each model: a hub id (owner/name) or a local folder. laid trains a model without one from nothing (family)."""
    labels: dict[str, Label] = {}
    """What tables call a model (at paper scale 32B, 7B, 3B); without a label, its number of weights."""


class Member(Section):
    """One member: its sizes, how far its window reaches, and how long it is trained."""

    hidden_size: Annotated[int, Field(ge=8)] = 64
    """Width of the language model."""
    layers: Annotated[int, Field(ge=2)] = 3
    """Decoder layers; finding the needle takes at least 2, answering 3."""
    heads: Count = 2
    """Query heads."""
    kv_heads: Count = 1
    """Key and value heads (grouped-query attention); divides heads."""
    intermediate_size: Count = 128
    """Width of the MLP."""
    window: Count = 4
    """Images in the largest haystack of its pretraining: this makes its window short or long."""
    steps: Annotated[int, Field(ge=2)] = 1200
    """Optimiser steps of the language phase."""
    seed: Natural = 0
    """Seed of weights and data order."""


class Vision(Section):
    """The vision tower."""

    depth: Count = 2
    """Blocks."""
    hidden_size: Annotated[int, Field(ge=8)] = 64
    """Width."""
    intermediate_size: Count = 128
    """Width of its MLP."""
    heads: Count = 2
    """Heads."""


class PretrainVision(Section):
    """Alignment of the vision tower."""

    steps: Count = 300
    """Optimiser steps."""
    batch: Count = 64
    """Images per step."""
    lr: Positive = 0.002
    """AdamW's learning rate."""


class Pretrain(Section):
    """How members are pretrained."""

    batch: Count = 8
    """Haystacks per step."""
    targets: Count = 5
    """Yes/no questions per haystack."""
    hard_negatives: Share = 0.8
    """Share of targets that are taken from objects in distractors."""
    reach: Natural = 0
    """Positions that haystacks with gaps between their images span at most, so that members know the positions of haystacks larger than their window; 0: no gaps."""
    gapped: Share = 0.85
    """Share of the haystacks that get gaps."""
    noise: NonNegative = 0.1
    """Noise on visual tokens, relative to their spread, so that the member learns to live with the vision tower's errors."""
    lr_muon: Positive = 0.004
    """Learning rate of Muon, which trains the matrices of the decoder layers."""
    lr_adamw: Positive = 0.003
    """Learning rate of AdamW, which trains everything else."""
    warmup_steps: Count = 50
    """Steps of linear warm-up."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    start_size: Count = 3
    """Largest haystack at the start of the curriculum."""
    threshold: Share = 0.93
    """Running accuracy at which the curriculum moves on."""
    grow: Annotated[float, Field(gt=1)] = 1.5
    """Factor by which the largest haystack then grows."""
    vision: PretrainVision = PretrainVision()


class Family(Section):
    """The small-scale family of Qwen2.5-VL architecture, trained from nothing (laid pretrain)."""

    head_dim: Annotated[int, Field(ge=8)] = 32
    """Dimensions per head, the same for all members, so that LAid can compare their heads."""
    rope_theta: Annotated[float, Field(ge=1)] = 10000
    """RoPE base."""
    mrope_section: Annotated[list[Natural], Field(min_length=3, max_length=3)] = [4, 6, 6]
    """Frequencies for time, height and width; they add up to head_dim / 2."""
    image_pixels: Annotated[int, Field(ge=784)] = 784
    """Pixels of an image as the Qwen image processor resizes it; 784 = 28 x 28 makes one visual token, 3136 = 56 x 56 makes 2 x 2."""
    vision: Vision = Vision()
    pretrain: Pretrain = Pretrain()
    members: dict[ModelName, Member] = {}
    """Members by name; models.teacher and models.students name the ones in use."""
