"""Copy a scale's tables and verdicts into docs/results.md, and a short table of them into README.md.

    python tools/readme.py results/small        (`make readme`)
    python tools/readme.py                      the short table alone, from docs/results.md as it stands

The short table is Table 1 with its sizes drawn together, so the README says nothing that docs/results.md does not.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from statistics import mean

from laid.errors import LaidError
from laid.io import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"


def between(text: str, name: str) -> re.Match[str]:
    """What stands between the markers of `name`. Raises LaidError unless they stand there once."""
    found = list(re.finditer(rf"(?<=<!-- laid:{name} -->\n).*?(?=<!-- /laid:{name} -->)", text, re.DOTALL))
    if len(found) != 1:
        raise LaidError(f"{len(found)} places marked laid:{name}, expected 1")
    return found[0]


def fill(file: Path, name: str, body: str) -> None:
    """Replace what stands between the markers of `name` in a file."""
    text = file.read_text(encoding="utf-8")
    place = between(text, name)
    write_text(file, f"{text[: place.start()]}{body.strip()}\n{text[place.end() :]}")


def table(file: Path) -> str:
    """A table's Markdown with its titles one level lower."""
    if not file.is_file():
        raise LaidError(f"{file}: no such file; run `make report` first")
    return re.sub(r"^#{1,2} ", "### ", file.read_text(encoding="utf-8").strip(), flags=re.MULTILINE)


def made(results: Path) -> str:
    """One sentence: the command, the code and the machine behind the cells. Raises LaidError without cells."""
    codes, machines, seeds = set(), set(), 1
    for path in sorted(results.glob("cells/test/*/*/*cost.json")):
        hardware = read_json(path)["hardware"]
        graphics = ", ".join(hardware["gpus"]) or "no GPU"
        memory = hardware["memory_bytes"] / 2**30
        machines.add(f"{hardware['cores']} cores of {hardware['cpu']}, {memory:.0f} GiB, {graphics}")
    for path in sorted(p for p in results.glob("cells/test/*/*/*.json") if p.stem.isdigit()):
        cell = read_json(path)
        code, seeds = cell["provenance"]["code"], max(seeds, len(cell["seeds"]))
        changed = " with uncommitted changes" if code["dirty"] else ""
        codes.add(f"`{(code['commit'] or 'unknown')[:12]}`{changed}")
    if not codes:
        raise LaidError(f"{results}: no cells; run `make demo` first")
    shown = any(results.glob("cells/test/*/yarn_tuned/"))
    more = " --configfile configs/readme.yaml" if shown else f" --config seeds={seeds}" if seeds > 1 else ""
    command = f"snakemake --cores all{more}" if more else "make demo"
    return (
        f"Made by `{command}` at commit {' and '.join(sorted(codes))}, on {' and '.join(sorted(machines))}; this section"
        " is written by `make readme`."
    )


def short(results: str) -> str:
    """The README's table from the text of docs/results.md: a row of Table 1 with its short and its long sizes averaged."""
    first = results.split("### Table 1", 1)[1].split("\n### ", 1)[0]
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in first.splitlines()
        if line.startswith("|")
    )
    sizes = re.search(r"short ([\d, ]+), long ([\d, ]+) images", first)
    if not sizes:
        raise LaidError(f"{RESULTS}: Table 1 does not say which sizes are short and which are long")
    windows = [[size.strip() for size in part.split(",")] for part in sizes.groups()]
    lines = [
        f"| Model | Method | {', '.join(windows[0])} images | {', '.join(windows[1])} images | {header[-1]} |",
        "|---|---|--:|--:|--:|",
    ]
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        means = [mean(float(re.search(r"\d+\.\d+", cells[size])[0]) for size in part) for part in windows]
        lines.append(f"| {row[0]} | {row[1]} | {means[0]:.1f} | {means[1]:.1f} | {row[-1]} |")
    code = re.search(r"Made by `.+?` at commit `.+?(?=, on )", results)
    return "\n".join([*lines, "", f"{code[0]}." if code else ""])


def main(results: Path | None) -> int:
    try:
        if results:
            beyond = ["table1_beyond"] if (results / "tables/table1_beyond.md").is_file() else []
            names = ["table1", *beyond, "table2", "table3"]
            tables = [table(results / "tables" / f"{name}.md") for name in names]
            fill(RESULTS, "results", "\n\n".join([made(results), *tables]))
            # The verdicts; the statements and figures behind each stand in claims.md and in the report.
            verdicts = table(results / "claims" / "claims.md").split("\n### ", 1)[0].split("\n", 1)[1]
            fill(RESULTS, "claims", verdicts)
            for name in ("figure1.png", "distance_schedule.png"):
                shutil.copyfile(results / "figures" / name, ROOT / "docs" / "img" / name)
        fill(README, "results", short(RESULTS.read_text(encoding="utf-8")))
    except (LaidError, OSError) as error:
        print(f"readme: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
