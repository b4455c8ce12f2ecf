"""How long prompts will be, before a question is drawn: from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from laid.plan.shapes import text_tokens
from laid.settings import Settings

# 415 COCO images under Qwen2.5-VL's default limits: 345.4 visual tokens on average, standard deviation 66; 50 tokens of
# template, prompt and question beside them (tests/plan/test_tokens.py measures them again).
VISUAL, SPREAD, TEXT = 345.4, 66.0, 50
DELIMITERS = 2  # <|vision_start|> and <|vision_end|> of each image
COCO = {"train2017": 118287, "val2017": 5000}


@dataclass(frozen=True)
class Lengths:
    """visual: visual tokens of an image on average; spread: their standard deviation; text: tokens beside images.

    pools: images that questions are drawn from, by use ("train", "test").
    """

    visual: float
    spread: float
    text: int
    pools: Mapping[str, int]

    def prompt(self, images: int) -> float:
        """Tokens of a prompt on average."""
        return self.text + images * (self.visual + DELIMITERS)

    def longest(self, images: int) -> tuple[int, int]:
        """(tokens, visual among them) of a prompt as long as is to be expected: three standard deviations above."""
        visual = round(images * self.visual + 3 * self.spread * images**0.5)
        return self.text + visual + DELIMITERS * images, visual

    def distinct(self, pool: str, draws: float) -> float:
        """Different images among `draws` from a pool."""
        size = self.pools[pool]
        return size * (1 - (1 - 1 / size) ** draws)


def lengths_of(config: Settings) -> Lengths:
    """From `data`, `family` and `plan`."""
    given, data = config.plan.images, config.data
    rendered = data.source == "rendered"
    counts = {"train2017": data.rendered.train, "val2017": data.rendered.val} if rendered else COCO
    visual, spread = VISUAL, SPREAD
    if rendered and not config.models.checkpoints:
        visual, spread = config.family.image_pixels / 784, 0.0
    held_out = config.haystacks.validation.share
    return Lengths(
        visual=given.tokens or visual,
        spread=spread if given.spread is None else given.spread,
        text=text_tokens(config) or TEXT,
        pools={
            "train": max(1, round(counts["train2017"] * (1 - held_out))),
            "test": counts["val2017"],
        },
    )
