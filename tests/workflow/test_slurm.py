"""The workflow on a real Slurm (tools/slurm), and what happens to trainings when things break.

Minutes long, so they run only where they are asked for: `make test PYTEST_ARGS='-m ""'`, as in .ci/run. They need
Slurm's packages. Three trainings of one `snakemake --profile slurm` meet a fault each; while that one waits for a time
limit to pass, another Snakemake is killed and started again.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from laid.provenance import fingerprint

TOP = Path(__file__).resolve().parents[2]
# Enough steps to be interrupted, and a checkpoint after each.
LONGER = """
family: {pretrain: {threshold: 0, vision: {steps: 5}}, members: {small: {window: 3, steps: 5}}}
training: {epochs: 12, checkpoint_minutes: 0.00001, log_every: 5}
"""
RUNS = "results/micro/runs/small/sft"
CANCELLED, TOO_LONG, NODE_DOWN, ORPHANED = SEEDS = range(4)
os.environ["PATH"] += ":/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not shutil.which("slurmctld"), reason="Slurm is not installed (docs/guides/cluster.md)"
    ),
]


class Cluster:
    """A private Slurm of six nodes, each with one CPU and a stand-in GPU that it really allocates."""

    def __init__(self, state):
        self.state, self.started = state, []
        self.env = {
            **os.environ,
            "SLURM_CONF": f"{state}/slurm.conf",
            "PATH": f"{state}/bin:{os.environ['PATH']}",
        }

    def command(self, *words, **env):
        done = subprocess.run(words, env=self.env | env, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    def start(self):
        settings = {"SLURM_NODES": "6", "SLURM_CPUS": "1", "SLURM_GPUS": "1", "SLURM_NODE_TIMEOUT": "10"}
        self.command("bash", TOP / "tools/slurm/start.sh", self.state, **settings)

    def stop(self):
        self.command("bash", TOP / "tools/slurm/stop.sh", self.state)

    def jobs(self, seed):
        """The trainings with this seed, oldest first: [(id, state, node)]."""
        lines = self.command("squeue", "-h", "--states=all", "-o", "%i|%T|%N|%k", "--sort=i").splitlines()
        rows = [line.split("|") for line in lines]
        return [tuple(row[:3]) for row in rows if row[3].endswith(f"_{seed}")]

    def switch_off(self, node, job):
        """As a power cut does it: the node's daemon and all processes of `job` are gone at once."""
        steps = [
            p
            for p in psutil.process_iter(["cmdline"])
            if f"slurmstepd: [{job}." in " ".join(p.info["cmdline"] or [])
        ]
        doomed = [psutil.Process(int((self.state / f"slurmd.{node}.pid").read_text())), *steps]
        for process in doomed + [child for step in steps for child in step.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a child may end with its parent
                process.kill()

    def switch_on(self, node):
        (self.state / f"slurmd.{node}.pid").unlink()
        self.command("slurmd", "-N", node)


@pytest.fixture(scope="module")
def cluster():
    state = Path(tempfile.mkdtemp(prefix="laid-slurm-"))  # munge wants a path that everybody may enter
    state.chmod(0o755)
    found = Cluster(state)
    found.start()
    yield found
    for process in found.started:  # of a test that failed
        process.kill()
        process.wait()
    found.stop()
    shutil.rmtree(state)


@pytest.fixture(scope="module")
def undisturbed(shared_workdir):
    """The folder with everything the trainings need, and what each leaves where nothing disturbs it, by seed."""
    work = shared_workdir
    shutil.copytree(TOP / "slurm", work.path / "slurm")
    (work.path / "micro.yaml").write_text((work.path / "micro.yaml").read_text() + LONGER)
    work.snakemake(*(f"{RUNS}/seed{seed}" for seed in SEEDS))
    expected = {seed: contents(work, seed) for seed in SEEDS}
    shutil.rmtree(work.path / RUNS)
    return work, expected


def contents(work, seed):
    """What a run leaves: model, log and record."""
    run = work.path / f"{RUNS}/seed{seed}"
    return fingerprint(run / "model"), (run / "log.jsonl").read_bytes(), (run / "run.json").read_bytes()


class Running:
    """`snakemake --profile slurm` at work on the trainings of these seeds."""

    def __init__(self, work, cluster, *seeds):
        self.work, self.cluster, self.seeds = work, cluster, seeds
        self.at_once = dict.fromkeys(seeds, 0)
        self.output = work.path / "snakemake.log"
        self.process = work.start(
            *(f"{RUNS}/seed{seed}" for seed in seeds), "--profile", "slurm", "--set-resources", "train:gpu=1",
            "--slurm-init-seconds-before-status-checks", "1", env=cluster.env, output=self.output,
        )  # fmt: skip
        cluster.started.append(self.process)

    def until(self, what, found, seconds=300):
        """Wait for `found()` and return it; notes meanwhile how many jobs of one training run at once."""
        end = time.monotonic() + seconds
        while not (result := found()):
            for seed in self.seeds:
                running = [job for job in self.cluster.jobs(seed) if job[1] == "RUNNING"]
                self.at_once[seed] = max(self.at_once[seed], len(running))
            assert time.monotonic() < end, f"not after {seconds} s: {what}\n{self.output.read_text()[-3000:]}"
            ended = self.process.poll()
            assert ended in (None, 0) or what == "end", self.output.read_text()[-4000:]
            time.sleep(0.05)
        return result

    def hold(self, *seeds):
        """Let each of these trainings stand still as soon as it has a checkpoint: {seed: (process, job id, node)}."""
        held = {}

        def all_held():
            for seed in set(seeds) - held.keys():
                if (self.work.path / f"{RUNS}/.seed{seed}.checkpoint/state.json").is_file():
                    process = next(p for p in psutil.process_iter(["cmdline", "cwd"]) if self.trains(p, seed))
                    process.suspend()
                    held[seed] = (process, *self.cluster.jobs(seed)[-1][::2])
            return len(held) == len(seeds)

        self.until("checkpoints", all_held)
        return held

    def trains(self, process, seed):
        words = process.info["cmdline"] or []
        return (
            words[2:3] == ["train"]
            and f"{RUNS}/seed{seed}" in words
            and process.info["cwd"] == str(self.work.path)
        )

    def end(self):
        self.until("end", lambda: self.process.poll() is not None)
        assert self.process.returncode == 0, self.output.read_text()[-4000:]

    def log(self, seed):
        """What the training with this seed said last; a new job begins with removing the old one's log."""
        path = self.work.root / f"logs/train/small-sft-seed{seed}.log"
        return path.read_text() if path.exists() else ""

    def states(self, seed):
        return [state for _, state, _ in self.cluster.jobs(seed)]


@pytest.fixture(scope="module")
def disturbed(cluster, undisturbed):
    """Three trainings in the middle of their faults; what comes of them takes more than a minute."""
    run = Running(undisturbed[0], cluster, CANCELLED, TOO_LONG, NODE_DOWN)
    held = run.hold(CANCELLED, TOO_LONG, NODE_DOWN)
    cluster.command(
        "scontrol", "update", f"JobId={held[TOO_LONG][1]}", "TimeLimit=1"
    )  # the least that Slurm knows
    cluster.command("scancel", held[CANCELLED][1])
    _, job, node = held[NODE_DOWN]
    cluster.switch_off(node, job)
    yield run
    cluster.switch_on(node)


def test_a_killed_snakemake_can_be_started_again(cluster, undisturbed, disturbed, tmp_path):
    """Its job runs on meanwhile. The new one waits for that instead of writing beside it, and takes what it made."""
    (work, expected), seed = undisturbed, ORPHANED
    work = work.copy(tmp_path / "other")
    first = Running(work, cluster, seed)
    process, _, _ = first.hold(seed)[seed]
    first.process.kill()
    first.process.wait()
    work.snakemake("--unlock", "--profile", "slurm", env=cluster.env)
    second = Running(work, cluster, seed)
    second.until("the new job waits", lambda: "another process is making it" in second.log(seed))
    process.resume()
    second.end()
    assert "was made meanwhile, from the same inputs" in second.log(seed)
    assert second.states(seed) == ["COMPLETED", "COMPLETED"]
    assert contents(work, seed) == expected[seed]


def test_a_training_gets_its_gpu_on_one_node(cluster, disturbed):
    job = cluster.jobs(TOO_LONG)[0][0]
    said = cluster.command("scontrol", "show", "job", job)
    assert re.search(r"NumNodes=1(-1)?\s", said) and re.search(r"TresPerJob=gres[:/]gpu:1", said)


@pytest.mark.parametrize(
    ("seed", "fate"),
    [(CANCELLED, "CANCELLED"), (NODE_DOWN, "NODE_FAIL"), (TOO_LONG, "TIMEOUT")],
    ids=["cancelled", "node down", "over its time limit"],
)
def test_a_disturbed_training_goes_on_to_the_same_bytes(undisturbed, disturbed, seed, fate):
    (work, expected), run = undisturbed, disturbed
    run.end()
    assert run.states(seed) == [fate, "COMPLETED"] and run.at_once[seed] == 1
    assert "goes on after step" in run.log(seed)
    nodes = [node for _, _, node in run.cluster.jobs(seed)]
    assert seed != NODE_DOWN or nodes[0] != nodes[1]
    assert contents(work, seed) == expected[seed]
