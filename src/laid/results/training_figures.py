"""Figures of training: loss parts, validation and schedules from the logs of runs, what was learned, the distance schedule."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from laid.distill.schedule import DistanceSchedule, reach
from laid.errors import LaidError
from laid.io import read_json
from laid.results import plotting
from laid.results.names import Names
from laid.results.plotting import Drawing, Look, style
from laid.settings.methods import Gaps, TrainedMethod

COLUMNS = 3  # of panels
POINTS = 25  # a curve is drawn as the means of at most this many equal stretches of steps
# Keys of a log line that follow a plan or describe the model, rather than measure an error.
SCHEDULES = ("lr", "lambda", "gain", "gap", "weight", "distance", "progress", "span")
# What the keys of a log line mean; a key that is not here is printed as it is.
PARTS = {
    "loss": "whole",
    "loss_sft": "L_SFT",
    "loss_kl": "L_KL",
    "loss_laid": "L_LAid",
    "lr": "learning rate",
    "lambda_sft": "lambda_SFT",
    "lambda_kl": "lambda_KL",
    "lambda_laid": "lambda_LAid",
    "distance_emphasis": "distance emphasis (0 to 1)",
    "gain_mean": "gain, mean",
    "gain_min": "gain, smallest",
    "gain_max": "gain, largest",
}
DASHES = ["-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1))]
RUN = ["student", "method", "seed"]
ACCURACY = "validation_accuracy"


# ------------------------------------------------------------------ logs


def load_logs(folder: str | Path) -> pd.DataFrame:
    """student, method, seed, part, step, value of the logs below `folder`/<student>/<method>/seed<k>/log.jsonl.

    Raises LaidError for a broken line.
    """
    rows = []
    for path in sorted(Path(folder).glob("*/*/seed*/log.jsonl")):
        student, method, seed = path.parts[-4:-1]
        if student.startswith(".") or not seed.removeprefix("seed").isdigit():
            continue
        for step, values in sorted(_read_log(path).items()):
            run = (student, method, int(seed.removeprefix("seed")))
            rows += [(*run, part, step, value) for part, value in values.items() if part != "step"]
    return pd.DataFrame(rows, columns=[*RUN, "part", "step", "value"])


def _read_log(path: Path) -> dict[int, dict[str, float]]:
    """Numeric values by step; nested mappings become dotted keys, other values are left out.

    Lines without a step (remarks) are skipped; of two lines for one step (a run that was resumed) the later counts.
    """
    lines: dict[int, dict[str, float]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            what = f"{path}: line {number} is not valid JSON: {error.msg}; train this run again"
            raise LaidError(what) from None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines[line["step"]] = _flat(line)
    return lines


def _flat(line: dict[str, Any], before: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{before}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out[before + key] = float(value)
    return out


def stretches(curve: pd.DataFrame, points: int = POINTS) -> pd.DataFrame:
    """Means of step and value over at most `points` equal stretches of one curve."""
    if len(curve) <= points:
        return curve
    parts = np.array_split(np.arange(len(curve)), points)
    means = {name: [curve[name].to_numpy()[p].mean() for p in parts] for name in ("step", "value")}
    return curve.iloc[: len(parts)].assign(**means)


def build(logs: pd.DataFrame, names: Names) -> list[Drawing]:
    """The figures "training" (loss parts), "validation" and "schedules", as far as the logs hold them."""
    with style():
        found = (training(logs, names), validation(logs, names), schedules(logs, names))
        return [d for d in found if d is not None]


def training(logs: pd.DataFrame, names: Names) -> Drawing | None:
    """Loss parts over steps."""
    losses = logs[logs["part"].str.startswith("loss")]
    if losses.empty:
        return None
    figure, panels, drawn = _curves(losses, names, PARTS)
    for axes in panels[:, 0]:
        axes.set_ylabel("Loss")
        axes.set_yscale("symlog", linthresh=0.01)
        axes.yaxis.set_major_formatter("{x:g}")
    return Drawing(
        "training",
        "Loss parts over training",
        "Loss parts over training steps, as they enter the log (the loss of that step's batch), before their lambdas, and"
        " the whole; every seed is a line, averaged over stretches of steps. Linear below 0.01, logarithmic above.",
        figure,
        drawn,
    )


def validation(logs: pd.DataFrame, names: Names) -> Drawing | None:
    """Accuracy on the held-out questions that were asked while training, over steps, a line a size."""
    asked = logs[logs["part"].str.startswith(ACCURACY)]
    if asked.empty:
        return None
    sizes = {part: part.removeprefix(f"{ACCURACY}_") for part in asked["part"].unique()}
    figure, panels, drawn = _curves(
        asked, names, {part: "all" if part == ACCURACY else f"{size} images" for part, size in sizes.items()}
    )
    for axes in panels[:, 0]:
        axes.set_ylabel("Accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return Drawing(
        "validation",
        "Accuracy on validation questions over training",
        "Accuracy on held-out questions, asked while training (training.validation), by number of images; every seed is a line.",
        figure,
        drawn,
    )


def _curves(
    logs: pd.DataFrame, names: Names, labels: Mapping[str, str]
) -> tuple[Figure, np.ndarray, pd.DataFrame]:
    """Parts of the log over steps, a panel a student and method, a line a part and seed: the figure, its panels, what was drawn."""
    keys = sorted(logs["part"].unique(), key=lambda key: (len(key), key))
    runs = logs[["student", "method"]].drop_duplicates().itertuples(index=False, name=None)
    order = names.ordered(logs["method"].unique())
    shown = sorted(runs, key=lambda run: (run[0], order.index(run[1])))
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = plotting.new_figure(plotting.PAGE, 1.3 * lines + 0.9)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    at = dict(zip(shown, panels.flat, strict=False))
    drawn = []
    for (student, method, _), run in logs.groupby(RUN, sort=False):
        for k, key in enumerate(keys):
            look = Look(plotting.SERIES[k % len(plotting.SERIES)], "", DASHES[k % len(DASHES)])
            drawn.append(_line(at[student, method], run[run["part"] == key], look, labels.get(key, key)))
    for (student, method), axes in at.items():
        axes.set_title(textwrap.fill(f"{student}: {names[method]}", 30), loc="left")
        axes.locator_params(axis="x", nbins=3)
    for axes in list(panels.flat)[len(shown) - columns : len(shown)]:  # the lowest of each column
        axes.set_xlabel("Step")
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_visible(False)
    plotting.legend_below(figure, panels, columns=5)
    return figure, panels, _printed(drawn)


def schedules(logs: pd.DataFrame, names: Names) -> Drawing | None:
    """Learning rates, lambdas, gains and distance weights over steps, a panel a key, a line a method."""
    keys = sorted(key for key in logs["part"].unique() if _is_schedule(key))
    if not keys:
        return None
    student, looks = min(logs["student"]), plotting.method_looks(names)
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = plotting.new_figure(plotting.PAGE, 1.6 * lines + 0.7)
    panels = figure.subplots(lines, columns, squeeze=False)
    drawn = []
    for key, axes in zip(keys, panels.flat, strict=False):
        of_key = logs[(logs["part"] == key) & (logs["student"] == student)]
        for (_, method, _), run in of_key.groupby(RUN, sort=False):
            look = looks[method]
            drawn.append(_line(axes, run, Look(look.color, "", look.dash), names[method]))
        axes.set_title(PARTS.get(key, key), loc="left")
        if axes.lines:
            values = np.concatenate([line.get_ydata() for line in axes.lines])
            if (
                np.ptp(values) <= 1e-9 * abs(values).max()
            ):  # a constant: its ticks from zero, not from its rounding
                axes.set_ylim(*sorted((0, 1.25 * values[0] or 1)))
        axes.set_xlabel("Step")
        axes.locator_params(axis="x", nbins=4)
    for axes in list(panels.flat)[len(keys) :]:
        axes.set_visible(False)
    plotting.legend_below(figure, panels, columns=5, order=list(names.values()))
    return Drawing(
        "schedules",
        "Schedules and gains over training",
        f"What is planned or learned beside the weights, over training steps, of {student}; lines on one another are"
        " drawn once.",
        figure,
        _printed(drawn),
    )


def _is_schedule(key: str) -> bool:
    words = key.replace(".", "_").split("_")
    return any(word.startswith(SCHEDULES) for word in words) and not key.startswith("loss")


def _line(axes: Any, run: pd.DataFrame, look: Look, label: str) -> pd.DataFrame:
    """Draw one part of one run's log; returns what was drawn."""
    if run.empty:
        return run
    means = stretches(run)
    alpha = 1 if run["seed"].iloc[0] == 0 else 0.5
    axes.plot(
        means["step"],
        means["value"],
        color=look.color,
        linestyle=look.dash,
        label=label,
        linewidth=1,
        alpha=alpha,
    )
    return means


