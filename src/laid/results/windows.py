"""Effective windows: the largest haystack up to which accuracy stays at or above a threshold, measured and printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from laid.results import published
from laid.results.answers import Curves, Model, Results
from laid.results.published import PAPER_QUESTIONS, Published
from laid.results.render import Entry, Table, listed

THRESHOLDS = (0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Bounds:
    """A number known exactly (low == high), only from below (high infinite), or only from above (low 0)."""

    low: float
    high: float

    def __truediv__(self, other: Bounds) -> Bounds:
        return Bounds(*map(float, ratios(*(np.array([[b.low, b.high]]) for b in (self, other)))[0]))

    @property
    def exact(self) -> bool:
        return self.low == self.high

    def text(self, suffix: str = "") -> str:
        """As 15.2, ">= 150", "< 1", "5.1 to 9.0" or "unknown", each number with the suffix."""
        if self.exact:
            return number(self.low) + suffix
        if math.isinf(self.high):
            return f">= {number(self.low)}{suffix}" if self.low > 0 else "unknown"
        if self.low == 0:
            return f"< {number(self.high)}{suffix}"
        return f"{number(self.low)} to {number(self.high)}{suffix}"


def number(value: float) -> str:
    """Three significant digits without exponent: 1.52, 15.2, 152, 1520; trailing ".0" of whole numbers dropped."""
    value = round(value, 9)
    if value == int(value):
        return str(int(value))
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def bound_text(value: float) -> str:
    """A bound as CSV files hold it."""
    return "inf" if math.isinf(value) else f"{value:.4f}"


def interval_text(interval: Bounds, sizes: Sequence[float] | None = None) -> str:
    """As [12.1, 19.0]; an end outside the measured sizes as "< 1" or ">= 150", of a ratio as "?"."""
    below, above = (f"< {number(sizes[0])}", f">= {number(sizes[-1])}") if sizes else ("?", "?")
    low = number(interval.low) if interval.low > 0 else below
    high = number(interval.high) if math.isfinite(interval.high) else above
    if sizes and interval.low == sizes[-1]:
        return f"[{above}]"
    return f"[{low}, {high}]"


def effective_windows(sizes: Sequence[float], curves: np.ndarray, threshold: float) -> np.ndarray:
    """The effective windows of curves (n, sizes) as lows and highs (n, 2), interpolated over log size.

    A curve is followed from the smallest size to its first fall below the threshold; a later rise does not count.
    Above the threshold everywhere gives (last size, inf), below it at the first size (0, first size). `sizes` ascend;
    accuracies and threshold share a unit.
    """
    below = curves < threshold
    first = np.where(below.any(axis=1), below.argmax(axis=1), len(sizes))
    out = np.empty((len(curves), 2))
    out[first == 0] = 0.0, sizes[0]
    out[first == len(sizes)] = sizes[-1], math.inf
    inner = np.flatnonzero((first > 0) & (first < len(sizes)))
    after = first[inner]
    high, low = curves[inner, after - 1], curves[inner, after]
    logs = np.log(np.asarray(sizes, float))
    share = (high - threshold) / (high - low)
    out[inner] = np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1]))[:, None]
    return out


def farthest(source: Curves, model: Model) -> Curves:
    """The curves that follow a model to its largest size."""
    farther = source.farther
    return farther if farther is not None and model in farther.curves else source


def sizes_of(source: Curves, model: Model) -> list[int]:
    """All sizes that a model was measured at."""
    return list(farthest(source, model).curves[model])


def window(source: Curves, model: Model, threshold: float) -> Bounds:
    """A model's effective window in images, over all sizes that it has."""
    source = farthest(source, model)
    sizes = list(source.curves[model])
    return Bounds(*map(float, effective_windows(sizes, source.point(model, sizes), threshold)[0]))


def window_draws(source: Curves, model: Model, threshold: float) -> np.ndarray:
    """The window in every resample of `source`, as lows and highs (resamples, 2), over the sizes that it has."""
    sizes = list(source.curves[model])
    return effective_windows(sizes, source.draws(model, sizes), threshold)


def ratio_draws(source: Curves, model: Model, other: Model, threshold: float) -> np.ndarray:
    """The ratio of two models' windows in every resample, as lows and highs (resamples, 2); both are drawn together."""
    source = farthest(source, model)
    return ratios(*(window_draws(source, key, threshold) for key in (model, other)))


