"""A method's distance emphasis as a figure: weight over distance at five moments, and reach of gaps over progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from laid.distill.schedule import DistanceSchedule, reach
from laid.results import plotting
from laid.results.plotting import Drawing

MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DASHES = ("-", (0, (6, 1)), (0, (4, 1.5)), (0, (2, 1)), (0, (1, 1)))


def draw_schedule(method: Mapping[str, Any], span: float, name: str = "distance_schedule") -> Drawing | None:
    """Draw a method's `distance` and `gaps` settings, for tokens spread evenly over distances 0 to d_max.

    method: a trained method's section of the configuration. span: positions of a training sample without gaps.
    Returns the figure with its numbers as CSV rows; None for a method that uses neither.
    """
    schedule, gaps = DistanceSchedule(method["distance"]["strength"]), method["gaps"]
    far = max(span, gaps["reach"])
    if schedule.strength == 0 and far == span:
        return None
    distance = torch.linspace(0, 1, 101)
    weights = [schedule.weights(distance[None], p, d_max=1.0)[0] for p in MOMENTS]
    progress = np.linspace(0, 1, 101)
    spans = [reach(float(p), span, far, gaps["end"]) for p in progress]
    with plotting.style():
        figure = plotting.new_figure(plotting.PAGE, 2.4)
        left, right = figure.subplots(1, 2)
        for p, row, color, dash in zip(MOMENTS, weights, plotting.SERIES, _DASHES, strict=False):
            left.plot(distance, row, color=color, linestyle=dash, label=f"progress {p:g}")
        left.set(xlabel="M-RoPE distance to the answer / d_max", ylabel="weight (mean 1)", ylim=(0, None))
        left.legend()
        right.plot(progress, spans, color=plotting.BLUE)
        right.set(xlabel="training progress", ylabel="largest span (positions)", ylim=(0, None))
    rows = [["panel", "progress", "x", "y"]]
    rows += [
        ["weight", f"{p:g}", f"{d:.2f}", f"{w:.4f}"]
        for p, row in zip(MOMENTS, weights, strict=True)
        for d, w in zip(distance.tolist(), row.tolist(), strict=True)
    ]
    rows += [["reach", f"{p:.2f}", f"{p:.2f}", f"{s:.1f}"] for p, s in zip(progress, spans, strict=True)]
    caption = (
        f"Progressive distance emphasis. Left: weight of a token over its distance (strength {schedule.strength:g},"
        f" growing with progress). Right: the positions that a training sample of {span:.0f} may span once gaps are opened"
        f" (to {far:.0f}, up to progress {gaps['end']:g})."
    )
    return Drawing(name=name, title="Distance schedule", caption=caption, figure=figure, csv=rows)