def _printed(drawn: Sequence[pd.DataFrame]) -> pd.DataFrame:
    data = pd.concat([part for part in drawn if len(part)])
    return data.assign(step=data["step"].map("{:.1f}".format), value=data["value"].map("{:.6g}".format))


# ------------------------------------------------------------------ what was learned

MAP = "cividis"  # even in lightness: it reads the same in grey and to colour-blind readers


def load_learned(
    folder: str | Path, students: Sequence[str], method: str
) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of learned.json of each student's first seed, by student; students without a run are left out."""
    found = {}
    for student in students:
        path = next(iter(sorted(Path(folder).glob(f"{student}/{method}/seed*/learned.json"))), None)
        if path is None:
            continue
        content = read_json(path)
        try:
            found[student] = {key: np.array(value, dtype=float) for key, value in content.items()}
        except (AttributeError, TypeError, ValueError):
            raise LaidError(f"{path}: expected names with arrays of numbers; train this run again") from None
    return found


def learned(found: dict[str, dict[str, np.ndarray]], method: str, name: str) -> Drawing | None:
    """The figure "learned_<method>": gains per head and frequency, and how teacher heads are mixed; None where no run has any."""
    panels = [
        (student, kind, values)
        for student, arrays in found.items()
        for kind, values in (("gain", _gains(arrays)), ("mixture", _mixture(arrays)))
        if values is not None
    ]
    if not panels:
        return None
    with style():
        return _draw_learned(panels, method, name)


