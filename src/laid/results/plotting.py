"""One style for all figures, what several of them draw, and how they are written: SVG, PNG and the drawn numbers."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from laid.io import dumps, update
from laid.results.names import SHIPPED, Names
from laid.results.render import percent

COLUMN, PAGE = 3.35, 7.0  # inches: one column and both columns of a two-column paper
FONT = 8  # points, the smallest size anywhere

# Okabe and Ito's colours, which colour-blind readers tell apart; marker, dash and hatch serve grey prints.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY, RULE = "#888888", {"color": "#555555", "linewidth": 0.7, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class Look:
    """Colour, marker, dash and hatch of one method or model."""

    color: str
    marker: str
    dash: Any = "-"
    hatch: str = ""


METHOD_LOOKS = {
    "base": Look(BLACK, "o", "-", ""),
    "yarn": Look(SKY, "^", (0, (4, 1.5)), "..."),
    "self_extend": Look(ORANGE, "v", (0, (3, 1, 1, 1)), "xxx"),
    "sft": Look(GREEN, "s", (0, (1, 1)), "|||"),
    "kd": Look(PURPLE, "D", (0, (6, 1, 1, 1)), "\\\\\\"),
    "laid": Look(RED, "p", "-", "///"),
    "laid_plus": Look(BLUE, "P", (0, (5, 1)), "+++"),
    "laid_wo_kl": Look(BLUE, "X", (0, (2, 1)), "ooo"),
    "laid_wo_laid": Look(ORANGE, "h", (0, (4, 2)), "---"),
    "laid_plus_noisy": Look(BLUE, "H", (0, (1, 2)), "**"),
    "laid_plus_noisy_wo_kl": Look(SKY, "8", (0, (2, 3)), "OO"),
}
MODEL_LOOKS = [
    Look(BLACK, "o"),
    Look(BLUE, "s", (0, (4, 1.5))),
    Look(RED, "^", (0, (1, 1))),
    Look(GREEN, "D", (0, (6, 1, 1, 1))),
]
TEACHER = Look(GREY, "*", (0, (1, 1)))
SERIES = [BLACK, BLUE, RED, GREEN, ORANGE, PURPLE, SKY]

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "legend.fontsize": FONT,
    "figure.titlesize": FONT + 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "svg.hashsalt": "laid",  # the same figure gives the same ids, hence the same bytes
    "svg.fonttype": "path",
}


class Looks(dict[str, Look]):
    """Method -> its look; one that the configuration no longer has is grey."""

    def __missing__(self, method: str) -> Look:
        return Look(GREY, "x", (0, (2, 2)))


def method_looks(names: Names) -> Looks:
    """The look of every method: of those that come with laid its own, of others one by their place among the others."""
    looks = Looks(METHOD_LOOKS)
    for i, method in enumerate(method for method in names if method not in SHIPPED):
        looks[method] = Look(SERIES[i % 7], "d<>*1"[i % 5], (0, (2 + i % 5, 1, 1, 1)), "/\\|-+xo"[i % 7] * 2)
    return looks


@dataclass
class Drawing:
    """A finished figure, its title and caption, and the numbers in it."""

    name: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this; the process's own matplotlib settings stay as they are."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, without pyplot's global state."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


# ------------------------------------------------------------------ what several figures draw


def curve(
    axes: Any, sizes: Sequence[float], shares: Sequence[float], look: Look, label: str | None, **more: Any
) -> None:
    """A line through shares (fractions), in percent."""
    more = {"color": look.color, "marker": look.marker, "linestyle": look.dash, **more}
    axes.plot(sizes, 100 * np.asarray(shares), label=label, **more)


def hover(
    axes: Any, xs: Sequence[float], shares: Sequence[float], texts: Iterable[str], size: float = 9
) -> None:
    """An unseen spot at every point that shows its text."""
    for x, share, text in zip(xs, shares, texts, strict=True):
        (spot,) = axes.plot([x], [100 * share], "o", markersize=size, alpha=0, zorder=4)
        tip(spot, text)


def bars(axes: Any, xs: Any, shares: Any, lows: Any, highs: Any, color: str, **more: Any) -> None:
    """Error bars of shares (fractions) from lows to highs, in percent."""
    shares, lows, highs = (100 * np.asarray(v, float) for v in (shares, lows, highs))
    below, above = (shares - lows).clip(0), (highs - shares).clip(0)
    axes.errorbar(xs, shares, [below, above], color=color, **{"linestyle": "", "elinewidth": 0.6, **more})


def tip(artist: Any, text: str) -> None:
    """Give a drawn point a hover text; `with_tips` turns it into an SVG title."""
    artist.set_gid("tip:" + text)


def point_tip(name: str, size: int, share: float, interval: Sequence[float]) -> str:
    return f"{name}, {size} images: {percent(share, interval)} %"


def image_axis(axes: Any, sizes: Sequence[int]) -> None:
    """A logarithmic axis of haystack sizes, each size a tick with its label."""
    axes.set_xscale("log")
    ticks = axes.set_xticks(sizes, [str(size) for size in sizes])
    for left, right in itertools.pairwise(range(len(sizes))):
        if sizes[right] < 1.7 * sizes[left]:  # such neighbours' labels would touch
            ticks[right].label1.set_horizontalalignment("left")
    axes.minorticks_off()
    axes.set_xlabel("Images in the haystack")


def log_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with a plain label at every power of ten: raised exponents would be smaller than 8 points."""
    axes.set_xscale("log")
    tens = range(math.ceil(math.log10(min(values))), math.floor(math.log10(max(values))) + 1)
    axes.set_xticks([10**k for k in tens], [f"{10**k:,}" for k in tens])


