"""Figures from `laid analyse`: Figure 4 (heads over haystack size), spectra, scores over distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laid.analysis.spectrum import series, slope
from laid.errors import LaidError
from laid.io import read_json
from laid.results.plotting import (
    BLUE,
    GREEN,
    METHOD_LOOKS,
    ORANGE,
    PAGE,
    PURPLE,
    RED,
    SKY,
    Drawing,
    image_axis,
    log_axis,
    new_figure,
    style,
    tip,
)
from laid.results.tables import METHOD_NAMES

FORMAT = "laid-analysis/1"
SEEN = 2.0  # a needle head: its share of attention on the needle, over an even share, in geometric mean over sizes
# A global head: slope of log share over log size of at least this; -0.25 is a loss of half over a 16-fold haystack.
LEVEL = -0.25
STRONGEST = 3  # of each kind, that Figure 4 draws of a model; its CSV holds every head
SEED = "Trained models: the first seed of each."
TEACHER = ("#666666", "*", (0, (1, 1)))
HEAD_COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
MARKERS = "osD^vPXh"


def load(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The records of `laid analyse` in a folder, by model. Raises LaidError for a file that is none."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        if path.name.endswith(".cost.json") or path.name.startswith("."):
            continue
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            continue
        if path.stem != record["student"]:
            raise LaidError(
                f"{path}: holds the analysis of {record['student']!r}: moved or copied from there?"
            )
        found[record["student"]] = record
    return found


def head_curves(record: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """Every head's share of attention on the needle at its own row, and what the rule says of it.

    Sizes of one image are left out. kind: "global", "local" (both needle heads) or "other".
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
            curves.append(
                {
                    "layer": layer,
                    "head": head,
                    "row": record["rows"][row],
                    "sizes": sizes,
                    "share": share.tolist(),
                }
                | {"even": even[:, row].tolist(), "lift": lift, "slope": steep, "kind": kind}
            )
    return curves


def strongest(curves: Sequence[dict[str, Any]], most: int = STRONGEST) -> list[dict[str, Any]]:
    """The `most` global and the `most` local needle heads that see most of the needle, in the order of layers."""
    kept = []
    for kind in ("global", "local"):
        kept += sorted((c for c in curves if c["kind"] == kind), key=lambda c: -c["lift"])[:most]
    return sorted(kept, key=lambda c: (c["layer"], c["head"]))


def build(records: Mapping[str, dict[str, Any]], teacher: str, students: Sequence[str]) -> list[Drawing]:
    """Figure 4, the spectra and the scores over distance; nothing where the teacher or all students are missing."""
    shown = [name for name in students if name in records]
    if teacher not in records or not shown:
        return []
    with style():
        return [draw(records, teacher, shown) for draw in (figure4, spectra, distances)]


def figure4(records: Mapping[str, dict[str, Any]], teacher: str, students: Sequence[str]) -> Drawing:
    """Needle heads over haystack size: the teacher's, and each student's before and after."""
    figure = new_figure(PAGE, 3.7)
    panels = figure.subplots(1, 1 + len(students), sharey=True, squeeze=False)[0]
    rows: list[list[str]] = []
    for name, axes in zip((teacher, *students), panels, strict=True):
        record = records[name]
        methods = ["base"] if name == teacher else [m for m in ("base", "laid") if m in record["methods"]]
        colors: dict[tuple[int, int], str] = {}
        for method in methods:
            curves = head_curves(record, method)
            for curve in curves:
                rows += _rows(name, method, curve)
            for curve in strongest(curves):
                key = (curve["layer"], curve["head"])
                color = colors.setdefault(key, HEAD_COLORS[len(colors) % len(HEAD_COLORS)])
                _head_line(axes, name, method, curve, color, MARKERS[list(colors).index(key) % len(MARKERS)])
        even = head_curves(record, methods[0])[0]
        axes.plot(
            even["sizes"],
            [100 * v for v in even["even"]],
            color="#888888",
            linewidth=0.8,
            linestyle=(0, (1, 1)),
        )
        axes.set_title(name, loc="left", fontweight="bold")
        image_axis(axes, even["sizes"])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), borderaxespad=0, title="layer.head")
    panels[0].set_ylabel("Attention on the needle (%)")
    panels[0].set_ylim(0, 102)
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
        [
            ["student", "method", "layer", "head", "row", "kind", "slope", "lift", "images", "share", "even"],
            *rows,
        ],
    )


