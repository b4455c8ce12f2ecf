"""Write the lock files in envs/ from the packages installed where this runs.

    python tools/lock.py          where `pip install -e ".[workflow,dvc,zero3,dev]"` was

envs/requirements.lock holds what `make demo` needs, envs/requirements-dev.lock what `make test` needs besides, and
envs/requirements-zero3.lock what DeepSpeed needs besides requirements.lock: apart, since accelerate imports it wherever it finds it. Every
package is pinned with ==, whatever needs it. Packages that exist for one platform only (CUDA libraries, triton) and
local version labels (+cpu) are left out: torch asks for its own companions, and the same pin serves CPU and GPU.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

TOP = Path(__file__).resolve().parents[1]
DEMO_EXTRAS, DEV_EXTRAS = ["workflow"], ["dvc", "dev"]
PLATFORM_ONLY = ("nvidia-", "cuda-", "triton")


def closure(roots: list[str]) -> dict[str, str]:
    """name -> version of everything that `roots` need, at any depth, as installed here."""
    found: dict[str, str] = {}
    seen: set[tuple] = set()
    todo = [Requirement(root) for root in roots]
    while todo:
        need = todo.pop()
        name, extras = canonicalize_name(need.name), tuple(sorted(need.extras))
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name.startswith(PLATFORM_ONLY):
            continue
        installed = metadata.distribution(need.name)
        found[name] = Version(installed.version).public
        for line in installed.requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                todo.append(inner)
    return found


def write(path: Path, title: str, pins: dict[str, str]) -> None:
    lines = [f"# {title}", "# Written by tools/lock.py; Python 3.11 and 3.12.", ""]
    path.write_text(
        "\n".join(lines + [f"{name}=={version}" for name, version in sorted(pins.items())]) + "\n"
    )
    print(f"{path.relative_to(TOP)}: {len(pins)} packages")


def main() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    build, project = project["build-system"]["requires"], project["project"]
    extras = project["optional-dependencies"]
    demo = closure(build + project["dependencies"] + [r for name in DEMO_EXTRAS for r in extras[name]])
    dev = closure([r for name in DEV_EXTRAS for r in extras[name]])
    write(TOP / "envs/requirements.lock", "What `make demo` needs.", demo)
    write(
        TOP / "envs/requirements-dev.lock",
        "What `make test` and `make lint` need besides requirements.lock.",
        {name: version for name, version in dev.items() if name not in demo},
    )
    zero3 = closure(extras["zero3"])
    write(
        TOP / "envs/requirements-zero3.lock",
        "What training.parallel: zero3 needs besides requirements.lock.",
        {name: version for name, version in zero3.items() if name not in demo},
    )


if __name__ == "__main__":
    main()
