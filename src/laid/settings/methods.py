"""Methods: section methods, a mapping of names to one of four kinds.

A method is of the kind of the root of what it extends: base, yarn and self_extend are there without being written,
anything else is trained.
"""

from typing import Annotated, Literal

from pydantic import Field

from laid.settings.base import Count, Label, Natural, NonNegative, Positive, Section, Share


class Lora(Section):
    """LoRA adapter (peft); null trains all weights of the language model."""

    rank: Count = 8
    """Rank of the adapter's matrices."""
    alpha: Positive = 16
    """The adapter is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Dropout on the adapter's input, in training."""
    targets: Annotated[list[str], Field(min_length=1)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    """Linear layers that get an adapter."""


class Alignment(Section):
    """Equation 7: which heads are compared, and how."""

    pairs: Annotated[list[Annotated[list[int], Field(min_length=2, max_length=2)]], Field(min_length=1)] = [
        [-1, -1]
    ]
    """Pairs of a student layer and a teacher layer; negative numbers count from the end. The paper: the last of each."""
    key_weights: Literal["shared", "own"] = "shared"
    """shared: keys use the weights w of the queries, as in the paper; own: keys have weights of their own, over KV heads."""
    rotation: Literal["before", "after"] = "before"
    """Compare queries and keys before or after RoPE turns them."""
    norm: Literal["mean", "frobenius"] = "mean"
    """mean: the mean square over tokens, heads and dimensions; frobenius: the sum, as eq. 7 prints it."""
    normalize: bool = True
    """Divide by the teacher's own mean square: the loss is then a relative error, and lambda means the same at any width."""
    projection: bool = False
    """Learn a map from the teacher's head_dim to the student's, where they differ."""


class Distance(Section):
    """Progressive distance weighting of eq. 7's tokens (laid.distill.schedule)."""

    strength: NonNegative = 0.0
    """Extra weight at the far end when training ends; 0 is off."""


class Gaps(Section):
    """Progressive position gaps between images."""

    draw: Literal["uniform", "log"] = "uniform"
    """How a sample's span is drawn, from its own to the present reach: uniform, or log, every doubling equally likely, which keeps short distances in practice."""
    reach: Natural = 0
    """Largest span in positions; 0 is off."""
    end: Share = 0.5
    """Progress at which they reach their full span."""


class Dilution(Section):
    """Progressive dilution: distractors stand for several images each (laid.distill.dilution)."""

    reach: Natural = 0
    """Images that a haystack weighs as much as, at most; 0 is off."""
    end: Share = 0.5
    """Progress at which they reach their full number."""


class Method(Section):
    """What all methods have."""

    extends: str | None = None
    """Another method: this one is of its kind, and takes its values where it sets none."""
    label: Label | None = None
    """What tables and figures call it; null: the label that laid has for it, or its name."""


class Base(Method):
    """The student as it comes."""


class Yarn(Method):
    """YaRN, through transformers' rope_parameters."""

    factor: Annotated[float, Field(ge=1)] = 1.0
    """Scale of positions; 1 changes nothing."""
    original_positions: Count | None = None
    """Trained positions; null takes the checkpoint's max_position_embeddings."""
    axes: Literal["all", "time", "image_base"] = "all"
    """all: transformers' own, every axis by its frequencies; time: the time section alone, which orders text and images; image_base: a token's base position by YaRN, its offset inside an image as trained."""


class SelfExtend(Method):
    """SelfExtend, in M-RoPE positions."""

    group: Count = 4
    """Positions per group, G. The default and that of window are those of the authors' README."""
    window: Count = 1024
    """Neighbour window, W, in positions."""
    axes: Literal["all", "text", "image_base"] = "all"
    """all: far keys by merged positions on every axis; text: far text keys only; image_base: merged base positions, offsets inside an image as they are."""


class TrainedMethod(Method):
    """A trained method: the lambdas of eq. 8, and what each of its parts needs."""

    lora: Lora | None = None
    lr: Positive | None = None
    """Peak learning rate; null takes training.lr."""
    epochs: Positive | None = None
    """Passes over the questions; null takes training.epochs."""
    lambda_sft: NonNegative = 1.0
    """Weight of the cross-entropy with the labels (eq. 8)."""
    lambda_kl: NonNegative = 0.0
    """Weight of L_KL (eq. 8)."""
    lambda_laid: NonNegative = 0.0
    """Weight of L_LAid (eq. 7, 8)."""
    temperature: Positive = 2.0
    """Temperature tau of L_KL."""
    alignment: Alignment = Alignment()
    distance: Distance = Distance()
    gaps: Gaps = Gaps()
    dilution: Dilution = Dilution()
    ordinary: Share = 0.0
    """Share of samples without gaps and dilution, so that short haystacks as they are stay in practice."""
    label_noise: Share = 0.0
    """Share of the training questions whose label is turned into the other of two: what wrong labels do. The teacher answers as ever."""
    gain: bool = False
    """Learn a gain of RoPE frequencies per query head (laid.distill.gain); folded into the weights on export."""


MethodName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
BUILT_IN: dict[str, type[Method]] = {"base": Base, "yarn": Yarn, "self_extend": SelfExtend}
AnyMethod = Base | Yarn | SelfExtend | TrainedMethod
