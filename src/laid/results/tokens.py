"""Table 2 before anything runs: prompt tokens and M-RoPE positions of the test questions, from image sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from laid.data.coco import CocoSplit
from laid.data.haystacks import questions_of_size
from laid.models.processing import Processor
from laid.results import published
from laid.results.render import Entry, Table


def lengths(
    processor: Processor, coco: CocoSplit, haystacks: Mapping[str, Any], sizes: Sequence[int]
) -> dict[int, np.ndarray]:
    """size -> (questions, 2): tokens and M-RoPE positions of each test question that `haystacks` (the configuration's
    section) asks for. Images are not opened: their annotated sizes say how many visual tokens they become.

    Raises LaidError where the images cannot fill a size.
    """
    grids = {
        image.path: processor.grid(image.width, image.height, image.path) for image in coco.images.values()
    }
    found = {}
    for size in sizes:
        prompts = (
            processor.encoder.encode(q.text, [grids[path] for path in q.needles + q.distractors])
            for q in questions_of_size(haystacks, coco, size)
        )
        found[size] = np.array([(len(prompt.ids), prompt.span) for prompt in prompts])
    return found


def table(found: Mapping[int, np.ndarray], coco: CocoSplit) -> Table:
    """Means beside the paper's Table 2, with the standard error of the tokens and the difference in percent."""
    printed = published.tokens()
    rows = []
    for size, counts in sorted(found.items()):
        tokens, positions = counts.mean(axis=0)
        error = counts[:, 0].std(ddof=1) / len(counts) ** 0.5 if len(counts) > 1 else 0.0
        row = [str(size), f"{tokens:.2f}", f"{error:.2f}", f"{positions:.2f}"]
        paper = printed.get(size)
        rows.append(
            row + (["", ""] if paper is None else [f"{paper:.2f}", f"{100 * (tokens / paper - 1):+.2f}"])
        )
    questions = max(len(counts) for counts in found.values())
    return Table(
        "tokens",
        "Prompt length over images in the haystack",
        ["Images", "Tokens", "Standard error", "M-RoPE positions", "Paper's tokens", "Difference (%)"],
        [[Entry(value) for value in row] for row in rows],
        [
            f"{questions} questions a size, over {len(coco.images)} images of {coco.root}, {coco.name}.",
            "M-RoPE moves on by the longer side of an image's merged patches, not by its tokens.",
        ],
        names=0,
        data=pd.DataFrame(
            rows,
            columns=["images", "tokens", "standard_error", "positions", "paper_tokens", "difference_pct"],
        ),
    )