def ratios(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Bounds (n, 2) of the quotients of bounded numbers, row by row."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(np.isinf(under[:, 1]), 0.0, over[:, 0] / under[:, 1])
        high = np.where(under[:, 0] > 0, over[:, 1] / under[:, 0], math.inf)
    return np.stack([low, high], axis=1)


def bounds_interval(draws: np.ndarray) -> Bounds:
    """95 % percentile interval of bounded numbers (n, 2): the lower end from the lows, the upper from the highs."""
    low = np.quantile(draws[:, 0], 0.025, method="lower")
    high = np.quantile(draws[:, 1], 0.975, method="higher")
    return Bounds(float(low), float(high))


@dataclass(frozen=True)
class Window:
    """A model's window at a threshold, in images and in tokens and over base's, each with its interval."""

    images: Bounds
    interval: Bounds
    tokens: Bounds
    tokens_interval: Bounds
    ratio: Bounds
    ratio_interval: Bounds


def measure(source: Curves, model: Model, threshold: float, tokens: Mapping[int, float]) -> Window:
    """tokens: a prompt's mean tokens by size, for all of the model's sizes."""
    base, images = (model[0], "base"), window(source, model, threshold)
    interval = bounds_interval(window_draws(farthest(source, model), model, threshold))
    ratio_interval = bounds_interval(ratio_draws(source, model, base, threshold))
    in_tokens = (_in_tokens(bounds, list(tokens), list(tokens.values())) for bounds in (images, interval))
    return Window(images, interval, *in_tokens, images / window(source, base, threshold), ratio_interval)


def _in_tokens(images: Bounds, sizes: Sequence[int], tokens: Sequence[float]) -> Bounds:
    """Bounds in images as mean prompt tokens, linear in images between measured sizes; 0 and infinity stay. Unknown where one of
    the means is: a server need not tell."""
    if np.isnan(tokens).any():
        return Bounds(0.0, math.inf)
    ends = (images.low, images.high)
    return Bounds(*(v if v == 0 or math.isinf(v) else float(np.interp(v, sizes, tokens)) for v in ends))


def _measure_all(source: Curves, tokens: Mapping[int, float]) -> dict[Model, dict[float, Window]]:
    return {model: {t: measure(source, model, t, tokens) for t in THRESHOLDS} for model in source.curves}


def _data(found: dict[Model, dict[float, Window]], student: str) -> pd.DataFrame:
    """One row a model and threshold; student: what the first column is called."""
    names = ("images", "ci", "tokens", "tokens_ci", "ratio", "ratio_ci")
    rows = [
        {student: model[0], "method": model[1], "threshold": f"{threshold:g}"}
        | {
            f"{name}_{end}": bound_text(getattr(bounds, end))
            for name, bounds in zip(names, vars(windows).values(), strict=True)
            for end in ("low", "high")
        }
        for model, by_threshold in found.items()
        for threshold, windows in by_threshold.items()
    ]
    return pd.DataFrame(rows)


def continued(results: Results) -> str:
    """What a note says of windows that go on beyond the test sizes; nothing where none does."""
    if results.farther is None:
        return ""
    more = [size for size in results.farther.sizes if size not in results.sizes]
    return f", in the rows of Table 1 on through {listed(more)}"


def window_tables(results: Results) -> list[Table]:
    """Effective windows at several thresholds: in images, as ratios to base, and in tokens, with intervals."""
    whole = farthest(results, (results.teacher, "base"))
    tokens = {size: whole.cell(whole.teacher, "base", size).tokens_mean for size in whole.sizes}
    found = _measure_all(results, tokens)
    kinds = {
        "windows": lambda w, model: Entry(
            w.images.text(), interval_text(w.interval, sizes_of(results, model))
        ),
        "window_ratios": lambda w, model: (
            Entry("1x") if model[1] == "base" else Entry(w.ratio.text("x"), interval_text(w.ratio_interval))
        ),
        "window_tokens": lambda w, model: Entry(
            w.tokens.text(), interval_text(w.tokens_interval, [tokens[s] for s in sizes_of(results, model)])
        ),
    }
    titles = ("in images", "as ratios to base", "in tokens")
    extra = {
        "window_ratios": [
            "unknown: both windows lie beyond the sizes that were measured. ?: so does this end."
        ],
        "window_tokens": ["Tokens of a prompt as the teacher reads it, linear between the sizes measured."],
    }
    notes = [
        results.questions_note(),
        (
            "Effective window: the largest haystack up to which accuracy stays at or above the threshold,"
            f" interpolated over log size through {listed(results.sizes)} images{continued(results)}."
        ),
        "Half the answers are yes, so 0.5 is what guessing scores: a window at 0.5 says little.",
    ]
    return [
        Table(
            name,
            f"Effective windows {title}",
            ["Model", "Method", *(f"at {threshold:g}" for threshold in THRESHOLDS)],
            [
                [Entry(student), Entry(results.names[method])]
                + [entry(w, (student, method)) for w in by_threshold.values()]
                for (student, method), by_threshold in found.items()
            ],
            [*notes, *extra.get(name, [])],
            {row for row, (_, method) in enumerate(found) if method == "base"},
            legend="In brackets the 95 % interval: bootstrap over questions and seeds.",
            data=_data(found, "student") if name == "windows" else None,
        )
        for (name, entry), title in zip(kinds.items(), titles, strict=True)
    ]


def published_windows(resamples: int = 2000) -> Table:
    """The same effective windows read off the paper's own Table 1, and what they say of "3.2 times"."""
    source = Published(resamples, tables=("table1",), seed=32)
    sizes, tokens = list(source.curves["7B", "base"]), published.tokens()
    found = _measure_all(source, {size: tokens[size] for size in sizes})
    rows = []
    for (model, method), by_threshold in found.items():
        row = [Entry(model), Entry(source.names[method])]
        for w in by_threshold.values():
            text, detail = w.images.text(), interval_text(w.interval, sizes)
            if method != "base":
                text += f" ({w.ratio.text('x')})"
                detail += f", ratio {interval_text(w.ratio_interval)}"
            row.append(Entry(text, detail))
        rows.append(row)
    return Table(
        "windows_published",
        "Effective windows of the published Table 1, in images",
        ["Model", "Method", *(f"at {threshold:g}" for threshold in THRESHOLDS)],
        rows,
        [
            (
                "Source: the paper's printed Table 1; in parentheses the ratio to base. The CSV file beside holds the windows in"
                " tokens too, by the paper's Table 2. ?: this end lies beyond the printed sizes."
            ),
            reading_of_32(),
        ],
        {row for row, (_, method) in enumerate(found) if method == "base"},
        legend=f"In brackets the 95 % intervals if each figure came from {PAPER_QUESTIONS} questions, as the paper"
        " states: binomial draws, models drawn apart, for pairing was not published.",
        data=_data(found, "model"),
    )


def published_ratios() -> dict[tuple[str, float], Bounds]:
    """LAid's effective window over base's by (model, threshold), from the printed Table 1."""
    source = Published(tables=("table1",))
    return {
        (model, threshold): window(source, (model, "laid"), threshold)
        / window(source, (model, "base"), threshold)
        for model in source.students
        for threshold in THRESHOLDS
    }


def reading_of_32(claimed: float = 3.2) -> str:
    """Which thresholds give the abstract's "up to 3.2 times longer effective window" on the printed Table 1."""
    found = published_ratios()
    told = "; ".join(
        f"at {threshold:g} {' and '.join(f'{found[model, threshold].text()} ({model})' for model in ('7B', '3B'))}"
        for threshold in THRESHOLDS
    )
    near = [
        f"{t:g} ({m}, {r.text()})"
        for (m, t), r in found.items()
        if r.exact and abs(r.low / claimed - 1) < 0.05
    ]
    largest = {t: max(r.low for (_, at), r in found.items() if at == t) for t in THRESHOLDS}
    possible = [f"{t:g} (at least {number(v)})" for t, v in largest.items() if v <= claimed]
    return (
        f'"Up to {claimed:g} times": the printed figures give, as LAid over base, {told}. Only one reading comes within'
        f" 5 % of {claimed:g}: threshold {' and '.join(near) or 'none'}. As the largest over both students it can only be"
        f" meant at {' and '.join(possible) or 'no threshold'}, the level of Figure 1, where the sizes end before LAid falls."
    )
