"""Beyond the paper: which cause shrinks a window, which method cures which, and where accuracy ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from laid.evaluation.cells import Cells
from laid.evaluation.intervals import wilson
from laid.results import plotting
from laid.results.answers import cells_frame, read_records
from laid.results.names import LAID, Names
from laid.results.plotting import Drawing, style
from laid.results.render import percent, pipes

Record = Mapping[str, Any]  # of `laid why`, one model
FORMAT = "laid-why/1"
CONDITIONS = ("ordinary", "stretched", "packed")
TITLES = {"ordinary": "n images", "stretched": "{few} images, span of n", "packed": "n images, span of {few}"}
RESAMPLES = 2000


def load_why(folder: str | Path) -> dict[str, Record]:
    """The records of `laid why` in a folder, by model."""
    return read_records(folder, FORMAT)


def right(record: Record, method: str, condition: str, size: int) -> np.ndarray:
    """(questions,) right (1) and wrong (0) answers."""
    return np.array(record["methods"][method][condition][str(size)]["right"], dtype=float)


def level(record: Record, method: str, condition: str, sizes: Sequence[int]) -> tuple[float, np.ndarray]:
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


def losses(record: Record, method: str, condition: str, long: Sequence[int]) -> tuple[float, np.ndarray]:
    """(points lost, bootstrap draws of it): accuracy at few images minus the mean over the `long` sizes."""
    before, after = level(record, method, "ordinary", [record["few"]]), level(record, method, condition, long)
    return before[0] - after[0], before[1] - after[1]


def long_sizes(record: Record, short_max: int) -> list[int]:
    """The sizes of the long window, or the largest one where none is."""
    return [size for size in record["sizes"] if size > short_max] or record["sizes"][-1:]


def figure_why(records: Mapping[str, Record], students: Sequence[str], teacher: str, names: Names) -> Drawing:
    """Accuracy over n in the three conditions (columns), one row per student, the teacher in grey."""
    shown = [name for name in students if name in records]
    looks, data = plotting.method_looks(names), []
    figure = plotting.new_figure(plotting.PAGE, 1.9 * len(shown) + 0.7)
    panels = figure.subplots(len(shown), len(CONDITIONS), sharex=True, sharey=True, squeeze=False)
    for student, line in zip(shown, panels, strict=True):
        record = records[student]
        for condition, axes in zip(CONDITIONS, line, strict=True):
            if teacher in records:
                points = shares(records[teacher], "base", condition)
                plotting.curve(axes, points.n, points.accuracy, plotting.TEACHER, "teacher")
                plotting.hover(axes, points.n, points.accuracy, _tips(points, "teacher"), size=8)
            for method in names.ordered(record["methods"]):
                points, look = shares(record, method, condition), looks[method]
                plotting.curve(axes, points.n, points.accuracy, look, names[method])
                plotting.hover(axes, points.n, points.accuracy, _tips(points, names[method]), size=8)
                if method in ("base", *LAID):
                    plotting.bars(axes, points.n, points.accuracy, points.low, points.high, look.color)
                data.append(points)
            plotting.image_axis(axes, record["sizes"])
            axes.set_xlabel("n" if student == shown[-1] else "")
            if student == shown[0]:
                axes.set_title(TITLES[condition].format(few=record["few"]), loc="left")
        line[0].set_ylabel(f"{student}\naccuracy (%)")
    plotting.legend_below(figure, panels, columns=5)
    record = records[shown[0]]
    few, n = record["few"], len(right(record, "base", "ordinary", record["few"]))
    drawn = pd.concat(data)
    formats = {"span": 1, "accuracy": 6, "low": 6, "high": 6}
    return Drawing(
        "why",
        "Distance and dilution apart",
        f"Left: haystacks of n images. Middle: {few} images with gaps between them, so that they span the positions of n:"
        f" distance without more keys. Right: n images at the positions of {few}: more keys without distance."
        f" Bars: 95 % intervals (Wilson) of base, LAid and LAid+; {n} questions a point.",
        figure,
        drawn.assign(**{name: plotting.decimals(drawn[name], places) for name, places in formats.items()}),
    )


def shares(record: Record, method: str, condition: str) -> pd.DataFrame:
    """student, method, condition, n, images, span, accuracy, low, high: one row per size."""
    rows = []
    for size in record["sizes"]:
        part, answers = (
            record["methods"][method][condition][str(size)],
            right(record, method, condition, size),
        )
        about = {"student": record["student"], "method": method, "condition": condition, "n": size}
        low, high = wilson(int(answers.sum()), len(answers))
        value = float(answers.mean())
        rows.append(
            {
                **about,
                "images": part["images"],
                "span": part["span"],
                "accuracy": value,
                "low": low,
                "high": high,
            }
        )
    return pd.DataFrame(rows)


def _tips(points: pd.DataFrame, label: str) -> Iterator[str]:
    for p in points.itertuples():
        yield f"{p.student} {label}, {p.condition}, n = {p.n}: {percent(p.accuracy, (p.low, p.high))} %"


def figure_ends(near: Cells, far: Cells, teacher: str, students: Sequence[str], names: Names) -> Drawing:
    """Accuracy from the test sizes on to the sizes beyond them; what lies beyond is shaded."""
    beyond = cells_frame(far)
    cells = cells_frame({**near, **far}).sort_index()
    sizes, edge = (
        sorted(cells["size"].unique()),
        max((size for *_, size in near), default=beyond["size"].min()),
    )
    shown = [name for name in students if name in set(beyond["student"])]
    looks, data = plotting.method_looks(names), []
    figure = plotting.new_figure(plotting.PAGE, 2.7)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for student, axes in zip(shown, panels, strict=True):
        lines = [(teacher, "base", "teacher", plotting.TEACHER)]
        methods = names.ordered(beyond[beyond["student"] == student]["method"].unique())
        lines += [(student, method, names[method], looks[method]) for method in methods]
        for name, method, label, look in lines:
            own = cells[(cells["student"] == name) & (cells["method"] == method)]
            if own.empty:
                continue
            plotting.curve(axes, own["size"], own.accuracy, look, label)
            plotting.bars(axes, own["size"], own.accuracy, own.low, own.high, look.color)
            texts = (plotting.point_tip(label, c.size, c.accuracy, (c.low, c.high)) for c in own.itertuples())
            plotting.hover(axes, own["size"], own.accuracy, texts, size=8)
            if name == student or student == shown[0]:
                data.append(own)
        axes.axvspan(math.sqrt(edge * beyond["size"].min()), 1.1 * sizes[-1], color="#eeeeee", zorder=0)
        axes.axhline(50, **plotting.RULE)
        axes.set_xscale("log")
        ticks = [size for size in (1, 5, 20, 50, 150, 500) if size in sizes] or sizes
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.minorticks_off()
        axes.set_xlabel("Images in the haystack")
        axes.set_title(student, loc="left", fontweight="bold")
    panels[0].set_ylabel("Accuracy (%)")
    plotting.legend_below(figure, panels, columns=5)
    drawn = pd.concat(data).rename(columns={"size": "images", "positions_mean": "positions"})
    formats = {"positions": 1, "accuracy": 6, "low": 6, "high": 6}
    return Drawing(
        "beyond",
        "Where it stops",
        "Accuracy over images, beyond the sizes of the paper where shaded; bars: 95 % intervals; dashed: chance."
        f" {beyond['questions'].min()} questions a size where shaded.",
        figure,
        drawn[["student", "method", "images", *formats]].assign(
            **{name: plotting.decimals(drawn[name], places) for name, places in formats.items()}
        ),
    )


def build(
    records: Mapping[str, Record],
    near: Cells,
    far: Cells,
    teacher: str,
    students: Sequence[str],
    names: Names,
) -> list[Drawing]:
    """Both figures, those that have data."""
    drawings = []
    with style():
        if any(name in records for name in students):
            drawings.append(figure_why(records, students, teacher, names))
        if any(key[0] in students for key in far):
            drawings.append(figure_ends(near, far, teacher, students, names))
    return drawings


# ------------------------------------------------------------------ words


def report(
    records: Mapping[str, Record],
    far: Cells,
    teacher: str,
    students: Sequence[str],
    short_max: int,
    names: Names,
) -> str:
    """why.md: how it was measured, a table, and what follows from it; every number from the records."""
    lines = ["# Why windows shrink, and where they end", ""]
    if any(name in records for name in students):
        lines += _why(records, teacher, [name for name in students if name in records], short_max, names)
    if far:
        lines += _ends(far, teacher, students, names)
    lines += [_source(records, far), ""]
    return "\n".join(lines)


def _source(records: Mapping[str, Record], far: Cells) -> str:
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
    records: Mapping[str, Record], teacher: str, shown: Sequence[str], short_max: int, names: Names
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
    rows = []
    for student in [*([teacher] if teacher in records else []), *shown]:
        record = records[student]
        for method in names.ordered(record["methods"]):
            levels = [level(record, method, "ordinary", [few])]
            levels += [level(record, method, condition, long) for condition in CONDITIONS]
            rows.append([student, names[method], *(_interval(*found) for found in levels)])
    header = ["Model", "Method", f"{few} images", "n images", "Distance alone", "Dilution alone"]
    lines = [about, "", *pipes(header, rows, names=2), ""]
    for student in shown:
        lines += [_verdict(student, records[student], long, names), ""]
    return lines


def _interval(value: float, draws: np.ndarray) -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _verdict(student: str, record: Record, long: Sequence[int], names: Names) -> str:
    """One paragraph: the larger cause in base, and for each method what accuracy it wins back under either."""
    base = {condition: losses(record, "base", condition, long) for condition in ("stretched", "packed")}
    causes = {"stretched": "distance", "packed": "dilution"}
    gap, draws = (base["stretched"][i] - base["packed"][i] for i in (0, 1))
    if _clear(draws):
        larger = "stretched" if gap > 0 else "packed"
        text = f"{student}: in base {causes[larger]} costs more, {_interval(abs(gap), np.sign(gap) * draws)} points more than the other."
    else:
        text = f"{student}: in base neither cause costs clearly more (distance minus dilution {_interval(gap, draws)} points)."
    for method in names.ordered(record["methods"]):
        if method == "base":
            continue
        parts = []
        for condition, name in causes.items():
            own, before = (level(record, m, condition, long) for m in (method, "base"))
            won, spread = own[0] - before[0], own[1] - before[1]
            if not _clear(spread):
                parts.append(f"no clear change under {name} ({_interval(won, spread)})")
            elif won > 0:
                whole = f" of the {base[condition][0]:.1f}"
                parts.append(f"wins back {_interval(won, spread)}{whole} points lost to {name}")
            else:
                parts.append(f"loses {_interval(-won, -spread)} points more to {name}")
        text += f" {names[method]}: {'; '.join(parts)}{_price(record, method)}."
    return text


def _price(record: Record, method: str) -> str:
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


def _ends(far: Cells, teacher: str, students: Sequence[str], names: Names) -> list[str]:
    cells = cells_frame(far)
    sizes = sorted(cells["size"].unique())
    texts = pd.Series([percent(c.accuracy, (c.low, c.high)) for c in cells.itertuples()], cells.index)
    by_size = texts.unstack("size")[sizes].dropna()
    rows = [
        [student, names[method], *by_size.loc[student, method]]
        for student in (teacher, *students)
        for method in names.ordered([method for name, method in by_size.index if name == student])
    ]
    about = f"Haystacks of {', '.join(map(str, sizes))} images; accuracy in % with its 95 % interval; chance is 50."
    return [
        "## Where it stops",
        "",
        about,
        "",
        *pipes(["Model", "Method", *map(str, sizes)], rows, names=2),
        "",
    ]
