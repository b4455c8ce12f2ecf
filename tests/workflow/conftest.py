"""Real Snakemake processes on a folder of their own, so that tests never meet a run of the user's."""

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
"""


class Workdir:
    """A folder with config.yaml and micro.yaml; runs Snakemake there on the project's Snakefile."""

    def __init__(self, path):
        self.path = Path(path)
        shutil.copy(TOP / "config.yaml", self.path)
        (self.path / "micro.yaml").write_text(MICRO)
        self.root = self.path / "results/micro"

    def snakemake(self, *words, overlay="micro.yaml", ok=True, timeout=300):
        """Run `snakemake ...` here and return its whole output; checks that it succeeds (or, ok=False, fails)."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        source = os.pathsep.join([str(TOP / "src"), os.environ.get("PYTHONPATH", "")])
        command = ["snakemake", "--snakefile", str(TOP / "Snakefile"), "--cores", "2", *map(str, words)]
        if overlay:
            command += ["--configfile", overlay]
        done = subprocess.run(
            command,
            cwd=self.path,
            env={**os.environ, "PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert (done.returncode == 0) is ok, done.stdout[-4000:]
        return done.stdout

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
    return Workdir(tmp_path)


@pytest.fixture(scope="module")
def shared_workdir(tmp_path_factory):
    return Workdir(tmp_path_factory.mktemp("workflow"))
