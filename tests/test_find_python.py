"""tools/find_python.sh: `make` puts .venv/bin first on the PATH and deletes .venv when its lock changes."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "tools/find_python.sh"


def test_an_environment_is_not_made_of_the_one_it_replaces(tmp_path):
    bin_ = tmp_path / ".venv/bin"
    bin_.mkdir(parents=True)
    for name in ("python3.12", "python3.11", "python3"):
        (bin_ / name).symlink_to(sys.executable)
    path = os.pathsep.join([str(bin_), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", SCRIPT],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and Path(done.stdout.strip()).is_file(), done.stderr
    assert not done.stdout.startswith(str(tmp_path))
