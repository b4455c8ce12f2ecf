"""The choice of every method's settings, from its cells on the validation questions of several pretrained students.

The rule, one for all methods: a setting's score on a student is the mean of its short and its long window, each the
mean accuracy over its sizes (tables.short_max parts them). The setting with the highest mean score over the students
is the best. The one with the fewest epochs is chosen among those that are not more than one standard error behind it,
student by student (the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984), then the
highest score; of equal ones that which changes the student least: lower learning rate (YaRN: the lower factor; SelfExtend:
smaller groups, then the larger window), then the first written. Settings of more than tune.max_epochs stand in the table and
are not chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from laid.errors import LaidError
from laid.evaluation.cells import Cells
from laid.results.answers import Model, Results
from laid.results.needed import needed_by_tune
from laid.results.render import BEST, Entry, Table
from laid.settings import plain
from laid.settings.tune import variants

if TYPE_CHECKING:
    from laid.settings import Method, Settings

RULE = (
    "Chosen (bold): the highest mean over students of (short + long) / 2, or fewer epochs within one standard error of"
    " it; of equal ones the lower learning rate, the lower factor, the smaller group."
)


# Means of the same accuracies added up in another order are equal.
ROUNDING = 1e-6


def read(cells: Cells, settings: Settings, folder: str | Path) -> Results:
    """The cells of all settings that are tried, base first. Raises LaidError where one is missing."""
    if not settings.tune.methods:
        raise LaidError("tune.methods names no method; give --config config.yaml configs/tune.yaml")
    return Results(cells, settings, folder, needed_by_tune(settings), " --configfile configs/tune.yaml")


def scores(results: Results) -> pd.DataFrame:
    """Of every setting that is tried, and of base: method, variant, and in % short, long and score of each student
    (<student>_short, ...), their mean score and its standard error over students, the difference to the chosen
    setting of its method, student by student, with its standard error, and whether it is chosen."""
    tried = variants(results.settings.tune.methods)
    rows = []
    for variant, (method, place) in {"base": ("base", 0), **tried}.items():
        line = {"method": method, "variant": variant, "place": place}
        for student in results.students:
            line |= {f"{student}_{k}": v for k, v in _windows(results, (student, variant)).items()}
        rows.append(line)
    frame = pd.DataFrame(rows).set_index("variant", drop=False)
    each = frame[[f"{student}_score" for student in results.students]]
    frame["mean"], frame["error"] = each.mean(axis=1), each.sem(axis=1)
    frame["chosen"] = False
    for method in results.settings.tune.methods:
        own = frame[frame["method"] == method]
        choice = own[[_affordable(name, results.settings) for name in own.index]]
        if choice.empty:
            most = results.settings.tune.max_epochs
            raise LaidError(
                f"tune.methods.{method}: no setting has at most {most:g} epochs (tune.max_epochs)"
            )
        best = choice["mean"].idxmax()
        behind = each.loc[choice.index] - each.loc[best]
        # Of one student there is no standard error: only equal settings are within it.
        near = choice[behind.mean(axis=1) >= -behind.sem(axis=1).fillna(0) - ROUNDING]
        best = min(near.index, key=lambda name: _order(near.loc[name], results))
        frame.loc[best, "chosen"] = True
        behind = each.loc[own.index] - each.loc[best]
        frame.loc[own.index, "to_chosen"] = behind.mean(axis=1)
        frame.loc[own.index, "to_chosen_error"] = behind.sem(axis=1)
    return frame.drop(columns="place")


def tune_table(results: Results, frame: pd.DataFrame) -> Table:
    """One row per setting, the chosen one of each method bold."""
    settings, students = results.settings, results.students
    about = pd.DataFrame([_about(name, settings) for name in frame.index], index=frame.index)
    rows = []
    for name, line in frame.iterrows():
        mark = BEST if line["chosen"] else ""
        row = [Entry(results.names[line["method"]]), Entry(_text(about.loc[name]), mark=mark)]
        for student in students:
            windows = (_percent(line[f"{student}_{part}"]) for part in ("short", "long"))
            row.append(Entry(" / ".join(filter(None, windows))))
        row.append(Entry(_percent(line["mean"]), _error(line["error"]), mark=mark))
        other = not (line["chosen"] or line["method"] == "base")
        row.append(
            Entry(f"{line['to_chosen']:+.1f}", _error(line["to_chosen_error"])) if other else Entry("")
        )
        rows.append(row)
    short, long = results.short_long(results.sizes)
    parts = [
        f"{name} {', '.join(map(str, part))}" for name, part in (("short", short), ("long", long)) if part
    ]
    first = frame["method"].ne(frame["method"].shift())
    return Table(
        "tune",
        "Settings tried for each method, accuracy (%) on the validation questions",
        ["Method", "Setting", *students, "Mean", "To the chosen"],
        rows,
        [
            results.questions_note(),
            f"Of each pretrained student: short / long window, means over images ({'; '.join(parts)}).",
            RULE,
            *([_limit(settings)] if settings.tune.max_epochs else []),
        ],
        {i for i, new in enumerate(first) if new},
        legend="\u00b1: standard error over pretrained students; that of a difference student by student.",
        data=frame.drop(columns="variant").join(about).round(4).reset_index(),
    )


def chosen_yaml(frame: pd.DataFrame, settings: Settings) -> str:
    """The chosen settings as lines for config.yaml."""
    lines = [f"  {method}: {_flow(setting)}\n" for method, setting in _chosen(frame, settings)]
    return "methods:\n" + "".join(lines)


def differences(frame: pd.DataFrame, settings: Settings) -> list[str]:
    """Where the configuration's methods have other values than the chosen settings, a line each."""
    return [
        line
        for method, setting in _chosen(frame, settings)
        for line in _differing(method, _values(settings.methods[method], settings), setting)
    ]


