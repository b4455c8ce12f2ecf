"""Build a configuration twice from nothing, in two ways, and compare every byte of the results.

    python tools/same_bytes.py --config config.yaml configs/ci.yaml
    python tools/same_bytes.py --config config.yaml configs/ci.yaml --against results/ci --target cells/test/small/laid/5.json

The first build has two cores, the second one core and the jobs in another order. With --against there is one build,
compared with results that are there; with --target it makes that file (below <results>/<scale>) and what it needs.
Left out are a build's own logs, benchmarks and costs (time, memory, hardware): LEFT_OUT. Exit status 1: they differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from laid.audit.rebuild import differences
from laid.errors import LaidError
from laid.io import read_json
from laid.results.needed import needed
from laid.settings import load

LEFT_OUT = ("logs/", "benchmarks/", "cost.json")
TOP = Path(__file__).resolve().parents[1]


def compared(root: Path) -> dict[str, Path]:
    """name -> file, for the files below `root` that must be the same in every build."""
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {
        name: path
        for name, path in files.items()
        if not name.startswith(LEFT_OUT[:2])
        and not name.endswith(LEFT_OUT[2])
        and not any(part.startswith(".") for part in name.split("/"))
    }


def compare(first: Path, second: Path, part: bool = False) -> tuple[int, list[str]]:
    """(files compared, one line per difference); with `part`, the second may hold fewer files than the first."""
    ours, theirs = compared(first), compared(second)
    lines = [f"{name}: only in {second}" for name in theirs.keys() - ours.keys()]
    lines += [] if part else [f"{name}: only in {first}" for name in ours.keys() - theirs.keys()]
    both = sorted(ours.keys() & theirs.keys())
    for name in both:
        if ours[name].read_bytes() != theirs[name].read_bytes():
            keys = []
            if name.endswith(".json"):
                keys = list(differences(read_json(ours[name]), read_json(theirs[name])))
            lines.append(f"{name}: differs" + (f": {keys[0]}" if keys else ""))
    return len(both), sorted(lines)


def build(config: list[Path], results: Path, target: str, *options: str) -> None:
    """Run Snakemake with the results below `results`. Raises LaidError where it fails."""
    command = ["snakemake", target, "--snakefile", TOP / "Snakefile", "--quiet", "all", *options]
    command += ["--config", f"results={results}", "--configfile", *config]
    if subprocess.run(command, check=False).returncode:
        raise LaidError(f"the build in {results} failed")


def run(config: list[Path], against: Path | None, target: str | None) -> int:
    settings = load(config)
    scale = settings.scale
    with tempfile.TemporaryDirectory(prefix="laid-twice-") as folder:
        first, second = (Path(folder) / name for name in ("first", "second"))

        def goal(results: Path) -> str:
            return f"{results}/{scale}/{target}" if target else "all"

        if against is None:
            build(config, first, goal(first), "--cores", "2")
            # The cell that the tables name last, and all it needs, come first.
            last = "/".join(map(str, list(needed(settings))[-1]))
            before = f"{second}/{scale}/cells/test/{last}.json"
            build(config, second, goal(second), "--cores", "1", "--prioritize", before)
        else:
            build(config, second, goal(second), "--cores", "2")
        count, lines = compare(against or first / scale, second / scale, part=bool(against))
    for line in lines:
        print(line)
    print(f"{count} files compared: " + (f"{len(lines)} differences" if lines else "the same bytes"))
    return 1 if lines or not count else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("config.yaml")])
    parser.add_argument("--against", type=Path, help="results that are there, <results>/<scale>")
    parser.add_argument("--target", help="one file below <results>/<scale> instead of everything")
    args = parser.parse_args()
    try:
        return run(args.config, args.against, args.target)
    except LaidError as error:
        print(f"same_bytes: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
