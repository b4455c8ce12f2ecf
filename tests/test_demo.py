"""tools/demo.sh: `make demo` goes on where a killed one stopped, and is one line where somebody else is at work."""

import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools/demo.sh"
BUILT = ["snakemake --cores 2 --rerun-incomplete", "laid tables"]
UNLOCK = "snakemake --unlock --quiet all"


@contextmanager
def someone(kind, folder, mark):
    if kind == "demo":
        with open(mark, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
    elif kind == "snakemake":
        words = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "/opt/bin/snakemake"]
        with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            yield
            process.kill()
    else:
        yield


@pytest.mark.parametrize(
    ("marked", "locked", "other", "said"),
    [
        (False, False, None, BUILT),
        (True, False, None, BUILT),
        (True, True, None, [UNLOCK, *BUILT]),  # killed
        (False, True, None, "is locked by a Snakemake that was killed or runs on another machine"),
        (True, True, "snakemake", "Snakemake is at work in this folder (process "),
        (False, False, "demo", "another one is at work in this folder"),
    ],
)
def test_what_a_demo_finds(tmp_path, marked, locked, other, said):
    (tmp_path / "bin").mkdir()
    for name in ("snakemake", "laid"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    mark = tmp_path / ".snakemake/demo"
    if marked:
        mark.touch()
    if locked:
        (tmp_path / ".snakemake/locks/0.input.lock").touch()
    with someone(other, tmp_path, mark):
        done = subprocess.run(
            ["bash", SCRIPT, "2"],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if isinstance(said, list):
        assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, said, "")
        assert not mark.exists()
    else:
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
        assert not done.stdout
