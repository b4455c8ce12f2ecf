"""tools/install.sh: uv where it is found, pip where uv finds no package."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools/install.sh"


def program(path: Path, says: str, status: int = 0) -> Path:
    path.write_text(f'#!/bin/sh\necho "{says} $*"\nexit {status}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("uv", "said"),
    [
        (0, ["uv pip install --quiet --python PYTHON --no-deps -e ."]),
        (2, ["uv pip install --quiet --python PYTHON --no-deps -e .", "pip -m pip install --no-deps -e ."]),
        (None, ["pip -m pip install --no-deps -e ."]),
    ],
)
def test_who_installs(tmp_path, uv, said):
    python = program(tmp_path / "python", "pip")
    if uv is not None:
        program(tmp_path / "uv", "uv", uv)
    done = subprocess.run(
        ["bash", SCRIPT, python, "--no-deps", "-e", "."],
        env={"PATH": os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"])},
        capture_output=True,
        text=True,
        check=True,
    )
    plain = done.stdout.replace(str(python), "PYTHON").replace(" --quiet --disable-pip-version-check", "")
    assert plain.splitlines() == said
