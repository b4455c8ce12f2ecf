"""Conversations of every kind over the rendered images, for tests of training, caching and evaluation."""

from __future__ import annotations

import json
from pathlib import Path


def write_chats(
    file: Path, coco_root: Path, count: int = 16, needles: bool = False, split="train2017"
) -> Path:
    """One word, a sentence, two turns with an image in the second, a long answer before which nothing is shown."""
    images = sorted(p.relative_to(coco_root).as_posix() for p in (coco_root / split).iterdir())
    entries = []
    for k in range(count):
        shown = images[3 * k : 3 * k + 2 + k % 2]
        tags = "<image>" * len(shown)
        turns = [
            [tags + "Is there a star?", "yes"],
            [tags + "What is there?", "There is a star, and a circle " + "beside a moon " * (k % 3) + "."],
            ["<image>" * (len(shown) - 1) + "What is there?", "A star.", "And <image> here?", "a circle and a hexagon"],
            ["Name three shapes.", "star circle hexagon " * 3],
        ][k % 4]  # fmt: skip
        said = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(turns)]
        shown = [] if k % 4 == 3 else shown
        entries.append({"id": f"c{k}", "conversations": said, "images": shown})
        if needles and shown:
            entries[-1]["needles"] = [0]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file