def _differing(key: str, present: Any, chosen: Any) -> Iterator[str]:
    if isinstance(chosen, dict) and isinstance(present, dict):
        for inner in chosen:
            yield from _differing(f"{key}.{inner}", present[inner], chosen[inner])
    elif present != chosen:
        yield f"{key} is {_shown(present)}, chosen is {_shown(chosen)}"


def _chosen(frame: pd.DataFrame, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """(method, what is written of its chosen setting)."""
    tried = variants(settings.tune.methods)
    for name in frame.index[frame["chosen"]]:
        method, place = tried[name]
        yield method, settings.tune.methods[method][place]


def _affordable(variant: str, settings: Settings) -> bool:
    most = settings.tune.max_epochs
    return most is None or _values(settings.methods[variant], settings).get("epochs", 0) <= most


def _limit(settings: Settings) -> str:
    return f"Settings of more than {settings.tune.max_epochs:g} epochs are shown and not chosen (tune.max_epochs)."


def _windows(results: Results, model: Model) -> dict[str, float]:
    """A model's short and long window and its score, in %; a window without sizes is nan and counts for nothing."""
    parts = results.short_long(results.sizes)
    short, long = (100 * float(results.point(model, part).mean()) if part else np.nan for part in parts)
    return {"short": short, "long": long, "score": float(np.nanmean([short, long]))}


def _order(line: pd.Series, results: Results) -> tuple:
    """The first in this order is chosen."""
    values = _values(results.settings.methods[line["variant"]], results.settings)
    change = (values.get("lr"), values.get("factor"), values.get("group"), -values.get("window", 0))
    epochs = values.get("epochs", 0)
    return (epochs, -round(line["mean"], 6), *(value or 0 for value in change), line["place"])


def _values(method: Method, settings: Settings) -> dict[str, Any]:
    """A method's values, with those of section training where it takes them from there."""
    values = plain(method)
    inherited = {
        key: getattr(settings.training, key) for key in ("lr", "epochs") if values.get(key, 0) is None
    }
    return values | inherited


def _about(name: str, settings: Settings) -> dict[str, Any]:
    """lr, epochs and adapter of a trained setting, and its other values as they are written; empty where there are none."""
    values = _values(settings.methods[name], settings)
    method, place = variants(settings.tune.methods).get(name, (name, 0))
    written = settings.tune.methods[method][place] if method in settings.tune.methods else {}
    other = {key: value for key, value in written.items() if key not in ("lr", "epochs", "lora")}
    trained = "lora" in values
    return {
        "lr": values["lr"] if trained else None,
        "epochs": values["epochs"] if trained else None,
        "adapter": _adapter(values["lora"]) if trained else "",
        "other": ", ".join(f"{key} {_shown(value)}" for key, value in other.items()),
    }


def _text(about: pd.Series) -> str:
    trained = (
        [f"lr {about['lr']:g}", f"{about['epochs']:g} epochs", about["adapter"]] if about["adapter"] else []
    )
    return ", ".join([*trained, *filter(None, [about["other"]])])


def _adapter(lora: dict[str, Any] | None) -> str:
    return f"LoRA rank {lora['rank']}, alpha {lora['alpha']:g}" if lora else "all weights"


def _shown(value: Any) -> str:
    return _adapter(value) if isinstance(value, dict) and "rank" in value else _flow(value)


def _flow(value: Any) -> str:
    """YAML in one line."""
    return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10**6)[1:-2]


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1f}"


def _error(value: float) -> str:
    return "" if np.isnan(value) else f"\u00b1 {value:.1f}"
