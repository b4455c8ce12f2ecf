"""What is measured and shown: sections evaluation, analysis, beyond, pope, tables and sweep."""

from typing import Annotated, Literal

from pydantic import Field

from laid.settings.base import Count, Distinct, Fraction, Natural, NonNegative, Section

Names = Annotated[Distinct[str], Field(min_length=1)]


class Evaluation(Section):
    """How models are evaluated."""

    shard: Literal["model", "cell"] = "model"
    """model: one job evaluates all sizes of a student and method; cell: one job per size (for large models)."""
    scoring: Literal["logits", "generate"] = "logits"
    """logits: yes or no by the answer position's logits; generate: by the words of a generated answer, as the official runner scores."""
    order_seed: Natural = 0
    """Seed of the order of images in a haystack (the official runner shuffles without a seed)."""
    batch_tokens: Count = 16384
    """Prompt tokens per forward pass."""
    max_new_tokens: Count = 16
    """Length of a generated answer."""
    chunk_tokens: Natural = 0
    """Prompts longer than this are read in chunks of this many tokens with a key-value cache; 0 reads them whole."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and activations."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation."""
    feature_cache_gb: NonNegative = 8
    """Memory for visual features that are kept, in GiB."""
    keep_features: bool = False
    """Keep visual features on disk too, in <results>/<scale>/features, where every job with the same vision tower finds them; a rule of its own (`laid features`) computes them first. For photographs and a GPU, which else waits for images in every job; `laid plan` tells how much disk that is."""


class Analysis(Section):
    """What `laid analyse` looks into: attention on the needle, and spectra of position differences; and what `laid alignability` reads."""

    questions: Count = 20
    """Questions per haystack size: the first ones of each test file."""
    spectrum_size: Count = 100
    """Images in the haystacks whose spectrum is taken; the nearest test size is used."""
    alignment_questions: Count = 240
    """Questions of `laid alignability`, the first ones of its file: every second one fits mixtures of the teacher's heads, the others measure them."""
    methods: Names = ["base"]
    """Methods that are looked into, of those that a student's tables have."""


class Beyond(Section):
    """What goes beyond the paper: where accuracy ends, and why windows shrink (`snakemake beyond`)."""

    table: bool = False
    """Measure the rows of Table 1 at these sizes too, in a table of their own; windows then continue over them."""
    sizes: Annotated[Distinct[Count], Field(min_length=1)] = [200, 300, 500]
    """Images per haystack, beyond the test sizes, taken from the test images."""
    questions: Count = 100
    """Questions per size, also where distance and dilution are taken apart (the first of each test file)."""
    few: Count = 5
    """Images whose positions are stretched, and whose positions more images are packed into; a test size."""
    methods: Names = ["base"]
    """Methods that are measured, of those that a student's tables have."""


class Pope(Section):
    """Object questions about single images (POPE, Li et al. 2023), before and after distillation: does the student keep its ability on single images? (`snakemake pope`)"""

    images: Count = 500
    """Images that are asked about, from val2017; POPE takes 500."""
    objects: Count = 3
    """Objects of an image that are asked about, and as many that it does not hold; POPE takes 3."""
    seed: Natural = 0
    """Seed of the images, the objects and the order."""
    wording: Literal["pope", "haystack"] = "pope"
    """pope: "Is there a dog in the image?" and nothing else, as POPE asks. haystack: the official Visual Haystacks prompt and its question on one image, with another object of the image as anchor: the small-scale family was taught these words only."""
    methods: Names = ["base"]
    """Methods that are measured, of those that a student's tables have; base shows the student before training."""


class Tables(Section):
    """Which cells stand in which table, and how they are summarised."""

    methods: Names = ["base"]
    """Rows of each student in Table 1, in this order. base comes first: gains are relative to it."""
    ablations: Names = ["base"]
    """Rows of Table 3, in this order. base comes first."""
    table3_student: Literal["first", "last"] = "first"
    """The student in Table 3: the first of models.students, as in the paper, or the last."""
    omit: Distinct[Count] = [2]
    """Test sizes that are measured but have no column in Tables 1 and 2, as in the paper."""
    table3_omit: Distinct[Count] = [2, 150]
    """The same for Table 3, which the paper ends at 100 images."""
    short_max: Count = 20
    """Largest size that counts as a short window; larger ones count as long."""
    threshold: Fraction = 0.8
    """Accuracy, as a fraction, at which the effective window beside Table 1 ends."""


class Sweep(Section):
    """Which part of a method does what (`snakemake sweep`, configs/sweep.yaml): methods trained with several seeds and measured on the validation questions."""

    methods: Distinct[str] = []
    """Methods of section methods that are swept, in the order of the table."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    """Training seeds per method."""
    students: Names | None = None
    """Students that the methods are trained on; null: all."""
    against: Distinct[str] = []
    """Methods that each of them is tested against."""
