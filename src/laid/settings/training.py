"""Post-training: sections training and teacher_cache."""

from typing import Annotated, Literal

from pydantic import Field

from laid.settings.base import Count, Distinct, Natural, NonNegative, Positive, Section

NOT_ASKED = (
    "a student in DeepSpeed's pieces is not asked on the way: set training.parallel to fsdp2, or this to null"
)


class Validation(Section):
    """Held-out questions, answered as training goes (laid.training.validation)."""

    every: Count = 100
    """Steps from one validation to the next; one more follows the last step."""
    sizes: Distinct[Count] | None = None
    """In the workflow: the sizes of haystacks.validation that are asked; null: all of them. `laid train` takes files, `laid distill` its --eval."""
    questions: Count = 100
    """Questions of each file, its first ones. Yes and no are told by the answer's logits, whatever evaluation.scoring says."""
    export: Literal["last", "best"] = "last"
    """Which student a run leaves: that of the last step, or that of the validation with the highest accuracy (then likelihood, then the earliest)."""
    patience: Count | None = None
    """Training ends after so many validations in a row without a better one; null: never before its last step."""


class Training(Section):
    """Post-training, shared by all trained methods."""

    epochs: Positive = 10
    """Passes over the training questions (the paper: 10)."""
    batch_size: Count = 8
    """Questions per optimiser step, over all devices (the paper: 8)."""
    per_device_batch: Count = 1
    """Questions per forward pass and device; the rest is accumulated."""
    tokens_per_pass: Natural = 0
    """So many tokens are read in one forward pass, of as many times per_device_batch questions as they hold, one behind the other without padding, each attending to itself alone. The losses stay those of per_device_batch questions each, to float tolerance. 0: no more than per_device_batch."""
    lr: Positive = 1e-5
    """Peak learning rate of the student (the paper: 1e-5)."""
    lr_weights: Positive = 1e-4
    """Peak learning rate of LAid's head weights w (the paper: 1e-4)."""
    lr_gain: Positive = 1e-4
    """Peak learning rate of the RoPE gain."""
    warmup: Annotated[float, Field(ge=0, le=0.9)] = 0.05
    """Share of steps with rising learning rate (the paper: 0.05)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up."""
    weight_decay: NonNegative = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """Norm that gradients are clipped to."""
    train_vision: bool = False
    """Train the vision tower too: features are then computed in every step. Of a frozen tower they are computed once per image."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and activations."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, for long inputs."""
    parallel: Literal["ddp", "fsdp2", "zero3"] = "ddp"
    """How the GPUs of resources.train.gpu share a training run: the file of configs/accelerate/ that the workflow launches it with. ddp: each holds the whole student; fsdp2: each holds a part of weights, gradients and optimiser state; zero3: the same by DeepSpeed, installed with laid[zero3]. Results agree to float tolerance."""
    checkpoint_minutes: NonNegative = 5
    """Minutes between checkpoints to resume from; one is also written on SIGTERM and SIGINT. 0: none."""
    log_every: Count = 10
    """Steps between lines of log.jsonl."""
    validation: Validation | None = None
    """Held-out questions, asked as training goes; null: none."""
    trackers: Distinct[Literal["tensorboard", "wandb", "mlflow", "trackio", "dvclive"]] = []
    """Experiment trackers that also get those lines, through Accelerate. Install them yourself."""


class TeacherCache(Section):
    """What is kept of the teacher's one pass over the training questions."""

    layers: list[int] = [-1]
    """Teacher layers whose queries and keys are kept; negative numbers count from the end."""
    dtype: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """Number format of queries and keys on disk; logits are exact. float8: e4m3 with a power of two per token and head, half of bfloat16's size; its relative error is written to the index."""
