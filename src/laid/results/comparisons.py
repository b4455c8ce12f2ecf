"""Paired tests between methods, corrected for their number, and effective windows with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from laid.evaluation.cells import right_answers
from laid.results import published, stats
from laid.results.render import Entry, Table

if TYPE_CHECKING:
    from laid.results.tables import Grid

LEVEL = 0.05
THRESHOLDS = (0.5, 0.6, 0.7, 0.8)
# What LAid is held against, beside base: the claims of the paper are about these.
RIVALS = ("sft", "kd", "laid_wo_kl", "laid_wo_laid")
PAPER_QUESTIONS = 100  # per size, as the paper says of its evaluation
Key = tuple[str, str]  # (student, method)


class Answers:
    """Right and wrong answers of every model of a grid, with one joint bootstrap of all of them."""

    def __init__(self, grid: Grid, resamples: int | None = None):
        self.grid, self.sizes = grid, grid.sizes
        self.right: dict[Key, list[np.ndarray]] = {
            key: [right_answers(grid.cell(*key, size)) for size in grid.sizes] for key in grid.models
        }
        self.one_seed = all(len(right) == 1 for rights in self.right.values() for right in rights)
        # The smallest p-value of n resamples is 2 / (n + 1): with too few, no test of a large family could hold.
        family = len(grid.models) * (len(grid.sizes) + 2)
        enough = stats.RESAMPLES if self.one_seed else max(stats.RESAMPLES, round(3 * family / LEVEL))
        self.resamples = resamples or enough

    @cached_property
    def draws(self) -> dict[Key, np.ndarray]:
        """Accuracies (resamples, sizes) of every model."""
        return stats.joint_draws(self.right, self.resamples)

    def compare(self, first: Key, second: Key, sizes: Sequence[int]) -> stats.Comparison:
        """The second's mean accuracy over sizes minus the first's."""
        at = [self.sizes.index(size) for size in sizes]
        return stats.compare(
            [self.right[first][i] for i in at],
            [self.right[second][i] for i in at],
            self.draws[first][:, at],
            self.draws[second][:, at],
        )

    def p_value(self, first: Key, second: Key, sizes: Sequence[int]) -> float:
        """The p-value of `compare`, without the bootstrap where one seed each lets McNemar's test do."""
        at = [self.sizes.index(size) for size in sizes]
        pair = [[self.right[key][i] for i in at] for key in (first, second)]
        if stats.one_seed(*pair[0], *pair[1]):
            return stats.mcnemar_of(*pair)
        return self.compare(first, second, sizes).p

    def windows(self, key: Key, threshold: float) -> np.ndarray:
        """The effective window in every resample, as lows and highs (resamples, 2)."""
        return stats.effective_windows(self.sizes, self.draws[key], threshold)


def stars_against_base(
    answers: Answers, keys: Iterable[Key], columns: Sequence[Sequence[int]]
) -> tuple[dict[tuple[Key, int], str], tuple[int, int]]:
    """A star for every model and column (a set of sizes) that differs from the model's base; and the two families' sizes.

    Means over a window are what the claims are about; single sizes tell where. Each of the two kinds is one family
    under Holm's correction at 5 %, so that the one question is not paid for by the other.
    """
    tests = [(key, i) for key in keys if key[1] != "base" for i, sizes in enumerate(columns) if sizes]
    found = [answers.p_value((key[0], "base"), key, columns[i]) for key, i in tests]
    adjusted, families = holm_by_kind(found, [columns[i] for _, i in tests])
    return {test: "*" if p < LEVEL else "" for test, p in zip(tests, adjusted, strict=True)}, families


def holm_by_kind(
    p_values: Sequence[float], columns: Sequence[Sequence[int]]
) -> tuple[list[float], tuple[int, int]]:
    """Holm's correction among tests of window means (several sizes) and among those of single sizes, each apart.

    Returns the corrected values in the order given, and how many tests of each kind there are.
    """
    adjusted = list(p_values)
    counts = []
    for means in (True, False):
        family = [k for k, sizes in enumerate(columns) if (len(sizes) > 1) == means]
        counts.append(len(family))
        for k, p in zip(family, stats.holm([p_values[k] for k in family]), strict=True):
            adjusted[k] = p
    return adjusted, (counts[0], counts[1])