def legend_below(figure: Figure, panels: Any, columns: int, order: Sequence[str] = ()) -> None:
    """One legend of all labels, each once, below the panels; those in `order` last, in that order."""
    found: dict[str, Any] = {}
    for axes in np.ravel(panels):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    place = {label: i for i, label in enumerate(order)}
    labels = sorted(found, key=lambda label: place.get(label, -1))
    figure.legend(
        [found[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(columns, len(labels)),
    )


# ------------------------------------------------------------------ files


def save(drawing: Drawing, out: str | Path) -> list[Path]:
    """Write <name>.svg, .png (300 dpi) and .csv below `out`, where changed; returns the paths."""
    out = Path(out)
    paths = [out / f"{drawing.name}.{suffix}" for suffix in ("svg", "png", "csv")]
    with style():
        text = io.StringIO()
        drawing.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        update(paths[0], with_tips(text.getvalue()))
        image = io.BytesIO()
        drawing.figure.savefig(image, format="png", dpi=300, metadata={"Software": None})
        update(paths[1], image.getvalue())
    update(paths[2], drawing.data.to_csv(index=False, lineterminator="\n"))
    return paths


def write_captions(drawings: Sequence[Drawing], out: str | Path) -> None:
    """Write captions.json, the figures in their order with title and caption, for the reports."""
    captions = [{"name": d.name, "title": d.title, "caption": d.caption} for d in drawings]
    update(Path(out) / "captions.json", dumps(captions) + "\n")


def with_tips(svg: str) -> str:
    """Turn the groups marked by `tip` into groups with a <title>, which browsers show on hover."""
    parts = svg.split('<g id="tip:')
    out = [parts[0]]
    for part in parts[1:]:
        text, _, rest = part.partition('">')
        out.append(f'<g class="tip"><title>{text}</title>{rest}')
    return "".join(out)


def decimals(values: pd.Series, places: int = 6) -> pd.Series:
    """Numbers as the CSV files beside figures hold them; what has no end is "inf"."""
    return values.map(lambda value: f"{value:.{places}f}")
