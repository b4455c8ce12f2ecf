"""The figures that the paper prints (Zhou et al., AAAI 2026), as data: what our own results are held against."""

from __future__ import annotations

import csv
from pathlib import Path

# The paper's names of methods, and ours.
METHODS = {"base": "base", "yarn": "yarn", "selfextend": "self_extend", "sft_lora": "sft", "laid": "laid"}


def rows(name: str) -> list[dict[str, str]]:
    """The rows of "table1", "table2" or "table3" as printed, keyed by column, all values text."""
    path = Path(__file__).with_name(f"{name}.csv")
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(line for line in handle if not line.startswith("#")))


def curves(name: str) -> dict[tuple[str, str], dict[int, float]]:
    """Accuracy as a fraction by (model, our method name) and haystack size, from "table1" or "table3"."""
    return {
        (row["params"], METHODS.get(row["method"], row["method"])): {
            int(column): float(value) / 100 for column, value in row.items() if column.isdigit()
        }
        for row in rows(name)
    }


def tokens() -> dict[int, float]:
    """Average prompt tokens by haystack size, as Table 2 prints them."""
    return {int(row["images"]): float(row["avg_tokens"]) for row in rows("table2")}


def gains(name: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Printed (short, long) gains in percent by (model, our method name), base rows left out."""
    return {
        (row["params"], METHODS.get(row["method"], row["method"])): (
            float(row["short_gain_pct"]),
            float(row["long_gain_pct"]),
        )
        for row in rows(name)
        if row["short_gain_pct"]
    }