def _head_line(axes: Any, name: str, method: str, curve: dict[str, Any], color: str, marker: str) -> None:
    look = "-" if curve["kind"] == "global" else (0, (4, 1.5))
    before = method == "base"
    label = f"{curve['layer']}.{curve['head']} {curve['kind']}" + ("" if method == "base" else ", LAid")
    axes.plot(
        curve["sizes"], [100 * v for v in curve["share"]], color=color, linestyle=look, marker=marker, label=label,
        markerfacecolor="white" if before else color, linewidth=0.9 if before else 1.5,
    )  # fmt: skip
    for size, share in zip(curve["sizes"], curve["share"], strict=True):
        (spot,) = axes.plot([size], [100 * share], "o", markersize=8, alpha=0)
        tip(
            spot,
            f"{name} {method}, layer {curve['layer']} head {curve['head']}, {size} images: {100 * share:.1f} %",
        )


def _rows(name: str, method: str, curve: dict[str, Any]) -> list[list[str]]:
    return [
        [name, method, str(curve["layer"]), str(curve["head"]), curve["row"], curve["kind"]]
        + [f"{curve['slope']:.4f}", f"{curve['lift']:.4f}", str(size), f"{share:.6f}", f"{even:.6f}"]
        for size, share, even in zip(curve["sizes"], curve["share"], curve["even"], strict=True)
    ]


def spectra(records: Mapping[str, dict[str, Any]], teacher: str, students: Sequence[str]) -> Drawing:
    """Energy over RoPE wavelengths per method, one panel a student; right, the low-frequency share of every model."""
    figure = new_figure(PAGE, 2.8)
    panels = figure.subplots(1, len(students) + 1, squeeze=False)[0]
    rows: list[list[str]] = []
    reference = records[teacher]["methods"]["base"]["spectrum"]
    for student, axes in zip(students, panels, strict=False):
        lines = [(teacher, "base", reference, *TEACHER)]
        for method, entry in _methods(records[student]):
            look = METHOD_LOOKS[method]
            lines.append((student, method, entry["spectrum"], look.color, look.marker, look.dash))
        for name, method, part, color, marker, dash in lines:
            energy = mean_spectrum(part)
            label = "teacher" if name == teacher else METHOD_NAMES[method]
            axes.plot(
                part["wavelengths"],
                100 * energy.cumsum(),
                color=color,
                marker=marker,
                linestyle=dash,
                label=label,
            )
            if name != teacher or student == students[0]:
                rows += [
                    [
                        name,
                        method,
                        f"{w:.4f}",
                        f"{e:.6f}",
                        f"{part['share']:.6f}",
                        *(f"{v:.6f}" for v in part["interval"]),
                    ]
                    for w, e in zip(part["wavelengths"], energy, strict=True)
                ]
        axes.axvline(reference["cut"], color="#555555", linewidth=0.7, linestyle=(0, (4, 3)))
        log_axis(axes, part["wavelengths"])
        axes.set_ylim(0, 102)
        axes.set_xlabel("RoPE wavelength (positions)")
        axes.set_title(student, loc="left", fontweight="bold")
    panels[0].set_ylabel("Energy up to it (%)")
    _share_dots(panels[-1], records, teacher, students)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return Drawing(
        "spectrum",
        "Spectrum of attention over position differences",
        "The score of a question token and an image token, averaged over content, is a Fourier series in their position"
        " difference, one term per RoPE frequency (eq. 5, 6); shown is the energy of its terms, cumulated from short to long"
        f" wavelengths, mean over heads. Dashed: {reference['cut']:.0f} positions, the span of the longest training haystack."
        " Right: the share of energy at longer wavelengths (low frequencies), with 95 % intervals over questions."
        f" {reference['size']} images, {_count(records[teacher])} questions. {SEED}",
        figure,
        [["student", "method", "wavelength", "energy", "low_share", "low", "high"], *rows],
    )


def mean_spectrum(part: Mapping[str, Any]) -> np.ndarray:
    """(frequencies,) energies that sum to one in every head, averaged over heads."""
    energy = np.array(part["real"]) ** 2 + np.array(part["imaginary"]) ** 2
    total = energy.sum(-1, keepdims=True)
    return np.divide(energy, total, out=np.zeros_like(energy), where=total > 0).mean((0, 1))


