"""The workflow on a real Slurm (tools/slurm), and what happens to a training when things break.

Minutes long, so `make test` leaves them out; .ci/run asks for them by `-m slurm`. They need Slurm's packages.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from laid.provenance import fingerprint

TOP = Path(__file__).resolve().parents[2]
TARGET = "results/micro/runs/small/sft/seed0"
# Enough steps to be interrupted, and a checkpoint every second or so.
LONGER = """
family: {pretrain: {threshold: 0, vision: {steps: 5}}, members: {small: {window: 3, steps: 5}}}
training: {epochs: 80, checkpoint_minutes: 0.02, log_every: 5}
"""
os.environ["PATH"] += ":/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="Slurm is not installed (docs/cluster.md)"),
]


class Cluster:
    """A private Slurm of two nodes with one CPU each."""

    def __init__(self, state):
        self.state = state
        self.env = {
            **os.environ,
            "SLURM_CONF": f"{state}/slurm.conf",
            "PATH": f"{state}/bin:{os.environ['PATH']}",
        }

    def start(self):
        settings = {"SLURM_NODES": "2", "SLURM_CPUS": "1", "SLURM_NODE_TIMEOUT": "10"}
        subprocess.run(
            ["bash", TOP / "tools/slurm/start.sh", self.state], env={**os.environ, **settings}, check=True
        )

    def stop(self):
        subprocess.run(["bash", TOP / "tools/slurm/stop.sh", self.state], check=True)

    def jobs(self, states="all"):
        """[(id, state, node, rule)] of all jobs in `states`, oldest first."""
        words = ["squeue", "-h", f"--states={states}", "-o", "%i|%T|%N|%k", "--sort=i"]
        lines = subprocess.run(
            words, env=self.env, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        return [tuple(line.split("|")) for line in lines]

    def command(self, *words):
        subprocess.run(words, env=self.env, check=True)


@pytest.fixture(scope="module")
def cluster():
    state = Path(tempfile.mkdtemp(prefix="laid-slurm-"))  # munge wants a path that everybody may enter
    state.chmod(0o755)
    found = Cluster(state)
    found.start()
    yield found
    found.stop()
    shutil.rmtree(state)


@pytest.fixture(scope="module")
def undisturbed(shared_workdir):
    """The workdir with everything the training needs, and the fingerprint of a run that nothing disturbed."""
    work = shared_workdir
    shutil.copytree(TOP / "slurm", work.path / "slurm")
    (work.path / "micro.yaml").write_text((work.path / "micro.yaml").read_text() + LONGER)
    work.snakemake(TARGET)
    return work, contents(work)


def contents(work):
    """What a run leaves: model, log and record."""
    run = work.path / TARGET
    return fingerprint(run / "model"), (run / "log.jsonl").read_bytes(), (run / "run.json").read_bytes()


class Running:
    """`snakemake --profile slurm` at work on the training, from nothing."""

    def __init__(self, work, cluster, fresh=True):
        self.work, self.cluster = work, cluster
        if fresh:
            shutil.rmtree(work.path / "results/micro/runs", ignore_errors=True)
        self.before = {job[0] for job in cluster.jobs()}
        self.log = work.path / "slurm-run.log"
        self.process = work.start(
            TARGET, "--profile", "slurm", "--slurm-init-seconds-before-status-checks", "1",
            env=cluster.env, output=self.log,
        )  # fmt: skip

    def jobs(self):
        return [job for job in self.cluster.jobs() if job[0] not in self.before]

    def at_work(self, seconds=240):
        """Wait for the training's first checkpoint; returns (job id, node)."""
        state = self.work.path / f"{TARGET.rpartition('/')[0]}/.seed0.checkpoint/state.json"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            running = [job for job in self.jobs() if job[1] == "RUNNING"]
            if running and state.is_file():
                return running[-1][0], running[-1][2]
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)
        raise AssertionError(f"no checkpoint after {seconds} s\n{self.log.read_text()[-3000:]}")

    def end(self, seconds=400):
        assert self.process.wait(timeout=seconds) == 0, self.log.read_text()[-4000:]

    def went_on(self):
        return "goes on after step" in (self.work.root / "logs/train/small-sft-seed0.log").read_text()


def test_a_cancelled_training_goes_on_to_the_same_bytes(cluster, undisturbed):
    work, expected = undisturbed
    run = Running(work, cluster)
    job, _ = run.at_work()
    cluster.command("scancel", job)
    run.end()
    states = [state for _, state, _, _ in run.jobs()]
    assert states[0].startswith("CANCELLED") and states[-1] == "COMPLETED"
    assert run.went_on() and contents(work) == expected


def test_a_node_going_down_moves_the_job(cluster, undisturbed):
    work, expected = undisturbed
    run = Running(work, cluster)
    _, node = run.at_work()
    daemon = int((cluster.state / f"slurmd.{node}.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    try:
        run.end()
    finally:
        (cluster.state / f"slurmd.{node}.pid").unlink(missing_ok=True)
        cluster.command("slurmd", "-N", node)
    last = run.jobs()[-1]
    assert last[1] == "COMPLETED" and last[2] != node
    assert contents(work) == expected


def test_a_killed_snakemake_can_be_started_again(cluster, undisturbed):
    """Its job runs on meanwhile; the new one waits for it instead of writing beside it."""
    work, expected = undisturbed
    first = Running(work, cluster)
    first.at_work()
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    work.snakemake("--unlock", "--profile", "slurm", env=cluster.env)
    second = Running(work, cluster, fresh=False)
    second.end()
    assert contents(work) == expected


def test_a_job_over_its_time_limit_gets_more(cluster, undisturbed):
    work, expected = undisturbed
    run = Running(work, cluster)
    job, _ = run.at_work()
    # One minute is the least that Slurm knows; the job is made to stand still until it has passed.
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    cluster.command("scancel", "--signal=STOP", job)
    run.end()
    states = [state for _, state, _, _ in run.jobs()]
    assert "TIMEOUT" in states and states[-1] == "COMPLETED"
    assert run.went_on() and contents(work) == expected
