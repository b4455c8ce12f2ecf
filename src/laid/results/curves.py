"""Training curves: loss parts and schedules from the logs of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laid.errors import LaidError
from laid.results.plotting import METHOD_LOOKS, PAGE, SERIES, Drawing, new_figure, style
from laid.results.tables import METHOD_NAMES

POINTS = 80  # a curve is drawn as the means of at most this many equal stretches of steps
# Keys of a log line that follow a plan or describe the model, rather than measure an error.
SCHEDULES = ("lr", "lambda", "gain", "gap", "weight", "distance", "progress", "span", "exponent")
# What the keys of a log line mean; a key that is not here is printed as it is.
NAMES = {
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
    "exponent_mean": "gain exponent, mean",
}
DASHES = ["-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1))]


@dataclass(frozen=True)
class Log:
    """One run's log: steps (n,) and, by key, values (n,), NaN where a line lacks the key."""

    student: str
    method: str
    seed: int
    steps: np.ndarray
    values: dict[str, np.ndarray]


def load_logs(folder: str | Path) -> list[Log]:
    """The logs below `folder`/<student>/<method>/seed<k>/log.jsonl, sorted. Raises LaidError for a broken line."""
    logs = []
    for path in sorted(Path(folder).glob("*/*/seed*/log.jsonl")):
        student, method, seed = path.parts[-4:-1]
        if student.startswith(".") or not seed.removeprefix("seed").isdigit():
            continue
        steps, values = read_log(path)
        if len(steps):
            logs.append(Log(student, method, int(seed.removeprefix("seed")), steps, values))
    return logs


def read_log(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps and numeric values of a log of JSON lines; nested mappings become dotted keys, other values are left out.

    Lines without a step (remarks) are skipped; of two lines for one step (a run that was resumed) the later counts.
    """
    lines: dict[int, dict[str, float]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise LaidError(
                f"{path}: line {number} is not valid JSON: {error.msg}; train this run again"
            ) from None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines[line["step"]] = _flat(line)
    steps = sorted(lines)
    keys = sorted({key for line in lines.values() for key in line} - {"step"})
    return np.array(steps), {key: np.array([lines[s].get(key, math.nan) for s in steps]) for key in keys}


def _flat(line: dict[str, Any], before: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{before}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out[before + key] = float(value)
    return out


def stretches(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means of steps and values over at most `points` equal stretches; NaN values are left out first."""
    kept = ~np.isnan(values)
    steps, values = steps[kept], values[kept]
    if len(steps) <= points:
        return steps.astype(float), values
    parts = np.array_split(np.arange(len(steps)), points)
    return np.array([steps[p].mean() for p in parts]), np.array([values[p].mean() for p in parts])


def build(logs: Sequence[Log]) -> list[Drawing]:
    """The figures "training" (loss parts) and "schedules", as far as the logs hold them."""
    with style():
        return [d for d in (training(logs), schedules(logs)) if d is not None]


def training(logs: Sequence[Log]) -> Drawing | None:
    """Loss parts over steps, a row a student, a column a method; every seed is a line."""
    keys = sorted({k for log in logs for k in log.values if k.startswith("loss")}, key=lambda k: (len(k), k))
    if not keys:
        return None
    students = sorted({log.student for log in logs})
    shown = [m for m in METHOD_NAMES if any(log.method == m for log in logs)]
    figure = new_figure(PAGE, 1.6 * len(students) + 0.7)
    panels = figure.subplots(len(students), len(shown), sharex="col", sharey=True, squeeze=False)
    rows: list[list[str]] = []
    for log in logs:
        if log.method not in shown:
            continue
        axes = panels[students.index(log.student)][shown.index(log.method)]
        for k, key in enumerate(keys):
            if key in log.values:
                name = NAMES.get(key, key)
                rows += _line(axes, log, key, SERIES[k % len(SERIES)], DASHES[k % len(DASHES)], name)
    for student, row in zip(students, panels, strict=True):
        row[0].set_ylabel(f"{student}\nloss")
        row[0].set_yscale("symlog", linthresh=0.01)
        row[0].yaxis.set_major_formatter("{x:g}")
    for method, axes in zip(shown, panels[0], strict=True):
        axes.set_title(METHOD_NAMES[method], loc="left")
    for column in panels.T:
        for axes in column:
            axes.set_visible(bool(axes.lines))
        lowest = [axes for axes in column if axes.lines][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("Step")
        lowest.locator_params(axis="x", nbins=3)
    _legend(figure, panels)
    caption = (
        "Loss parts over training steps, as they enter the log (the loss of that step's batch), before their lambdas, and"
        " the whole; every seed is a line, averaged over stretches of steps. Linear below 0.01, logarithmic above."
    )
    return Drawing(
        "training",
        "Loss parts over training",
        caption,
        figure,
        [["student", "method", "seed", "part", "step", "value"], *rows],
    )


def schedules(logs: Sequence[Log]) -> Drawing | None:
    """Learning rates, lambdas, gains and distance weights over steps, a panel a key, a line a method."""
    keys = sorted({k for log in logs for k in log.values if _is_schedule(k)})
    if not keys:
        return None
    students = sorted({log.student for log in logs})
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = new_figure(PAGE, 1.6 * lines + 0.7)
    panels = figure.subplots(lines, columns, squeeze=False)
    rows: list[list[str]] = []
    for key, axes in zip(keys, panels.flat):
        for log in logs:
            if key in log.values and log.student == students[0] and log.method in METHOD_LOOKS:
                look = METHOD_LOOKS[log.method]
                rows += _line(axes, log, key, look.color, look.dash, METHOD_NAMES[log.method])
        axes.set_title(NAMES.get(key, key), loc="left")
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
    _legend(figure, panels)
    caption = (
        f"What is planned or learned beside the weights, over training steps, of {students[0]}; lines on one another are"
        " drawn once."
    )
    return Drawing(
        "schedules",
        "Schedules and gains over training",
        caption,
        figure,
        [["student", "method", "seed", "part", "step", "value"], *rows],
    )


def _is_schedule(key: str) -> bool:
    return any(
        word.startswith(SCHEDULES) for word in key.replace(".", "_").split("_")
    ) and not key.startswith("loss")


def _line(axes: Any, log: Log, key: str, color: str, dash: Any, label: str) -> list[list[str]]:
    xs, ys = stretches(log.steps, log.values[key])
    axes.plot(
        xs, ys, color=color, linestyle=dash, label=label, linewidth=1, alpha=1 if log.seed == 0 else 0.5
    )
    return [
        [log.student, log.method, str(log.seed), key, f"{x:.1f}", f"{y:.6g}"]
        for x, y in zip(xs, ys, strict=True)
    ]


def _legend(figure: Any, panels: Any) -> None:
    """One legend of all labels, each once, below the panels."""
    found: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = [*METHOD_NAMES.values()]
    names = sorted(found, key=lambda name: order.index(name) if name in order else -1)
    figure.legend([found[n] for n in names], names, loc="outside lower center", ncols=min(5, len(found)))
