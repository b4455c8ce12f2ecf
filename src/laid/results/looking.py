"""The picture of `laid ask --show`: the images that were looked at most, and how much every head looks at each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from laid.analysis.ask import Answer
from laid.data.images import open_image
from laid.io import update
from laid.results.plotting import PAGE, new_figure, style

SHOWN, ACROSS = 8, 4


def show(answer: Answer, images: Sequence[Path], question: str, out: Path) -> None:
    """Write the PNG `out`."""
    layers, heads, count = answer.shares.shape
    order = np.argsort(-answer.shares.max((0, 1)), kind="stable")[:SHOWN]
    lines = -(-len(order) // ACROSS)
    with style():
        figure = new_figure(PAGE, 2.1 * lines + 1.0 + 0.11 * layers * heads)
        figure.suptitle(_plain(f"{question}  {answer.text}"), wrap=True)
        above, below = figure.subfigures(2, 1, height_ratios=[2.1 * lines, 0.8 + 0.11 * layers * heads])
        panels = np.ravel(above.subplots(lines, ACROSS, squeeze=False))
        for axes in panels:
            axes.set_axis_off()
        for axes, k in zip(panels, order):
            axes.imshow(open_image(images[k]))
            layer, head, share, word = answer.head_of(int(k))
            where = f"layer {layer} head {head}\nat {word!r}"
            axes.set_title(_plain(f"{k + 1}: {images[k].name}\n{100 * share:.0f} %, {where}"))
        axes = below.subplots()
        drawn = axes.imshow(100 * answer.shares.reshape(-1, count), aspect="auto", cmap="viridis", vmin=0)
        axes.grid(False)
        axes.set(xlabel="Image", ylabel="Layer")
        axes.set_yticks(heads * (np.arange(layers) + 0.5) - 0.5, [str(k) for k in range(layers)])
        step = 1 if count <= 12 else 5 if count <= 50 else 25
        ticks = sorted({0, *range(step - 1, count, step), count - 1})
        axes.set_xticks(ticks, [str(k + 1) for k in ticks])
        below.colorbar(drawn, ax=axes, label="Attention, %")
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=200, metadata={"Software": None})
    update(out, content.getvalue())


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
