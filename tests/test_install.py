"""tools/install.sh: uv where it is found, pip where uv finds no package. What the container takes from this checkout."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
SCRIPT = TOP / "tools/install.sh"


def program(path: Path, says: str, status: int = 0) -> Path:
    path.write_text(f'#!/bin/sh\necho "{says} $*"\nexit {status}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("uv", "said"),
    [
        (0, ["uv pip install --quiet --python PYTHON --no-deps -e ."]),
        (
            2,
            [
                "uv pip install --quiet --python PYTHON --no-deps -e .",
                "pip -m pip install --no-compile --no-deps -e .",
            ],
        ),
        (None, ["pip -m pip install --no-compile --no-deps -e ."]),
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


def test_the_container_fits_the_checkout():
    settings = json.loads((TOP / ".devcontainer/devcontainer.json").read_text())
    lines = (TOP / ".devcontainer" / settings["build"]["dockerfile"]).read_text()
    python = re.search(r"^FROM python:([\d.]+)-", lines, re.MULTILINE)[1]
    assert python in re.search(r"Python (3\.\d+) or (3\.\d+)", (TOP / "README.md").read_text()).groups()
    assert re.search(rf"useradd .* {settings['remoteUser']}$", lines, re.MULTILINE)
    makefile = (TOP / "Makefile").read_text().replace("$(VENV)", ".venv")
    for command in (
        settings["postCreateCommand"],
        " ".join(json.loads(re.search(r"^CMD (.*)", lines, re.MULTILINE)[1])),
    ):
        assert f"\n{command.removeprefix('make ')}:" in makefile
