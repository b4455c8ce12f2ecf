"""Tests of the paper's claims: statements "this number is above (or below) that bound", on any source of curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from laid.io import read_json
from laid.results import alignability, heads
from laid.results.answers import Curves, Model
from laid.results.exports import shape_report
from laid.results.names import ablations
from laid.results.pope import read_pope_answers
from laid.results.render import listed
from laid.results.windows import (
    THRESHOLDS,
    bounds_interval,
    number,
    ratio_draws,
    reading_of_32,
    window,
)  # fmt: skip

SUPPORTED, NOT, UNDECIDED, NOT_MEASURED = "supported", "not supported", "undecided", "not measured"


@dataclass
class Statement:
    """One number that a claim says to lie above a bound, or below it, with its 95 % interval."""

    what: str
    value: float
    low: float
    high: float
    bound: float
    unit: str = "points"
    below: bool = False

    @property
    def holds(self) -> bool:
        """Whether the number itself, taken as exact, lies on the claimed side of the bound."""
        return self.value < self.bound if self.below else self.value > self.bound

    @property
    def verdict(self) -> str:
        """The same, with the interval: SUPPORTED, NOT or UNDECIDED."""
        above = SUPPORTED if self.low > self.bound else NOT if self.high < self.bound else UNDECIDED
        return {SUPPORTED: NOT, NOT: SUPPORTED}.get(above, above) if self.below else above

    def text(self) -> str:
        numbers = [_number(v, self.unit) for v in (self.value, self.low, self.high)]
        return f"{self.what}: {numbers[0]} [{numbers[1]}, {numbers[2]}]{'' if self.unit == 'times' else ' ' + self.unit}"


@dataclass
class Outcome:
    """What a test found on one source."""

    verdict: str
    statements: list[Statement] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    with_error: str | None = None  # the printed tables: the verdict if each figure came from 100 questions


NO_FIGURE = Outcome(NOT_MEASURED, remarks=["the paper prints no figure for it"])


def statement(
    source: Curves,
    what: str,
    keys: Sequence[Model],
    sizes: list[int],
    number: Callable[..., np.ndarray],
    **more: Any,
) -> Statement:
    """A statement about number(*curves), a function of arrays (n, sizes) that gives (n,); bound 0 unless told."""
    value = float(number(*(source.point(key, sizes) for key in keys))[0])
    draws = number(*(source.draws(key, sizes) for key in keys))
    low, high = np.quantile(draws, 0.025, method="lower"), np.quantile(draws, 0.975, method="higher")
    return Statement(what, value, float(low), float(high), **{"bound": 0.0, **more})


def conclude(
    source: Curves, statements: list[Statement], remarks: Sequence[str] = (), some: bool = False
) -> Outcome:
    """The verdict of all statements together; with `some`, one that holds is enough."""
    if not statements:
        return Outcome(
            NOT_MEASURED, remarks=[*remarks, "the models that the test needs are not among the cells"]
        )
    verdict = _together([s.verdict for s in statements], some)
    if source.printed:
        exact = _together([SUPPORTED if s.holds else NOT for s in statements], some)
        return Outcome(exact, statements, list(remarks), with_error=verdict)
    return Outcome(verdict, statements, list(remarks))


def _together(verdicts: list[str], some: bool) -> str:
    decisive, other = (SUPPORTED, NOT) if some else (NOT, SUPPORTED)
    if decisive in verdicts:
        return decisive
    return other if all(v == other for v in verdicts) else UNDECIDED


def _number(value: float, unit: str) -> str:
    if unit != "times":
        return f"{value:+.1f}"
    return "endless" if math.isinf(value) else f"{number(value)}x"


# ------------------------------------------------------------------ numbers, each from curves (n, sizes) to (n,)


def _points(curve: np.ndarray, base: np.ndarray) -> np.ndarray:
    return 100 * (curve - base).mean(axis=1)


def _gain(curve: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The paper's gain in percent; a resample in which base has no right answer counts as an infinite gain."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(100 * (curve / base - 1).mean(axis=1), nan=0.0, posinf=np.inf)


def _excess_gain(curve: np.ndarray, base: np.ndarray, edge: int) -> np.ndarray:
    """Gain over the first `edge` sizes minus gain over the others."""
    return _gain(curve[:, :edge], base[:, :edge]) - _gain(curve[:, edge:], base[:, edge:])


def _gain_difference(better: np.ndarray, worse: np.ndarray, base: np.ndarray) -> np.ndarray:
    return _gain(better, base) - _gain(worse, base)


def _growth(one: np.ndarray, other: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    return _slope(one - other, sizes)


def _drop(curve: np.ndarray) -> np.ndarray:
    return 100 * (curve[:, 0] - curve[:, -1])


def _slope(curve: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Least-squares slope of accuracy (points) per doubling of the images."""
    x = np.log2(np.asarray(sizes, float))
    x -= x.mean()
    return 100 * (curve @ x) / (x @ x)


