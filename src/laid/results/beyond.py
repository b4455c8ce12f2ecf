"""Beyond the paper: which cause shrinks a window, which method cures which, and where accuracy ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laid.errors import LaidError
from laid.evaluation.cells import Cells
from laid.io import read_json
from laid.results import stats
from laid.results.plotting import (
    METHOD_LOOKS,
    PAGE,
    Drawing,
    Look,
    image_axis,
    new_figure,
    percent,
    style,
    tip,
)
from laid.results.tables import METHOD_NAMES

FORMAT = "laid-why/1"
CONDITIONS = ("ordinary", "stretched", "packed")
TITLES = {"ordinary": "n images", "stretched": "{few} images, span of n", "packed": "n images, span of {few}"}
TEACHER = Look("#888888", "*", (0, (1, 1)))
RESAMPLES = 2000


def load_why(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The records of `laid why` in a folder, by model. Raises LaidError for a file that lies in another's place."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            continue
        if path.stem != record["student"]:
            raise LaidError(f"{path}: holds the record of {record['student']!r}: moved or copied from there?")
        order = [m for m in METHOD_NAMES if m in record["methods"]]
        found[record["student"]] = record | {"methods": {m: record["methods"][m] for m in order}}
    return found


def right(record: Mapping[str, Any], method: str, condition: str, size: int) -> np.ndarray:
    """(questions,) right (1) and wrong (0) answers."""
    return np.array(record["methods"][method][condition][str(size)]["right"], dtype=float)


def level(
    record: Mapping[str, Any], method: str, condition: str, sizes: Sequence[int]
) -> tuple[float, np.ndarray]:
    """(accuracy in %, bootstrap draws of it), mean over `sizes`.

    Questions are drawn per file, the same for every method and condition with the same file, so that draws are paired.
    """
    values, drawn = [], []
    for size in sizes:
        answers = right(record, method, condition, size)
        n, file = len(answers), record["few"] if condition == "stretched" else size
        weights = np.random.default_rng([0, file, n]).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
        values.append(answers.mean())
        drawn.append(weights @ answers)
    return 100 * float(np.mean(values)), 100 * np.mean(drawn, axis=0)


def losses(
    record: Mapping[str, Any], method: str, condition: str, long: Sequence[int]
) -> tuple[float, np.ndarray]:
    """(points lost, bootstrap draws of it): accuracy at few images minus the mean over the `long` sizes."""
    before, after = level(record, method, "ordinary", [record["few"]]), level(record, method, condition, long)
    return before[0] - after[0], before[1] - after[1]


def long_sizes(record: Mapping[str, Any], short_max: int) -> list[int]:
    """The sizes of the long window, or the largest one where none is."""
    return [size for size in record["sizes"] if size > short_max] or record["sizes"][-1:]


def figure_why(records: Mapping[str, dict[str, Any]], students: Sequence[str], teacher: str) -> Drawing:
    """Accuracy over n in the three conditions (columns), a row a student, the teacher in grey."""
    shown = [name for name in students if name in records]
    figure = new_figure(PAGE, 1.9 * len(shown) + 0.7)
    panels = figure.subplots(len(shown), len(CONDITIONS), sharex=True, sharey=True, squeeze=False)
    rows: list[list[str]] = []
    for student, line in zip(shown, panels, strict=True):
        record = records[student]
        for condition, axes in zip(CONDITIONS, line, strict=True):
            models = [(teacher, "base", "teacher", TEACHER)] if teacher in records else []
            models += [(student, m, METHOD_NAMES[m], METHOD_LOOKS[m]) for m in record["methods"]]
            for name, method, label, look in models:
                rows += _curve(axes, records[name], name, method, condition, label, look, name == student)
            image_axis(axes, record["sizes"])
            axes.set_xlabel("n" if student == shown[-1] else "")
            if student == shown[0]:
                axes.set_title(TITLES[condition].format(few=record["few"]), loc="left")
        line[0].set_ylabel(f"{student}\naccuracy (%)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    record = records[shown[0]]
    few, n = record["few"], len(right(record, "base", "ordinary", record["few"]))
    return Drawing(
        "why",
        "Distance and dilution apart",
        f"Left: haystacks of n images. Middle: {few} images with gaps between them, so that they span the positions of n:"
        f" distance without more keys. Right: n images at the positions of {few}: more keys without distance."
        f" Bars: 95 % intervals (Wilson) of base and LAid; {n} questions a point.",
        figure,
        [["student", "method", "condition", "n", "images", "span", "accuracy", "low", "high"], *rows],
    )


def _curve(axes, record, name, method, condition, label, look: Look, own: bool) -> list[list[str]]:
    rows, values, bounds = [], [], []
    for size in record["sizes"]:
        answers = right(record, method, condition, size)
        part = record["methods"][method][condition][str(size)]
        value, (low, high) = float(answers.mean()), stats.wilson(int(answers.sum()), len(answers))
        values.append(100 * value)
        bounds.append((100 * low, 100 * high))
        rows.append(
            [name, method, condition, str(size), str(part["images"]), f"{part['span']:.1f}"]
            + [f"{v:.6f}" for v in (value, low, high)]
        )
        (spot,) = axes.plot([size], [100 * value], "o", markersize=8, alpha=0)
        tip(spot, f"{name} {label}, {condition}, n = {size}: {percent(value, (low, high))} %")
    axes.plot(record["sizes"], values, color=look.color, marker=look.marker, linestyle=look.dash, label=label)
    if own and method in ("base", "laid"):
        errors = np.array([[max(0, v - b[0]), max(0, b[1] - v)] for v, b in zip(values, bounds)]).T
        axes.errorbar(record["sizes"], values, errors, color=look.color, linestyle="", elinewidth=0.6)
    return rows if own else []


def figure_ends(near: Cells, far: Cells, teacher: str, students: Sequence[str]) -> Drawing:
    """Accuracy from the test sizes on to the sizes beyond them; what lies beyond is shaded."""
    methods = {
        name: sorted({m for s, m, _ in far if s == name}, key=list(METHOD_NAMES).index) for name in students
    }
    shown = [name for name in students if methods[name]]
    figure = new_figure(PAGE, 2.7)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    rows: list[list[str]] = []
    for student, axes in zip(shown, panels, strict=True):
        lines = [(teacher, "base", "teacher", TEACHER)]
        lines += [(student, m, METHOD_NAMES[m], METHOD_LOOKS[m]) for m in methods[student]]
        for name, method, label, look in lines:
            cells = [c for (s, m, _), c in sorted({**near, **far}.items()) if (s, m) == (name, method)]
            if not cells:
                continue
            sizes, values = [c["size"] for c in cells], [100 * c["accuracy"] for c in cells]
            axes.plot(sizes, values, color=look.color, marker=look.marker, linestyle=look.dash, label=label)
            errors = np.array(
                [[c["accuracy"] - c["interval"][0], c["interval"][1] - c["accuracy"]] for c in cells]
            )
            axes.errorbar(
                sizes, values, 100 * errors.clip(0).T, color=look.color, linestyle="", elinewidth=0.6
            )
            for cell in cells:
                (spot,) = axes.plot([cell["size"]], [100 * cell["accuracy"]], "o", markersize=8, alpha=0)
                tip(spot, f"{label}, {cell['size']} images: {percent(cell['accuracy'], cell['interval'])} %")
                if name == student or student == shown[0]:
                    rows.append(
                        [name, method, str(cell["size"]), f"{cell['positions_mean']:.1f}"]
                        + [f"{v:.6f}" for v in (cell["accuracy"], *cell["interval"])]
                    )
        edge = max((size for *_, size in near), default=min(size for *_, size in far))
        sizes = sorted({size for *_, size in (*near, *far)})
        axes.axvspan(
            math.sqrt(edge * min(size for *_, size in far)), 1.1 * sizes[-1], color="#eeeeee", zorder=0
        )
        axes.axhline(50, color="#555555", linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        ticks = [size for size in (1, 5, 20, 50, 150, 500) if size in sizes] or sizes
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.minorticks_off()
        axes.set_xlabel("Images in the haystack")
        axes.set_title(student, loc="left", fontweight="bold")
    panels[0].set_ylabel("Accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    asked = sorted({cell["questions"] for cell in far.values()})
    return Drawing(
        "beyond",
        "Where it stops",
        "Accuracy over images, beyond the sizes of the paper where shaded; bars: 95 % intervals; dashed: chance."
        f" {asked[0]} questions a size where shaded.",
        figure,
        [["student", "method", "images", "positions", "accuracy", "low", "high"], *rows],
    )


def build(
    records: Mapping[str, dict[str, Any]], near: Cells, far: Cells, teacher: str, students: Sequence[str]
) -> list[Drawing]:
    """Both figures, those that have data."""
    drawings = []
    with style():
        if any(name in records for name in students):
            drawings.append(figure_why(records, students, teacher))
        if any(key[0] in students for key in far):
            drawings.append(figure_ends(near, far, teacher, students))
    return drawings


# ------------------------------------------------------------------ words


def report(
    records: Mapping[str, dict[str, Any]], far: Cells, teacher: str, students: Sequence[str], short_max: int
) -> str:
    """why.md: how it was measured, a table, and what follows from it; every number from the records."""
    lines = ["# Why windows shrink, and where they end", ""]
    if any(name in records for name in students):
        lines += _why(records, teacher, [name for name in students if name in records], short_max)
    if far:
        lines += _ends(far, teacher, students)
    lines += [_source(records, far), ""]
    return "\n".join(lines)


def _source(records: Mapping[str, dict[str, Any]], far: Cells) -> str:
    """The last line: scale, seeds, code and command behind the numbers."""
    made = [entry.get("provenance", {}) for entry in (*records.values(), *far.values())]
    commits = sorted({str((p.get("code") or {}).get("commit") or "unknown")[:12] for p in made})
    scales = sorted({cell["scale"] for cell in far.values()})
    seeds = max((len(cell["seeds"]) for cell in far.values()), default=1)
    parts = [f"scale {', '.join(scales)}"] if scales else []
    if records:
        parts.append("distance and dilution: the first training seed of each method")
    if far:
        parts.append(f"longer haystacks: {seeds} training seed{'s' if seeds > 1 else ''}")
    return (
        f"Written by `laid beyond` from measurements: {'; '.join(parts)}; code of commit {', '.join(commits)};"
        " `snakemake --cores all beyond` makes it again."
    )


def _why(
    records: Mapping[str, dict[str, Any]], teacher: str, shown: Sequence[str], short_max: int
) -> list[str]:
    few, long = records[shown[0]]["few"], long_sizes(records[shown[0]], short_max)
    n = len(right(records[shown[0]], "base", "ordinary", few))
    listed = ", ".join(map(str, long))
    about = (
        "Adding images does two things at once: the needle lies farther away in positions, and its key competes with more"
        f" keys. Both are taken apart at evaluation. *Distance*: {few} images with random gaps between them, so that they span"
        f" the positions of n images. *Dilution*: n images at the positions of {few}, several sharing theirs, so that nothing"
        f" is farther away than with {few}. Accuracy in %, mean over n = {listed}, with its 95 % bootstrap interval over {n}"
        f" questions a size. Half of the answers are yes: 50 is chance, and nobody can lose more."
    )
    lines = [
        about,
        "",
        f"| Model | Method | {few} images | n images | Distance alone | Dilution alone |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for student in [*([teacher] if teacher in records else []), *shown]:
        record = records[student]
        for method in record["methods"]:
            levels = [level(record, method, "ordinary", [few])]
            levels += [level(record, method, condition, long) for condition in CONDITIONS]
            entries = [_interval(*found) for found in levels]
            lines.append(f"| {student} | {METHOD_NAMES[method]} | {' | '.join(entries)} |")
    lines.append("")
    for student in shown:
        lines += [_verdict(student, records[student], long), ""]
    return lines


def _interval(value: float, draws: np.ndarray) -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _verdict(student: str, record: Mapping[str, Any], long: Sequence[int]) -> str:
    """One paragraph: the larger cause in base, and for each method what accuracy it wins back under either."""
    base = {condition: losses(record, "base", condition, long) for condition in ("stretched", "packed")}
    names = {"stretched": "distance", "packed": "dilution"}
    gap, draws = (base["stretched"][i] - base["packed"][i] for i in (0, 1))
    if _clear(draws):
        larger = "stretched" if gap > 0 else "packed"
        text = f"{student}: in base {names[larger]} costs more, {_interval(abs(gap), np.sign(gap) * draws)} points more than the other."
    else:
        text = f"{student}: in base neither cause costs clearly more (distance minus dilution {_interval(gap, draws)} points)."
    for method in record["methods"]:
        if method == "base":
            continue
        parts = []
        for condition, name in names.items():
            own, before = (level(record, m, condition, long) for m in (method, "base"))
            won, spread = own[0] - before[0], own[1] - before[1]
            if not _clear(spread):
                parts.append(f"no clear change under {name} ({_interval(won, spread)})")
            elif won > 0:
                whole = f" of the {base[condition][0]:.1f}"
                parts.append(f"wins back {_interval(won, spread)}{whole} points lost to {name}")
            else:
                parts.append(f"loses {_interval(-won, -spread)} points more to {name}")
        text += f" {METHOD_NAMES[method]}: {'; '.join(parts)}{_price(record, method)}."
    return text


def _price(record: Mapping[str, Any], method: str) -> str:
    """What a method costs or gains at few ordinary images, where that is clear."""
    own, before = (level(record, m, "ordinary", [record["few"]]) for m in (method, "base"))
    change, spread = own[0] - before[0], own[1] - before[1]
    if not _clear(spread):
        return ""
    verb, sign = ("gains", 1) if change > 0 else ("costs", -1)
    return f"; it {verb} {_interval(sign * change, sign * spread)} points at {record['few']} images"


def _clear(draws: np.ndarray) -> bool:
    """Whether the 95 % interval leaves zero out."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return low > 0 or high < 0


def _ends(far: Cells, teacher: str, students: Sequence[str]) -> list[str]:
    sizes = sorted({size for *_, size in far})
    lines = [
        "## Where it stops",
        "",
        f"Haystacks of {', '.join(map(str, sizes))} images; accuracy in % with its 95 % interval; chance is 50.",
        "",
        f"| Model | Method | {' | '.join(map(str, sizes))} |",
        f"|---|---|{'--:|' * len(sizes)}",
    ]
    for name in (teacher, *students):
        for method in METHOD_NAMES:
            if all((name, method, size) in far for size in sizes):
                cells = [far[name, method, size] for size in sizes]
                entries = [percent(cell["accuracy"], cell["interval"]) for cell in cells]
                lines.append(f"| {name} | {METHOD_NAMES[method]} | {' | '.join(entries)} |")
    return [*lines, ""]