def _gains(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Gain factors (layers, heads, columns), from gain.log_gain of the same shape."""
    logs = arrays.get("gain.log_gain")
    return None if logs is None or logs.ndim != 3 else np.exp(logs)


def _mixture(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Weights (student heads, teacher heads) of equation 7, of the first pair of layers."""
    keys = sorted(
        k for k, v in arrays.items() if k.startswith("alignment.") and k.endswith(".w") and v.ndim == 2
    )
    return arrays[keys[0]] if keys else None


def _draw_learned(panels: Sequence[tuple[str, str, np.ndarray]], method: str, name: str) -> Drawing:
    students = list(dict.fromkeys(student for student, _, _ in panels))
    figure = plotting.new_figure(plotting.PAGE, 2.1 * len(students) + 0.2)
    grid = figure.subplots(len(students), 2, squeeze=False, width_ratios=[2, 1])
    for axes in grid.flat:
        axes.set_visible(False)
    rows: list[tuple[Any, ...]] = []
    for student, kind, values in panels:
        axes = grid[students.index(student)][int(kind == "mixture")]
        axes.set_visible(True)
        axes.grid(visible=False)
        heads = values.shape[-2]
        flat = values.reshape(-1, values.shape[-1])
        figure.colorbar(axes.imshow(flat, cmap=MAP, aspect="auto", interpolation="nearest"), ax=axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if kind == "gain":
            title, below = "gain", "RoPE frequency, high to low"
            axes.set_ylabel("Layer.head")
            shown = range(0, len(flat), -(-len(flat) // 12))
            axes.set_yticks(shown, [f"{row // heads}.{row % heads}" for row in shown])
            for layer in range(heads, len(flat), heads):
                axes.axhline(layer - 0.5, color="white", linewidth=0.8)
        else:
            title, below = "w of equation 7", "Teacher head"
            axes.set_ylabel("Student head")
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(f"{student}: {title}", loc="left")
        axes.set_xlabel(below)
        rows += [(student, kind, *place, f"{value:.6g}") for place, value in np.ndenumerate(flat)]
    return Drawing(
        f"learned_{method}",
        f"Learned gains and head weights, {name}",
        f"{name}, first seed. Left: the learned gain of each query head on each RoPE frequency, 1 where nothing was"
        " learned. Right: how much of each teacher head stands in the target of each student head.",
        figure,
        pd.DataFrame(rows, columns=["student", "kind", "row", "column", "value"]),
    )


# ------------------------------------------------------------------ the distance schedule

MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FADING = ("-", (0, (6, 1)), (0, (4, 1.5)), (0, (2, 1)), (0, (1, 1)))


def distance_schedule(methods: Sequence[TrainedMethod], span: float) -> Drawing | None:
    """The distance emphasis of the methods, for tokens spread evenly over distances 0 to d_max: weight over distance at five
    moments, and reach of gaps over progress, each of the first method that has it. None where none uses either.

    span: positions of a training sample without gaps.
    """
    schedule = DistanceSchedule(next((m.distance.strength for m in methods if m.distance.strength), 0.0))
    gaps = next((m.gaps for m in methods if m.gaps.reach), Gaps())
    far = max(span, gaps.reach)
    if schedule.strength == 0 and far == span:
        return None
    distance = torch.linspace(0, 1, 101)
    progress = np.linspace(0, 1, 101)
    spans = [reach(float(p), span, far, gaps.end) for p in progress]
    rows = []
    with style():
        figure = plotting.new_figure(plotting.PAGE, 2.4)
        left, right = figure.subplots(1, 2)
        for moment, color, dash in zip(MOMENTS, plotting.SERIES, _FADING, strict=False):
            weights = schedule.weights(distance[None], moment, d_max=1.0)[0].tolist()
            left.plot(distance, weights, color=color, linestyle=dash, label=f"progress {moment:g}")
            rows += [
                ("weight", f"{moment:g}", f"{d:.2f}", f"{w:.4f}")
                for d, w in zip(distance.tolist(), weights, strict=True)
            ]
        left.set(xlabel="M-RoPE distance to the answer / d_max", ylabel="weight (mean 1)", ylim=(0, None))
        left.legend()
        right.plot(progress, spans, color=plotting.BLUE)
        right.set(xlabel="training progress", ylabel="largest span (positions)", ylim=(0, None))
    rows += [("reach", f"{p:.2f}", f"{p:.2f}", f"{s:.1f}") for p, s in zip(progress, spans, strict=True)]
    return Drawing(
        "distance_schedule",
        "Distance schedule",
        f"Progressive distance emphasis. Left: weight of a token over its distance (strength {schedule.strength:g},"
        f" growing with progress). Right: the positions that a training sample of {span:.0f} may span once gaps are opened"
        f" (to {far:.0f}, up to progress {gaps.end:g}).",
        figure,
        pd.DataFrame(rows, columns=["panel", "progress", "x", "y"]),
    )