def tests_table(answers: Answers) -> Table:
    """LAid against SFT, KD and its ablations, by size and by window, in points of accuracy."""
    grid = answers.grid
    short, long = grid.window_sizes(grid.sizes)
    columns = [*([size] for size in grid.sizes), short, long]
    names = [*map(str, grid.sizes), "Short", "Long"]
    pairs = [
        ((student, rival), (student, "laid"))
        for student in grid.students
        for rival in RIVALS
        if (student, rival) in answers.right and (student, "laid") in answers.right
    ]
    found = [
        (pair, i, answers.compare(*pair, sizes)) for pair in pairs for i, sizes in enumerate(columns) if sizes
    ]
    adjusted, families = holm_by_kind(
        [comparison.p for _, _, comparison in found], [columns[i] for _, i, _ in found]
    )
    rows: dict[tuple[Key, Key], list[Entry]] = {}
    csv = [["student", "method", "against", "images", "difference", "low", "high", "test", "p", "p_holm"]]
    breaks, before = set(), None
    for (pair, i, comparison), p in zip(found, adjusted, strict=True):
        (student, rival), _ = pair
        if pair not in rows:
            if before is not None and student != before:
                breaks.add(len(rows))
            rows[pair] = [Entry(student), Entry(f"LAid - {_method_name(rival)}")]
            before = student
        text = f"{100 * comparison.difference:+.1f}"
        detail = f"[{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}]"
        rows[pair].append(Entry(text, detail, "*" if p < LEVEL else ""))
        values = (comparison.difference, comparison.low, comparison.high)
        images = "+".join(map(str, columns[i]))
        csv.append(
            [student, "laid", rival, images, *(f"{v:.6f}" for v in values), comparison.test, f"{comparison.p:.3g}", f"{p:.3g}"]
        )  # fmt: skip
    header = ["Model", "Difference", *(name for name, sizes in zip(names, columns, strict=True) if sizes)]
    notes = [
        grid.questions_note(),
        star_note(answers, families, "zero")
        if found
        else "LAid or what it is held against is not among the methods.",
        f"Short: mean over {_listed(short)} images; long: {_listed(long)}.",
    ]
    legend = "In brackets the 95 % interval of one difference by itself: bootstrap over questions and seeds."
    title = "LAid against SFT, KD and its ablations, difference in accuracy (points)"
    return Table("tests", title, header, list(rows.values()), csv, notes, breaks, legend=legend)


def star_note(answers: Answers, families: int | tuple[int, int], against: str) -> str:
    """What a star means, and what it does not mean where one seed was trained. families: numbers of tests of window
    means and of single sizes, or of all where they are one family."""
    test = "McNemar's exact test on the same questions"
    if not answers.one_seed:
        test = f"paired bootstrap over questions and seeds ({test} where neither was trained)"
    among = (
        families
        if isinstance(families, int)
        else f"{families[0]} window means and over {families[1]} sizes, each apart"
    )
    comparisons = " comparisons" if isinstance(families, int) else ""
    text = f"* differs from {against}: {test}, Holm's correction over {among}{comparisons}, 5 %."
    return text + (" One training seed: the tests say nothing of other seeds." if answers.one_seed else "")


