"""Images and questions: sections data and haystacks."""

from typing import Annotated, Literal

from pydantic import Field

from laid.settings.base import Count, Distinct, Fraction, Natural, Place, Positive, Section, Share


class Rendered(Section):
    """Scenes drawn by laid, written in COCO's format."""

    train: Count = 3000
    """Number of images in train2017."""
    val: Count = 1500
    """Number of images in val2017."""
    canvas: Annotated[int, Field(ge=28, le=4096)] = 84
    """Pixels per side of a saved scene."""
    max_objects: Annotated[int, Field(ge=1, le=16)] = 4
    """A scene holds 1 to max_objects objects, each of another category."""
    seed: Natural = 0
    """Seed that the scenes are drawn with."""


class Download(Section):
    """COCO 2017 by HTTP: annotations first, images once the questions say which are needed."""

    base: Annotated[str, Field(pattern=r"^https?://")] = "http://images.cocodataset.org"
    """Address of COCO's server, or of a mirror that serves annotations/, zips/, train2017/ and val2017/."""
    images: Literal["auto", "single", "zip"] = "auto"
    """single: image by image; zip: whole splits; auto: the zip where more than half of a split is missing."""
    checksums: bool = True
    """Compare archives with COCO's published size and MD5, images with the archive's CRC-32. Set it to false for a mirror that packs its own archives."""
    connections: Annotated[int, Field(ge=1, le=64)] = 8
    """Images fetched in parallel."""
    retries: Annotated[int, Field(ge=0, le=100)] = 5
    """Attempts in a row that may gain nothing before laid gives up."""
    timeout: Positive = 60
    """Seconds without a byte after which a connection counts as broken."""


class Data(Section):
    """Where the COCO images and labels come from."""

    source: Literal["rendered", "local", "download"] = "rendered"
    """rendered: scenes that laid draws; local: a folder laid out like COCO; download: COCO 2017 by HTTP."""
    root: Place | None = None
    """With source local: the folder that holds annotations/, train2017/ and val2017/."""
    rendered: Rendered = Rendered()
    download: Download = Download()


class TrainQuestions(Section):
    """Training questions, on images of train2017."""

    questions: Annotated[int, Field(ge=2)] = 5000
    """Number of questions."""
    min_size: Count = 2
    """Fewest images in a haystack."""
    max_size: Count = 20
    """Most images in a haystack."""


class ValidationQuestions(Section):
    """Validation questions, for choosing hyper-parameters, on images of train2017 that no training question uses."""

    share: Fraction = 0.25
    """Share of the train2017 images that is kept for validation."""
    questions: Annotated[int, Field(ge=2)] = 200
    """Questions per size."""
    sizes: Annotated[Distinct[Count], Field(min_length=1)] = [5, 20, 50, 100]
    """Haystack sizes, in images."""


class TestQuestions(Section):
    """Test questions, on images of val2017."""

    questions: Annotated[int, Field(ge=2)] = 100
    """Questions per size."""
    sizes: Annotated[Distinct[Count], Field(min_length=1)] = [1, 2, 5, 10, 20, 50, 100, 150]
    """Haystack sizes, in images."""


class Haystacks(Section):
    """Visual Haystacks questions, built from COCO labels."""

    needles: Literal["single", "multi"] = "single"
    """single: one image holds the anchor; multi: two or three do."""
    seed: Natural = 0
    """Seed that the questions are drawn with."""
    hard_negatives: Share = 0.0
    """Probability that the target is taken from objects that some distractor holds, for "yes" and "no" alike."""
    vocabulary: Literal["all", "official"] = "all"
    """all: every category may be anchor and target; official: the 71 anchors and 32 targets of the official VHs_large files."""
    min_needles: Count = 1
    """A pair of anchor and target is used only where at least this many images answer yes, and as many no."""
    train: TrainQuestions = TrainQuestions()
    validation: ValidationQuestions = ValidationQuestions()
    test: TestQuestions = TestQuestions()
