"""tools/demo.sh: `make demo` goes on where a killed one stopped, and is one line where somebody else is at work."""

import fcntl
import os
import signal
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


def demo(folder, **words):
    """`make demo` with other programs: what `words` has of a name, and what they were called with."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("snakemake", "laid"):
        (folder / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*"\n{words.get(name, "")}\n')
        (folder / "bin" / name).chmod(0o755)
    return subprocess.run(
        ["bash", SCRIPT, "2"],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_home_that_cannot_be_written_is_no_obstacle_to_snakemake(tmp_path):
    show = ["make", "-s", "--eval", "show: ; @echo $${XDG_CACHE_HOME:-}", "show"]
    for home, cache in ((tmp_path, ""), (tmp_path / "none", f"{SCRIPT.parents[1]}/.snakemake/cache")):
        env = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
        done = subprocess.run(
            show,
            cwd=SCRIPT.parents[1],
            env=env | {"HOME": str(home)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == cache


@pytest.mark.parametrize("end", ["exit 1", "kill -INT $PPID; sleep 0.2; exit 130", "kill -9 $$"])
def test_a_second_demo_goes_on(tmp_path, end):
    """After Ctrl-C and after Snakemake was killed, its lock left and a job of it still at work."""
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    job = "sleep 600 >/dev/null 2>&1 & echo $! >job"
    first = demo(tmp_path, snakemake=f"{job}; touch .snakemake/locks/0.input.lock; {end}")
    assert first.returncode and first.stdout.splitlines() == BUILT[:1]
    second = demo(tmp_path, snakemake="rm -f .snakemake/locks/*")
    os.kill(int((tmp_path / "job").read_text()), signal.SIGKILL)
    assert (second.returncode, second.stdout.splitlines(), second.stderr) == (0, [UNLOCK, *BUILT], "")


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
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    mark = tmp_path / ".snakemake/demo"
    if marked:
        mark.touch()
    if locked:
        (tmp_path / ".snakemake/locks/0.input.lock").touch()
    with someone(other, tmp_path, mark):
        done = demo(tmp_path)
    if isinstance(said, list):
        assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, said, "")
        assert not mark.exists() or locked  # which the programs of this test do not take away
    else:
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
        assert not done.stdout