def window_tables(answers: Answers) -> list[Table]:
    """Effective windows at several thresholds: in images, as ratios to base, and in tokens, with intervals."""
    grid = answers.grid
    tokens = [grid.cell(grid.teacher, "base", size)["tokens_mean"] for size in grid.sizes]
    csv = [
        ["student", "method", "threshold", "images_low", "images_high", "ci_low", "ci_high", "tokens_low", "tokens_high"]
        + ["tokens_ci_low", "tokens_ci_high", "ratio_low", "ratio_high", "ratio_ci_low", "ratio_ci_high"]
    ]  # fmt: skip
    bodies: list[list[list[Entry]]] = [[], [], []]
    breaks: set[int] = set()
    drawn: dict[tuple[Key, float], np.ndarray] = {}
    for row, (student, method) in enumerate(grid.models):
        if method == "base":
            breaks.add(row)
        lines = [[Entry(student), Entry(_method_name(method))] for _ in bodies]
        for threshold in THRESHOLDS:
            window = grid.window(student, method, threshold)
            drawn[(student, method), threshold] = draws = answers.windows((student, method), threshold)
            interval = stats.bounds_interval(draws)
            base = drawn[(student, "base"), threshold]
            ratio = window / grid.window(student, "base", threshold)
            ratio_interval = stats.bounds_interval(stats.ratios(draws, base))
            in_tokens, tokens_interval = (_in_tokens(b, grid.sizes, tokens) for b in (window, interval))
            lines[0].append(Entry(window.text(), interval_text(interval, grid.sizes)))
            own = method == "base"
            lines[1].append(Entry("1x") if own else Entry(ratio.text("x"), interval_text(ratio_interval)))
            lines[2].append(Entry(in_tokens.text(), interval_text(tokens_interval, tokens)))
            bounds = (window, interval, in_tokens, tokens_interval, ratio, ratio_interval)
            csv.append(
                [student, method, f"{threshold:g}", *(_bound(v) for b in bounds for v in (b.low, b.high))]
            )
        for body, line in zip(bodies, lines, strict=True):
            body.append(line)
    header = ["Model", "Method", *(f"at {threshold:g}" for threshold in THRESHOLDS)]
    about = (
        "Effective window: the largest haystack up to which accuracy stays at or above the threshold,"
        f" interpolated over log size through {_listed(grid.sizes)} images."
    )
    legend = "In brackets the 95 % interval: bootstrap over questions and seeds."
    chance = "Half the answers are yes, so 0.5 is what guessing scores: a window at 0.5 says little."
    notes = [grid.questions_note(), about, chance]
    names = ("windows", "window_ratios", "window_tokens")
    titles = (
        "Effective windows in images",
        "Effective windows as ratios to base",
        "Effective windows in tokens",
    )
    tables = []
    for name, title, body in zip(names, titles, bodies, strict=True):
        data = csv if name == "windows" else _plain_rows(header, body)
        extra = {
            "window_ratios": [
                "unknown: both windows lie beyond the sizes that were measured. ?: so does this end."
            ],
            "window_tokens": [
                "Tokens of a prompt as the teacher reads it, linear between the sizes measured."
            ],
        }.get(name, [])
        tables.append(Table(name, title, header, body, data, [*notes, *extra], breaks, legend=legend))
    return tables


def published_windows(resamples: int = 2000) -> Table:
    """The same effective windows read off the paper's own Table 1, and what they say of "3.2 times"."""
    curves = published.curves("table1")
    rng = np.random.default_rng([0, 32])
    rows, breaks = [], set()
    tokens = published.tokens()
    csv = [["model", "method", "threshold", "images_low", "images_high", "ci_low", "ci_high", "tokens_low", "tokens_high"]
           + ["tokens_ci_low", "tokens_ci_high", "ratio_low", "ratio_high", "ratio_ci_low", "ratio_ci_high"]]  # fmt: skip
    drawn: dict[Key, np.ndarray] = {}
    for row, ((model, method), curve) in enumerate(curves.items()):
        if method == "base":
            breaks.add(row)
        sizes, accuracies = list(curve), list(curve.values())
        drawn[model, method] = (
            rng.binomial(PAPER_QUESTIONS, accuracies, (resamples, len(sizes))) / PAPER_QUESTIONS
        )
        base = curves[model, "base"]
        line = [Entry(model), Entry(_method_name(method))]
        for threshold in THRESHOLDS:
            window = stats.effective_window(sizes, accuracies, threshold)
            ratio = window / stats.effective_window(sizes, list(base.values()), threshold)
            own_draws, base_draws = (
                stats.effective_windows(sizes, drawn[key], threshold)
                for key in ((model, method), (model, "base"))
            )
            interval = stats.bounds_interval(own_draws)
            ratio_interval = stats.bounds_interval(stats.ratios(own_draws, base_draws))
            text, detail = window.text(), interval_text(interval, sizes)
            if method != "base":
                text, detail = (
                    f"{text} ({ratio.text('x')})",
                    f"{detail}, ratio {interval_text(ratio_interval)}",
                )
            line.append(Entry(text, detail))
            at = [tokens[size] for size in sizes]
            in_tokens = [_in_tokens(b, sizes, at) for b in (window, interval)]
            bounds = (window, interval, *in_tokens, ratio, ratio_interval)
            csv.append(
                [model, method, f"{threshold:g}", *(_bound(v) for b in bounds for v in (b.low, b.high))]
            )
        rows.append(line)
    source = (
        "Source: the paper's printed Table 1; in parentheses the ratio to base. The CSV file beside holds the windows in"
        " tokens too, by the paper's Table 2. ?: this end lies beyond the printed sizes."
    )
    notes = [source, reading_of_32()]
    legend = (
        f"In brackets the 95 % intervals if each figure came from {PAPER_QUESTIONS} questions, as the paper"
        " states: binomial draws, models drawn apart, for pairing was not published."
    )
    header = ["Model", "Method", *(f"at {threshold:g}" for threshold in THRESHOLDS)]
    title = "Effective windows of the published Table 1, in images"
    return Table("windows_published", title, header, rows, csv, notes, breaks, legend=legend)