def _share_dots(
    axes: Any, records: Mapping[str, dict[str, Any]], teacher: str, students: Sequence[str]
) -> None:
    places, labels = [], []
    at = 0.0
    for name in (teacher, *students):
        for method, entry in _methods(records[name]):
            part = entry["spectrum"]
            value, (low, high) = 100 * part["share"], (100 * v for v in part["interval"])
            look = METHOD_LOOKS[method]
            color, marker = (TEACHER[0], TEACHER[1]) if name == teacher else (look.color, look.marker)
            axes.errorbar(
                [value],
                [at],
                xerr=[[max(0, value - low)], [max(0, high - value)]],
                color=color,
                marker=marker,
                capsize=2,
            )
            (spot,) = axes.plot([value], [at], "o", markersize=9, alpha=0)
            tip(spot, f"{name} {METHOD_NAMES[method]}: {value:.1f} % [{low:.1f}, {high:.1f}]")
            places.append(at)
            labels.append(name if name == teacher else f"{name} {METHOD_NAMES[method].split(' (')[0]}")
            at += 1
        at += 0.6
    axes.axvline(
        100 * records[teacher]["methods"]["base"]["spectrum"]["share"], color=TEACHER[0], linewidth=0.7
    )
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Low-frequency energy (%)")


def distances(
    records: Mapping[str, dict[str, Any]], teacher: str, students: Sequence[str], most: int = 4
) -> Drawing:
    """The averaged score over position differences, for heads of the last layer: a row a model, a column a head."""
    names = [teacher, *students]
    columns = min(most, max(records[name]["heads"] for name in names))
    figure = new_figure(PAGE, 1.45 * len(names) + 0.6)
    panels = figure.subplots(len(names), columns, sharex=True, squeeze=False)
    rows: list[list[str]] = []
    for name, line in zip(names, panels, strict=True):
        record = records[name]
        for head, axes in enumerate(line):
            if head >= record["heads"]:
                axes.set_visible(False)
                continue
            for method, entry in _methods(record):
                part = entry["spectrum"]
                c = np.array(part["real"][-1][head]) + 1j * np.array(part["imaginary"][-1][head])
                delta, curve = _binned(c, 2 * np.pi / np.array(part["wavelengths"]), 3.5 * part["cut"])
                look = METHOD_LOOKS[method]
                color, dash = (TEACHER[0], "-") if name == teacher else (look.color, look.dash)
                label = "teacher" if name == teacher else METHOD_NAMES[method]
                axes.plot(delta, curve, color=color, linestyle=dash, label=label)
                rows += [
                    [name, method, str(record["layers"] - 1), str(head), f"{d:.2f}", f"{v:.6f}"]
                    for d, v in zip(delta, curve, strict=True)
                ]
            axes.axvline(part["cut"], color="#555555", linewidth=0.7, linestyle=(0, (4, 3)))
            axes.set_title(f"{name}, head {head}", loc="left")
        line[0].set_ylabel("Mean score")
    span = 3.5 * max(records[name]["methods"]["base"]["spectrum"]["cut"] for name in names)
    for column in panels.T:
        lowest = [axes for axes in column if axes.get_visible()][-1]  # models have different numbers of heads
        log_axis(lowest, [1, span])
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("Position difference")
    found: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=5)
    return Drawing(
        "distance",
        "Attention over position difference",
        "Score of a question token and an image token over their position difference, averaged over content, for heads of the"
        " last layer (the series of RoPE terms that the spectrum shows), in bins of equal width on the logarithmic axis."
        f" Dashed: the span of the longest training haystack. {SEED}",
        figure,
        [["student", "method", "layer", "head", "difference", "score"], *rows],
    )


def _binned(c: np.ndarray, theta: np.ndarray, span: float, bins: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """(differences, scores): the series at 1, 2, ... span, in means over bins of equal logarithmic width."""
    delta = np.arange(1, int(span) + 1)
    curve = series(c, theta, delta)
    place = np.minimum((np.log(delta) / np.log(span) * bins).astype(int), bins - 1)
    kept = np.unique(place)
    return np.array([delta[place == b].mean() for b in kept]), np.array(
        [curve[place == b].mean() for b in kept]
    )


def _methods(record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A record's methods in the order of the tables."""
    return sorted(record["methods"].items(), key=lambda item: list(METHOD_NAMES).index(item[0]))


def _count(record: Mapping[str, Any]) -> int:
    return max(record["questions"].values())
