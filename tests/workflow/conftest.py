"""Real Snakemake processes on a folder of their own, so that tests never meet a run of the user's."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]

MICRO = """\
scale: micro
data: {rendered: {train: 240, val: 160}}
haystacks:
  train: {questions: 40}
  validation: {questions: 10, sizes: [5]}
  test: {questions: 10, sizes: [1, 5]}
beyond: {table: false}
"""


class Workdir:
    """A folder with config.yaml and micro.yaml; runs Snakemake there on the project's Snakefile."""

    def __init__(self, path):
        self.path = Path(path)
        for name in ("config.yaml", "claims.yaml"):
            shutil.copy(TOP / name, self.path)
        (self.path / "micro.yaml").write_text(MICRO)
        self.root = self.path / "results/micro"

    def copy(self, path):
        """The same files, times and all, in another folder."""
        shutil.copytree(self.path, path, symlinks=True, ignore=shutil.ignore_patterns("locks"))
        other = copy.copy(self)
        other.path, other.root = path, path / "results/micro"
        return other

    def start(self, *words, overlay="micro.yaml", env=None, output=subprocess.PIPE):
        """Start `snakemake ...` here; its output, errors and all, goes to a pipe or to the file `output`."""
        env = dict(env or os.environ)
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        env["PYTHONPATH"] = os.pathsep.join([str(TOP / "src"), env.get("PYTHONPATH", "")])
        command = ["snakemake", "--snakefile", str(TOP / "Snakefile"), "--cores", "2", *map(str, words)]
        command += ["--configfile", overlay] if overlay else []
        handle = open(output, "w") if isinstance(output, Path) else output  # noqa: SIM115 (the process keeps it)
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**env, "OMP_NUM_THREADS": "1"},
            stdout=handle,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def snakemake(self, *words, ok=True, timeout=300, **options):
        """Run `snakemake ...` here and return its whole output; checks that it succeeds (or, ok=False, fails)."""
        process = self.start(*words, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert (process.returncode == 0) is ok, output[-4000:]
        return output

    def planned(self, *words, **options):
        """rule -> number of jobs that a dry run of these words would start."""
        output = self.snakemake("--dry-run", *words, **options)
        if "Nothing to be done" in output:
            return {}
        table = output.rpartition("Job stats:")[2].split("total")[0].splitlines()
        rows = [line.split() for line in table if len(line.split()) == 2 and line.split()[1].isdigit()]
        return {rule: int(count) for rule, count in rows}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "my work").mkdir()
    return Workdir(tmp_path / "my work")  # a blank, as users' paths have


@pytest.fixture(scope="module")
def shared_workdir(tmp_path_factory):
    return Workdir(tmp_path_factory.mktemp("my workflow"))