def published_ratios() -> dict[tuple[str, float], stats.Bounds]:
    """LAid's effective window over base's by (model, threshold), from the printed Table 1."""
    curves = published.curves("table1")
    out = {}
    for model in ("7B", "3B"):
        for threshold in THRESHOLDS:
            laid, base = (
                stats.effective_window(list(c), list(c.values()), threshold)
                for c in (curves[model, "laid"], curves[model, "base"])
            )
            out[model, threshold] = laid / base
    return out


def reading_of_32(claimed: float = 3.2) -> str:
    """Which thresholds give the abstract's "up to 3.2 times longer effective window" on the printed Table 1."""
    ratios = published_ratios()
    told = "; ".join(
        f"at {threshold:g} {' and '.join(f'{ratios[model, threshold].text()} ({model})' for model in ('7B', '3B'))}"
        for threshold in THRESHOLDS
    )
    near = [
        f"{t:g} ({m}, {r.text()})"
        for (m, t), r in ratios.items()
        if r.low == r.high and abs(r.low / claimed - 1) < 0.05
    ]
    largest = {t: max(r.low for (_, at), r in ratios.items() if at == t) for t in THRESHOLDS}
    possible = [f"{t:g} (at least {stats.number(v)})" for t, v in largest.items() if v <= claimed]
    return (
        f'"Up to {claimed:g} times": the printed figures give, as LAid over base, {told}. Only one reading comes within'
        f" 5 % of {claimed:g}: threshold {' and '.join(near) or 'none'}. As the largest over both students it can only be"
        f" meant at {' and '.join(possible) or 'no threshold'}, the level of Figure 1, where the sizes end before LAid falls."
    )


def interval_text(interval: stats.Bounds, sizes: Sequence[float] | None = None) -> str:
    """As [12.1, 19.0]; an end outside the measured sizes as "< 1" or ">= 150", of a ratio as "?"."""
    below, above = (f"< {stats.number(sizes[0])}", f">= {stats.number(sizes[-1])}") if sizes else ("?", "?")
    low = stats.number(interval.low) if interval.low > 0 else below
    high = stats.number(interval.high) if math.isfinite(interval.high) else above
    if sizes and interval.low == sizes[-1]:
        return f"[{above}]"
    return f"[{low}, {high}]"


def _in_tokens(images: stats.Bounds, sizes: Sequence[int], tokens: Sequence[float]) -> stats.Bounds:
    """Bounds in images as mean prompt tokens, linear in images between measured sizes; 0 and infinity stay."""
    low, high = (
        v if v == 0 or math.isinf(v) else float(np.interp(v, sizes, tokens))
        for v in (images.low, images.high)
    )
    return stats.Bounds(low, high)


def _method_name(method: str) -> str:
    from laid.results.tables import METHOD_NAMES

    return METHOD_NAMES[method]


def _plain_rows(header: list[str], body: list[list[Entry]]) -> list[list[str]]:
    return [header, *([f"{e.text} {e.detail}".strip() for e in row] for row in body)]


def _bound(value: float) -> Any:
    return "inf" if math.isinf(value) else f"{value:.4f}"


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) if sizes else "none"
