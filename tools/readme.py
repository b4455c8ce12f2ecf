"""Put the measured tables and claims of a scale into README.md, with the command and the commit that made them.

python tools/readme.py results/small        (`make readme`)
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from laid.errors import LaidError
from laid.io import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]


def fill(text: str, name: str, body: str, inline: bool = False) -> str:
    """`text` with what stands between the markers of `name` replaced by `body`."""
    gap = "" if inline else "\n"
    pattern = rf"(<!-- laid:{name} -->).*?(<!-- /laid:{name} -->)"
    found, count = re.subn(pattern, lambda m: f"{m[1]}{gap}{body}{gap}{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise LaidError(f"README.md: {count} places marked laid:{name}, expected 1")
    return found


def table(file: Path) -> str:
    """A table's Markdown with its title one level lower."""
    if not file.is_file():
        raise LaidError(f"{file}: no such file; run `make demo` first")
    return re.sub(r"^#{1,2} ", "### ", file.read_text(encoding="utf-8").strip(), flags=re.MULTILINE)


def made(results: Path) -> str:
    """One sentence: the command, the code and the machine behind the cells. Raises LaidError without cells."""
    codes, machines, seeds = set(), set(), 1
    for path in sorted(results.glob("cells/*/*/cost.json")):
        hardware = read_json(path)["hardware"]
        graphics = ", ".join(hardware["gpus"]) or "no GPU"
        memory = hardware["memory_bytes"] / 2**30
        machines.add(f"{hardware['cores']} cores of {hardware['cpu']}, {memory:.0f} GiB, {graphics}")
        for cell in path.parent.glob("[0-9]*.json"):
            content = read_json(cell)
            code, seeds = content["provenance"]["code"], max(seeds, len(content["seeds"]))
            state = " with uncommitted changes" if code["dirty"] else ""
            codes.add(f"`{(code['commit'] or 'unknown')[:12]}`{state}")
    if not codes:
        raise LaidError(f"{results}: no cells; run `make demo` first")
    command = "make demo" if seeds == 1 else f"snakemake --cores all --config seeds={seeds}"
    return (
        f"Made by `{command}` at commit {' and '.join(sorted(codes))}, on {' and '.join(sorted(machines))}; this section"
        " is written by `make readme`."
    )


def main(results: Path) -> int:
    try:
        tables = [table(results / "tables" / f"{name}.md") for name in ("table1", "table2", "table3")]
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        text = fill(text, "results", "\n\n".join([made(results), *tables]))
        # The verdicts; the statements and figures behind each stand in claims.md and in the report.
        verdicts = table(results / "claims" / "claims.md").split("\n### ", 1)[0].split("\n", 1)[1].strip()
        text = fill(text, "claims", verdicts)
        write_text(ROOT / "README.md", text)
        (ROOT / "docs" / "img").mkdir(parents=True, exist_ok=True)
        for name in ("figure1.png", "distance_schedule.png"):
            shutil.copyfile(results / "figures" / name, ROOT / "docs" / "img" / name)
    except (LaidError, OSError) as error:
        print(f"readme: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/small")))