def _times(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Quotient of losses in points; infinite where the denominator loses less than any table could print."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(under > 0.005, over / under, np.inf)


# ------------------------------------------------------------------ tests


def shrinkage(source: Curves) -> Outcome:
    teacher = (source.teacher, "base")
    found, remarks = [], []
    for student in source.students:
        key = (student, "base")
        sizes = source.common(key, teacher)
        what = f"{student} loses more than {source.teacher} from {sizes[0]} to {sizes[-1]} images"
        found.append(statement(source, what, [key, teacher], sizes, lambda s, t: _drop(s) - _drop(t)))
        remarks.append(f"{student} loses {_drop(source.point(key, sizes))[0]:.1f} points")
    remarks.append(
        f"{source.teacher} loses {_drop(source.point(teacher, source.common(teacher)))[0]:.1f} points"
    )
    return conclude(source, found, remarks)


def decay(source: Curves, times: float) -> Outcome:
    student, teacher = (source.students[-1], "base"), (source.teacher, "base")
    sizes = source.common(student, teacher)
    names = f"{student[0]} over {teacher[0]}"
    main = statement(
        source, f"{names}, loss per doubling of images", [student, teacher], sizes,
        lambda s, t: _times(-_slope(s, sizes), -_slope(t, sizes)), bound=times, unit="times",
    )  # fmt: skip
    readings = {"loss per doubling": main.value}
    curves = source.point(student, sizes), source.point(teacher, sizes)
    for i in range(1, len(sizes)):
        s, t = (curve[:, [0, i]] for curve in curves)
        readings[f"points lost from {sizes[0]} to {sizes[i]}"] = float(_times(_drop(s), _drop(t))[0])
        relative = _times(100 * (1 - s[:, 1] / s[:, 0]), 100 * (1 - t[:, 1] / t[:, 0]))
        readings[f"share lost from {sizes[0]} to {sizes[i]}"] = float(relative[0])
    near = {what: v for what, v in readings.items() if abs(v / times - 1) <= 0.05}
    best = min(readings, key=lambda what: (abs(readings[what] - times), what))
    remark = "; ".join(f"{what} {number(v)}x" for what, v in near.items())
    remarks = [
        f"readings within 5 % of {times:g}: {remark}" if near
        else f"no reading comes within 5 % of {times:g}; the nearest is {best}, {_number(readings[best], 'times')}"
    ]  # fmt: skip
    if math.isinf(main.value):
        remarks = [f"{teacher[0]} loses nothing over these sizes, so the ratio has no end"]
    outcome = conclude(source, [main], remarks)
    if source.printed and near:
        outcome.verdict = SUPPORTED
    return outcome


def no_help(source: Curves, methods: Sequence[str], margin: float) -> Outcome:
    found = []
    for student in source.students:
        for method in methods:
            if source.has(student, method):
                keys = [(student, method), (student, "base")]
                _, long = source.parts(*keys)
                what = f"{student} {method} minus base, mean over {listed(long)} images"
                found.append(statement(source, what, keys, long, _points, bound=margin, below=True))
    return conclude(source, found)


def short_biased(source: Curves, method: str) -> Outcome:
    found = []
    for student, keys in source.pairs(method):
        short, long = source.parts(*keys)
        gain = statement(source, f"{student} short gain", keys, short, _gain, unit="%")
        excess = partial(_excess_gain, edge=len(short))
        more = statement(
            source, f"{student} short gain minus long gain", keys, short + long, excess, unit="%"
        )
        found += [gain, more]
    return conclude(source, found)


def gains(source: Curves, method: str) -> Outcome:
    found = []
    for student, keys in source.pairs(method):
        for name, sizes in zip(("short", "long"), source.parts(*keys), strict=True):
            found.append(statement(source, f"{student} {name} gain", keys, sizes, _gain, unit="%"))
    return conclude(source, found)


def over_kd(source: Curves, method: str) -> Outcome:
    found, remarks = [], []
    for student, keys in source.pairs(method, source.kd):
        short, long = source.parts(*keys)
        sizes = [size for size in short + long if size <= 100]  # those of Figure 3
        growth = partial(_growth, sizes=sizes)
        what = f"{student} {method} minus KD, mean over {listed(sizes)} images"
        found.append(statement(source, what, keys, sizes, _points))
        what = f"{student} growth of that difference per doubling of images"
        found.append(statement(source, what, keys, sizes, growth))
        each = 100 * (source.point(keys[0], sizes) - source.point(keys[1], sizes))[0]
        by_size = (f"{d:+.1f} at {s}" for s, d in zip(sizes, each, strict=True))
        remarks.append(f"{student} by size: {', '.join(by_size)}")
    return conclude(source, found, remarks)


def ablation_order(source: Curves, order: Sequence[str]) -> Outcome:
    found = []
    for student in source.students:
        if not source.has(student, *order):
            continue
        windows = source.parts(*((student, method) for method in order))
        for name, sizes in zip(("short", "long"), windows, strict=True):
            for better, worse in itertools.pairwise(order):
                keys = [(student, better), (student, worse), (student, "base")]
                what = f"{student} {name} gain, {better} minus {worse}"
                found.append(statement(source, what, keys, sizes, _gain_difference, unit="%"))
    return conclude(source, found)


def each_part(source: Curves, method: str) -> Outcome:
    """Is `method` better on the long window than the same without any one part (<method>_wo_<part>)?"""
    found = []
    for student in source.students:
        own = [name for model, name in source.curves if model == student]
        for less in ablations(method, own):
            keys = [(student, method), (student, less)]
            _, long = source.parts(*keys)
            what = f"{student} {method} minus {less}, mean over {listed(long)} images"
            found.append(statement(source, what, keys, long, _points))
    return conclude(source, found)


def window_ratio(source: Curves, method: str, times: float) -> Outcome:
    found, remarks = [], []
    for student, keys in source.pairs(method):
        told = []
        for threshold in sorted({*THRESHOLDS, source.threshold}):
            value = window(source, keys[0], threshold) / window(source, keys[1], threshold)
            interval = bounds_interval(ratio_draws(source, *keys, threshold))
            told.append(f"{value.text('x')} at {threshold:g}")
            if threshold == source.threshold:
                what = f"{student} effective window at {threshold:g}, {method} over base ({value.text('x')})"
                # A ratio known only from below counts with its lower bound; "at least" takes the bound itself in.
                bound = float(np.nextafter(times, 0))
                found.append(Statement(what, value.low, interval.low, interval.high, bound, "times"))
        remarks.append(f"{student}: {', '.join(told)}")
    if source.printed and found:
        remarks.append(reading_of_32(times))
    return conclude(source, found, remarks, some=True)


def kept(source: Curves, method: str, margin: float) -> Outcome:
    found = []
    for student, keys in source.pairs(method):
        size = source.common(*keys)[:1]
        what = f"{student} {method} minus base at {size[0]} image{'s' if size[0] > 1 else ''}"
        found.append(statement(source, what, keys, size, _points, bound=-margin))
    return conclude(source, found)


def benchmark_kept(source: Curves, method: str, margin: float, root: Path | None = None) -> Outcome:
    """Accuracy on POPE's object questions (laid.results.pope), `method` minus base."""
    if source.printed or root is None:
        return NO_FIGURE
    folder = root / "cells"
    if not (folder / "pope_random").is_dir():
        missing = f"{folder}/pope_random is not there: run `snakemake --cores all pope`"
        return Outcome(NOT_MEASURED, remarks=[missing])
    answers, found = read_pope_answers(folder), []
    for student in source.students:
        if {(student, "base"), (student, method)} <= set(answers.models):
            what = f"{student} {method} minus base on POPE's questions"
            found.append(Statement(what, *(100 * v for v in answers.change(student, method)), bound=-margin))
    return conclude(source, found)


def low_frequencies(source: Curves, method: str, others: Sequence[str], root: Path | None = None) -> Outcome:
    """Low-frequency share of attention energy (laid.analysis.spectrum): is `method` nearer to the teacher than others?"""
    if source.printed or root is None:
        return NO_FIGURE
    if not (root / "analysis").is_dir():
        return Outcome(NOT_MEASURED, remarks=[f"{root / 'analysis'} is not there: run `laid analyse`"])
    records = heads.load(root / "analysis")
    found, remarks = [], []
    for student in source.students:
        if source.teacher not in records or method not in records.get(student, {"methods": {}})["methods"]:
            continue
        spectra = {m: entry["spectrum"] for m, entry in records[student]["methods"].items()}
        teacher = records[source.teacher]["methods"]["base"]["spectrum"]
        for other in others:
            if other in spectra:
                value, draws = (
                    100
                    * (np.abs(of(spectra[method]) - of(teacher)) - np.abs(of(spectra[other]) - of(teacher)))
                    for of in (lambda part: np.array(part["share"]), lambda part: np.array(part["draws"]))
                )
                low, high = np.quantile(draws, [0.025, 0.975])
                what = f"{student} distance to the teacher's share, {method} minus {other}"
                found.append(Statement(what, float(value), float(low), float(high), 0.0, below=True))
        told = (f"{m} {100 * part['share']:.1f}" for m, part in spectra.items())
        remarks.append(
            f"{student}, low-frequency energy in %, first seed: {', '.join(told)}; teacher {100 * teacher['share']:.1f}"
        )
    return conclude(source, found, remarks)


def alignable(source: Curves, level: float, root: Path | None = None) -> Outcome:
    """Whether equation 7 has a target (laid.analysis.alignability): its share of the best layer, at least `level` %."""
    if source.printed or root is None:
        return NO_FIGURE
    records = alignability.load(root / "alignability")
    found, remarks = [], []
    for student in (s for s in source.students if s in records):
        last = alignability.last(records[student])
        for side in alignability.SIDES:
            if best := alignability.best(records[student], side):
                layer, part = best
                what = f"{student} {side} explained by equation 7, layer {layer}"
                values = (100 * v for v in (part["share"], *part["interval"]))
                found.append(Statement(what, *values, bound=level, unit="%"))
            told = (
                f"{name} {100 * last[side][kind]['share']:z.1f} %"
                for kind, name in alignability.KINDS.items()
                if last[side][kind]
            )
            remarks.append(f"{student} {side}, last layer to last layer, as in the paper: {', '.join(told)}")
    return conclude(source, found, remarks)


def inference_cost(source: Curves, method: str, margin: float, root: Path | None = None) -> Outcome:
    """FLOPs and time of the exported student over base's, from bench/inference_cost.py; margin in %."""
    if source.printed or root is None:
        return NO_FIGURE
    found, remarks = [], []
    for student in source.students:
        remarks.append(f"{student}: {shape_report(root, student, method)[1]}")
        path = root / "inference_cost" / student / f"{method}.json"
        if not path.is_file():
            remarks.append(f"{path} is not there: run bench/inference_cost.py")
            continue
        record = read_json(path)
        for size, part in record["sizes"].items():
            what, flops = f"{student}, {size} images, {method} over base", part["flops"][1] / part["flops"][0]
            # Equal counts are what the claim says: the bound lies just above 1.
            found.append(Statement(f"{what}, FLOPs", flops, flops, flops, 1 + 1e-9, "times", below=True))
            bound = 1 + margin / 100
            found.append(
                Statement(
                    f"{what}, {record['clock']}", part["ratio"], *part["interval"], bound, "times", below=True
                )
            )
            milliseconds = " and ".join(f"{1000 * v:.2f}" for v in part["seconds"])
            remarks.append(
                f"{student}, {part['tokens']} tokens: {milliseconds} ms, {part['flops'][0]:.4g} FLOPs"
            )
        if not record["same_vision"]:
            remarks.append(f"{student}: the vision tower's weights differ from base's")
    return conclude(source, found, remarks)


TESTS: dict[str, Callable[..., Outcome]] = {
    test.__name__: test
    for test in (
        shrinkage, decay, no_help, short_biased, gains, over_kd, ablation_order, each_part, window_ratio, kept, benchmark_kept,
        low_frequencies, alignable, inference_cost,
    )
}  # fmt: skip
