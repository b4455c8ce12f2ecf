"""Figures from `laid analyse`: Figure 4 (heads over haystack size), spectra, scores over distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from laid.analysis.spectrum import series, slope
from laid.results import plotting
from laid.results.answers import read_records
from laid.results.names import LAID, Names
from laid.results.plotting import Drawing, Look, style

FORMAT = "laid-analysis/1"
SEEN = 2.0  # a needle head: its share of attention on the needle, over an even share, in geometric mean over sizes
# A global head: slope of log share over log size of at least this; -0.25 is a loss of half over a 16-fold haystack.
LEVEL = -0.25
STRONGEST = 3  # of each kind, that Figure 4 draws of a model; its CSV holds every head
SEED = "Trained models: the first seed of each."
TEACHER = Look("#666666", "*", (0, (1, 1)))
HEAD_COLORS = (plotting.BLUE, plotting.RED, plotting.GREEN, plotting.ORANGE, plotting.PURPLE, plotting.SKY)
MARKERS = "osD^vPXh"


Record = Mapping[str, Any]  # of `laid analyse`, one model


def load(folder: str | Path) -> dict[str, Record]:
    """The records of `laid analyse` in a folder, by model."""
    return read_records(folder, FORMAT)


def head_curves(record: Record, method: str) -> pd.DataFrame:
    """Every head's share of attention on the needle at its own row, and what the rule says of it: one row per head,
    with arrays over sizes in the columns images, share and even. Sizes of one image are left out.

    kind: "global", "local" (both needle heads) or "other".
    """
    entry = record["methods"][method]["needles"]
    kept = [i for i, size in enumerate(record["sizes"]) if size > 1] or list(range(len(record["sizes"])))
    sizes = [record["sizes"][i] for i in kept]
    shares = np.array([entry["share"][i] for i in kept])  # (sizes, layers, heads, rows)
    even = np.array([entry["uniform"][i] for i in kept])  # (sizes, rows)
    lifts = np.log(np.maximum(shares, 1e-9) / even[:, None, None]).mean(0)
    curves = []
    for layer in range(record["layers"]):
        for head in range(record["heads"]):
            row = int(lifts[layer, head].argmax())
            share = shares[:, layer, head, row]
            steep = slope(sizes, share) if len(sizes) > 1 else 0.0
            lift = math.exp(lifts[layer, head, row])
            kind = "other" if lift < SEEN else "global" if steep >= LEVEL else "local"
            about = {
                "layer": layer,
                "head": head,
                "row": record["rows"][row],
                "kind": kind,
                "slope": steep,
                "lift": lift,
            }
            curves.append({**about, "images": sizes, "share": share.tolist(), "even": even[:, row].tolist()})
    return pd.DataFrame(curves)


def strongest(curves: pd.DataFrame, most: int = STRONGEST) -> pd.DataFrame:
    """The `most` global and the `most` local needle heads that see most of the needle, in the order of layers."""
    needle = curves[curves["kind"] != "other"].sort_values("lift", ascending=False, kind="stable")
    return needle.groupby("kind").head(most).sort_index()


def build(
    records: Mapping[str, Record], teacher: str, students: Sequence[str], names: Names
) -> list[Drawing]:
    """Figure 4, the spectra and the scores over distance; nothing where the teacher or all students are missing."""
    shown = [name for name in students if name in records]
    if teacher not in records or not shown:
        return []
    with style():
        return [draw(records, teacher, shown, names) for draw in (figure4, spectra, distances)]


def figure4(records: Mapping[str, Record], teacher: str, students: Sequence[str], names: Names) -> Drawing:
    """Needle heads over haystack size: the teacher's, and each student's before and after."""
    figure = plotting.new_figure(plotting.PAGE, 3.7)
    panels = figure.subplots(1, 1 + len(students), sharey=True, squeeze=False)[0]
    drawn = []
    for name, axes in zip((teacher, *students), panels, strict=True):
        record = records[name]
        methods = ["base"] if name == teacher else [m for m in ("base", *LAID) if m in record["methods"]]
        places: dict[tuple[int, int], int] = {}
        for method in methods:
            curves = head_curves(record, method)
            drawn.append(curves.assign(student=name, method=method))
            for head in strongest(curves).itertuples():
                place = places.setdefault((head.layer, head.head), len(places))
                look = Look(HEAD_COLORS[place % len(HEAD_COLORS)], MARKERS[place % len(MARKERS)])
                _head_line(axes, name, method, head, look)
        even = head_curves(record, methods[0]).iloc[0]
        plotting.curve(
            axes, even.images, even.even, Look(plotting.GREY, "", (0, (1, 1))), None, linewidth=0.8
        )
        axes.set_title(name, loc="left", fontweight="bold")
        plotting.image_axis(axes, even.images)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), borderaxespad=0, title="layer.head")
    panels[0].set_ylabel("Attention on the needle (%)")
    panels[0].set_ylim(0, 102)
    columns = [
        "student",
        "method",
        "layer",
        "head",
        "row",
        "kind",
        "slope",
        "lift",
        "images",
        "share",
        "even",
    ]
    data = pd.concat(drawn).explode(["images", "share", "even"])[columns]
    places = {"slope": 4, "lift": 4, "share": 6, "even": 6}
    return Drawing(
        "figure4",
        "Figure 4. Heads that find the needle",
        "Normalised key activation per head: the softmax share of attention that falls on the needle image's keys, seen from"
        " the row (last token of the anchor's name, of the target's name, or of the prompt) where the head sees most of it."
        f" Drawn are needle heads, those with at least {SEEN:g} times an even share (dotted) in geometric mean over sizes,"
        f" at most the {STRONGEST} strongest of each kind."
        f" By the slope of log share over log size a head is global (solid line in the teacher: at least {LEVEL:g}, so that a"
        " 16-fold haystack costs less than half) or local (dashed: falling). Students: hollow before, filled after LAid."
        f" The first {_count(records[teacher])} questions of every test file. {SEED}",
        figure,
        data.assign(**{name: plotting.decimals(data[name], n) for name, n in places.items()}),
    )


def _head_line(axes: Any, name: str, method: str, head: Any, look: Look) -> None:
    before = method == "base"
    label = f"{head.layer}.{head.head} {head.kind}" + ("" if before else ", LAid")
    plotting.curve(
        axes, head.images, head.share, look, label, linestyle="-" if head.kind == "global" else (0, (4, 1.5)),
        markerfacecolor="white" if before else look.color, linewidth=0.9 if before else 1.5,
    )  # fmt: skip
    what = f"{name} {method}, layer {head.layer} head {head.head}"
    texts = (
        f"{what}, {size} images: {100 * v:.1f} %" for size, v in zip(head.images, head.share, strict=True)
    )
    plotting.hover(axes, head.images, head.share, texts, size=8)


def spectra(records: Mapping[str, Record], teacher: str, students: Sequence[str], names: Names) -> Drawing:
    """Energy over RoPE wavelengths per method, one panel a student; right, the low-frequency share of every model."""
    figure = plotting.new_figure(plotting.PAGE, 2.8)
    panels = figure.subplots(1, len(students) + 1, squeeze=False)[0]
    rows: list[tuple[str, ...]] = []
    reference, looks = records[teacher]["methods"]["base"]["spectrum"], plotting.method_looks(names)
    for student, axes in zip(students, panels, strict=False):
        lines = [(teacher, "base", reference, TEACHER, "teacher")]
        for method, entry in _methods(records[student], names):
            lines.append((student, method, entry["spectrum"], looks[method], names[method]))
        for name, method, part, look, label in lines:
            energy = mean_spectrum(part)
            plotting.curve(axes, part["wavelengths"], energy.cumsum(), look, label)
            if name != teacher or student == students[0]:
                share = [f"{v:.6f}" for v in (part["share"], *part["interval"])]
                rows += [
                    (name, method, f"{w:.4f}", f"{e:.6f}", *share)
                    for w, e in zip(part["wavelengths"], energy, strict=True)
                ]
        axes.axvline(reference["cut"], **plotting.RULE)
        plotting.log_axis(axes, reference["wavelengths"])
        axes.set_ylim(0, 102)
        axes.set_xlabel("RoPE wavelength (positions)")
        axes.set_title(student, loc="left", fontweight="bold")
    panels[0].set_ylabel("Energy up to it (%)")
    _share_dots(panels[-1], records, teacher, students, names)
    plotting.legend_below(figure, panels, columns=5)
    return Drawing(
        "spectrum",
        "Spectrum of attention over position differences",
        "The score of a question token and an image token, averaged over content, is a Fourier series in their position"
        " difference, one term per RoPE frequency (eq. 5, 6); shown is the energy of its terms, cumulated from short to long"
        f" wavelengths, mean over heads. Dashed: {reference['cut']:.0f} positions, the span of the longest training haystack."
        " Right: the share of energy at longer wavelengths (low frequencies), with 95 % intervals over questions."
        f" {reference['size']} images, {_count(records[teacher])} questions. {SEED}",
        figure,
        pd.DataFrame(rows, columns=["student", "method", "wavelength", "energy", "low_share", "low", "high"]),
    )


def mean_spectrum(part: Mapping[str, Any]) -> np.ndarray:
    """(frequencies,) energies that sum to one in every head, averaged over heads."""
    energy = np.array(part["real"]) ** 2 + np.array(part["imaginary"]) ** 2
    total = energy.sum(-1, keepdims=True)
    return np.divide(energy, total, out=np.zeros_like(energy), where=total > 0).mean((0, 1))


def _share_dots(
    axes: Any, records: Mapping[str, Record], teacher: str, students: Sequence[str], names: Names
) -> None:
    looks, places, labels = plotting.method_looks(names), [], []
    at = 0.0
    for name in (teacher, *students):
        for method, entry in _methods(records[name], names):
            part = entry["spectrum"]
            value, (low, high) = 100 * part["share"], (100 * v for v in part["interval"])
            look = TEACHER if name == teacher else looks[method]
            ends = [[max(0, value - low)], [max(0, high - value)]]
            axes.errorbar([value], [at], xerr=ends, color=look.color, marker=look.marker, capsize=2)
            (spot,) = axes.plot([value], [at], "o", markersize=9, alpha=0)
            plotting.tip(spot, f"{name} {names[method]}: {value:.1f} % [{low:.1f}, {high:.1f}]")
            places.append(at)
            labels.append(name if name == teacher else f"{name} {names[method].split(' (')[0]}")
            at += 1
        at += 0.6
    share = records[teacher]["methods"]["base"]["spectrum"]["share"]
    axes.axvline(100 * share, color=TEACHER.color, linewidth=0.7)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Low-frequency energy (%)")


def distances(
    records: Mapping[str, Record], teacher: str, students: Sequence[str], names: Names, most: int = 4
) -> Drawing:
    """The averaged score over position differences, for heads of the last layer: one row per model, one column per head."""
    shown, looks = [teacher, *students], plotting.method_looks(names)
    columns = min(most, max(records[name]["heads"] for name in shown))
    figure = plotting.new_figure(plotting.PAGE, 1.45 * len(shown) + 0.6)
    panels = figure.subplots(len(shown), columns, sharex=True, squeeze=False)
    rows: list[tuple[Any, ...]] = []
    for name, line in zip(shown, panels, strict=True):
        record = records[name]
        for head, axes in enumerate(line):
            if head >= record["heads"]:
                axes.set_visible(False)
                continue
            for method, entry in _methods(record, names):
                part = entry["spectrum"]
                c = np.array(part["real"][-1][head]) + 1j * np.array(part["imaginary"][-1][head])
                delta, scores = _binned(c, 2 * np.pi / np.array(part["wavelengths"]), 3.5 * part["cut"])
                look, label = looks[method], names[method]
                if name == teacher:
                    look, label = Look(TEACHER.color, ""), "teacher"
                axes.plot(delta, scores, color=look.color, linestyle=look.dash, label=label)
                rows += [
                    (name, method, record["layers"] - 1, head, f"{d:.2f}", f"{v:.6f}")
                    for d, v in zip(delta, scores, strict=True)
                ]
            axes.axvline(part["cut"], **plotting.RULE)
            axes.set_title(f"{name}, head {head}", loc="left")
        line[0].set_ylabel("Mean score")
    span = 3.5 * max(records[name]["methods"]["base"]["spectrum"]["cut"] for name in shown)
    for column in panels.T:
        lowest = [axes for axes in column if axes.get_visible()][-1]  # models have different numbers of heads
        plotting.log_axis(lowest, [1, span])
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("Position difference")
    plotting.legend_below(figure, panels, columns=5)
    return Drawing(
        "distance",
        "Attention over position difference",
        "Score of a question token and an image token over their position difference, averaged over content, for heads of the"
        " last layer (the series of RoPE terms that the spectrum shows), in bins of equal width on the logarithmic axis."
        f" Dashed: the span of the longest training haystack. {SEED}",
        figure,
        pd.DataFrame(rows, columns=["student", "method", "layer", "head", "difference", "score"]),
    )


def _binned(c: np.ndarray, theta: np.ndarray, span: float, bins: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """(differences, scores): the series at 1, 2, ... span, in means over bins of equal logarithmic width."""
    delta = np.arange(1, int(span) + 1)
    scores = series(c, theta, delta)
    place = np.minimum((np.log(delta) / np.log(span) * bins).astype(int), bins - 1)
    return tuple(
        np.array([values[place == b].mean() for b in np.unique(place)]) for values in (delta, scores)
    )


def _methods(record: Record, names: Names) -> list[tuple[str, dict[str, Any]]]:
    """A record's methods in the order of the tables."""
    return [(method, record["methods"][method]) for method in names.ordered(record["methods"])]


def _count(record: Record) -> int:
    return max(record["questions"].values())
