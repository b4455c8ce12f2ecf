"""Paired tests between methods, corrected for their number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from laid.results.answers import Model, Results
from laid.results.names import LAID, SHIPPED, ablations
from laid.results.render import Entry, Table, listed, points
from laid.results.statistics import LEVEL, holm_by_kind
from laid.settings import TrainedMethod


def rivals(method: str, results: Results) -> list[str]:
    """What a method is held against, beside base: LAid and LAid+ against what the claims are about and trained methods of the
    user's own, any other against itself without a part."""
    tables, methods = results.settings.tables, results.settings.methods
    if method not in LAID:
        return ablations(method, tables.ablations)
    own = [m for m in tables.methods if m not in SHIPPED and isinstance(methods[m], TrainedMethod)]
    return [*("sft", "kd", *LAID[: LAID.index(method)]), *ablations(method, tables.ablations), *own]


def stars_against_base(
    results: Results, models: Iterable[Model], columns: Sequence[Sequence[int]]
) -> tuple[dict[tuple[Model, int], str], tuple[int, int]]:
    """A star for every model and column (a set of sizes) that differs from the model's base at 5 %, and the sizes of the
    two families of tests (laid.results.statistics.holm_by_kind)."""
    tests = [(model, i) for model in models if model[1] != "base" for i, sizes in enumerate(columns) if sizes]
    found = [results.p_value((model[0], "base"), model, columns[i]) for model, i in tests]
    adjusted, families = holm_by_kind(found, [columns[i] for _, i in tests])
    return {test: "*" if p < LEVEL else "" for test, p in zip(tests, adjusted, strict=True)}, families


def tests_table(results: Results) -> Table:
    """LAid and LAid+ against SFT, KD, their ablations and methods of the user's own, by size and by window, in points."""
    short, long = results.short_long(results.sizes)
    columns = {**{str(size): [size] for size in results.sizes}, "Short": short, "Long": long}
    columns = {name: sizes for name, sizes in columns.items() if sizes}
    pairs = [
        (student, method, rival)
        for student in results.students
        for method in (*LAID, *(m for m in results.settings.tables.ablations if m not in LAID))
        for rival in rivals(method, results)
        if results.has(student, method, rival)
    ]
    found = pd.DataFrame(
        [
            {"student": student, "method": method, "against": rival, "images": "+".join(map(str, sizes))}
            | vars(results.compare((student, rival), (student, method), sizes))
            for student, method, rival in pairs
            for sizes in columns.values()
        ],
        columns=["student", "method", "against", "images", "difference", "low", "high", "test", "p"],
    )
    adjusted, families = holm_by_kind(found["p"].tolist(), [*columns.values()] * len(pairs))
    found["p_holm"] = adjusted
    rows = [
        [Entry(student), Entry(f"{results.names[method]} - {results.names[rival]}")]
        + [points((t.difference, t.low, t.high), "*" if t.p_holm < LEVEL else "") for t in tests.itertuples()]
        for (student, method, rival), tests in found.groupby(["student", "method", "against"], sort=False)
    ]
    formats = dict.fromkeys(("difference", "low", "high"), "{:.6f}") | dict.fromkeys(
        ("p", "p_holm"), "{:.3g}"
    )
    return Table(
        "tests",
        "LAid and LAid+ against SFT, KD and their ablations, difference in accuracy (points)",
        ["Model", "Difference", *columns],
        rows,
        [
            results.questions_note(),
            star_note(results, families, "zero")
            if pairs
            else "Neither LAid nor LAid+ and what they are held against is among the methods.",
            f"Short: mean over {listed(short)} images; long: {listed(long)}.",
        ],
        {i for i, (student, *_) in enumerate(pairs) if i and student != pairs[i - 1][0]},
        legend="In brackets the 95 % interval of one difference by itself: bootstrap over questions and seeds.",
        data=found.assign(**{name: found[name].map(text.format) for name, text in formats.items()}),
    )


def star_note(results: Results, families: int | tuple[int, int], against: str) -> str:
    """What a star means, and what it does not mean where one seed was trained. families: numbers of tests of window
    means and of single sizes, or of all where they are one family."""
    test = "McNemar's exact test on the same questions"
    if not results.one_seed:
        test = f"paired bootstrap over questions and seeds ({test} where neither was trained)"
    among = f"{families} comparisons"
    if isinstance(families, tuple):
        among = f"{families[0]} window means and over {families[1]} sizes, each apart"
    text = f"* differs from {against}: {test}, Holm's correction over {among}, 5 %."
    return text + (" One training seed: the tests say nothing of other seeds." if results.one_seed else "")
