"""Table and figure of `laid alignability`: how much of a student's queries and keys mixtures of a teacher's heads reach."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from laid.results import plotting
from laid.results.answers import read_records
from laid.results.plotting import Drawing, Look, style
from laid.results.render import Entry, Table, percent

FORMAT = "laid-alignability/1"
SIDES = ("queries", "keys")
KINDS = {"real": "equation 7", "complex": "complex per frequency", "linear": "any linear map"}
LOOKS = {
    "real": Look(plotting.RED, "p", "-"),
    "complex": Look(plotting.BLUE, "s", (0, (4, 1.5))),
    "linear": Look(plotting.BLACK, "o", (0, (1, 1))),
}

Record = Mapping[str, Any]  # of `laid alignability`, one student


def load(folder: str | Path) -> dict[str, Record]:
    """The records of `laid alignability` in a folder, by student."""
    return read_records(folder, FORMAT)


def best(record: Record, side: str) -> tuple[int, Mapping[str, Any]] | None:
    """(layer, what is explained there): the student layer that equation 7 explains most of; None where it is not defined."""
    found = [(pair["layer"], pair[side]["real"]) for pair in record["pairs"] if pair[side]["real"]]
    return max(found, key=lambda entry: entry[1]["share"]) if found else None


def last(record: Record) -> Mapping[str, Any]:
    """The pair of both models' last layers."""
    ends = (record["layers"] - 1, record["teacher_layers"] - 1)
    return next(pair for pair in record["pairs"] if (pair["layer"], pair["teacher_layer"]) == ends)


def table(record: Record) -> Table:
    """One row per pair of layers and side; shares in %, with intervals."""
    rows, breaks = [], set()
    for pair in record["pairs"]:
        breaks.add(len(rows))
        for side in SIDES:
            row = [Entry(f"{pair['layer']} : {pair['teacher_layer']}"), Entry(side)]
            for kind in ("constant", *KINDS):
                part = pair[side][kind]
                value, _, interval = (
                    percent(part["share"], part["interval"]).partition(" ") if part else ("-",) * 3
                )
                row.append(Entry(value, interval if part else ""))
            rows.append(row)
    notes = [_measure(record)]
    if not all(pair[side][kind] for pair in record["pairs"] for side in SIDES for kind in KINDS):
        notes.append("-: not defined, as the two models' head_dim, or the frequencies of their RoPE, differ.")
    return Table(
        record["student"],
        f"What equation 7 can reach of {record['student']}",
        ["Layers", "Of", "constant", *KINDS.values()],
        rows,
        notes,
        breaks - {0},
        legend="Layer of the student : of the teacher; in brackets 95 % intervals over questions.",
    )


def _measure(record: Record) -> str:
    asked, tokens = record["questions"], record["tokens"]["fitted"]
    return (
        "Share (%) that mixtures of the teacher's heads explain of the variance of the student's queries (question tokens) and"
        f" keys (visual tokens) before rotation, on {asked['held_out']} held-out questions; fitted on {asked['fitted']} others"
        f" ({tokens['queries']:,} queries, {tokens['keys']:,} keys), relative ridge {record['ridge']:g}. Constant: what the mean"
        " alone explains of the mean square."
    )


def figure(records: Mapping[str, Record], name: str = "alignability") -> Drawing:
    """The three shares over layers: a column of panels per student, queries above, keys below."""
    with style():
        return _figure(records, name)


def _figure(records: Mapping[str, Record], name: str) -> Drawing:
    wide = plotting.PAGE if len(records) > 1 else plotting.COLUMN
    drawing = plotting.new_figure(wide, 3.7)
    panels = drawing.subplots(len(SIDES), len(records), sharex="col", sharey=True, squeeze=False)
    for column, (student, record) in zip(panels.T, records.items(), strict=True):
        for side, axes in zip(SIDES, column, strict=True):
            axes.axhline(0, **plotting.RULE)
            for kind in KINDS:
                _line(axes, record, side, kind)
        column[0].set_title(student, loc="left", fontweight="bold")
        column[-1].set_xlabel("Layer of the student")
        column[-1].xaxis.get_major_locator().set_params(integer=True)
    for side, row in zip(SIDES, panels, strict=True):
        row[0].set_ylabel(f"{side.capitalize()} explained (%)")
    data = _data(records)
    panels[0][0].set_ylim(max(-30, min(-4, 100 * data.low.min() - 3)), 104)
    plotting.legend_below(drawing, panels, columns=3 if len(records) > 1 else 1)
    return Drawing(
        name,
        "What equation 7 can reach",
        "Share of the variance of the student's queries (question tokens) and keys (visual tokens), before rotation, that"
        " mixtures of the teacher's heads explain on held-out questions, with 95 % intervals over questions. Equation 7: one"
        " weight per teacher head; complex per frequency: all that commutes with RoPE; any linear map: of all the teacher's"
        " heads. Each student layer against the teacher's of the same relative depth; hollow: other pairs that a method aligns."
        f" {_counts(records)}",
        drawing,
        data.assign(**{column: plotting.decimals(data[column]) for column in ("share", "low", "high")}),
    )  # fmt: skip


def _line(axes: Any, record: Record, side: str, kind: str) -> None:
    look = LOOKS[kind]
    for same_depth in (True, False):
        found = [
            (p, p[side][kind]) for p in record["pairs"] if p["same_depth"] == same_depth and p[side][kind]
        ]
        if not found:
            continue
        layers, shares = [p["layer"] for p, _ in found], [part["share"] for _, part in found]
        more = {} if same_depth else {"linestyle": "", "markerfacecolor": "white"}
        plotting.curve(axes, layers, shares, look, KINDS[kind] if same_depth else None, **more)
        plotting.bars(
            axes, layers, shares, *zip(*(part["interval"] for _, part in found), strict=True), look.color
        )
        texts = (
            f"{record['student']}, {side} of layer {p['layer']} from the teacher's {p['teacher_layer']}, {KINDS[kind]}:"
            f" {percent(part['share'], part['interval'])} %"
            for p, part in found
        )
        plotting.hover(axes, layers, shares, texts)


def _counts(records: Mapping[str, Record]) -> str:
    asked = next(iter(records.values()))["questions"]
    return f"{asked['fitted']} questions fit the mixtures, {asked['held_out']} measure them."


def _data(records: Mapping[str, Record]) -> pd.DataFrame:
    rows = [
        (student, pair["layer"], pair["teacher_layer"], side, kind, part["share"], *part["interval"])
        for student, record in records.items()
        for pair in record["pairs"]
        for side in SIDES
        for kind in ("constant", *KINDS)
        if (part := pair[side][kind])
    ]
    return pd.DataFrame(
        rows, columns=["student", "layer", "teacher_layer", "of", "mixture", "share", "low", "high"]
    )
