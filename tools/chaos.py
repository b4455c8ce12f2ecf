"""Build a configuration undisturbed, then once more through every disturbance, and compare every byte of the results.

    python tools/chaos.py --config config.yaml configs/ci.yaml --kills 20

The second build is killed with signal 9 at random moments, spread over all of its jobs (every third time Snakemake alone, whose
jobs run on), and once each stopped by SIGTERM and by Ctrl-C, left without room on its disk (a small tmpfs where mount is allowed, else a limit
on the size of files), and met by a second Snakemake in the same folder, which must be refused, then by one that
disregards the lock. After each it is started again. Left at the end may be neither a difference, nor a half-written file,
nor anything to do, and no job may have ended in a traceback. Exit status 1: one of these.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from same_bytes import TOP, compare

from laid import provenance
from laid.errors import LaidError
from laid.settings import load

ONCE = ("SIGTERM", "SIGINT", "no room", "two at once")
PATIENCE = 600  # seconds for a build to end once it is told to


class Builds:
    """Snakemake processes, one after another, on results in a folder of their own."""

    def __init__(self, folder: Path, config: list[Path], targets: list[str], cores: int):
        self.folder, self.targets = folder, targets
        self.command = ["snakemake", "--snakefile", str(TOP / "Snakefile"), "--cores", str(cores)]
        self.command += [
            "--config",
            "results=results",
            "--configfile",
            *(str(file.resolve()) for file in config),
        ]
        self.logs: dict[int, Path] = {}  # by the number of a process, which is its group's too
        self.groups: set[int] = set()  # that may have processes at work
        self.results = folder / "results"
        self.results.mkdir(parents=True)

    def start(self, *options: str, under: Sequence[str] = ()) -> subprocess.Popen:
        """Start a build in a process group of its own; what it says goes to a file (`said`)."""
        file = self.folder / f"{len(self.logs)}.log"
        with open(file, "w") as log:
            process = subprocess.Popen(
                [*under, *self.command, *options, "--", *self.targets],
                cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.logs[process.pid] = file
        self.groups.add(process.pid)
        return process

    def said(self, process: subprocess.Popen) -> str:
        return self.logs[process.pid].read_text(errors="replace")

    def go_on(self, under: Sequence[str] = ()) -> subprocess.Popen:
        """Start after a build that did not end by itself."""
        # As `snakemake --unlock` does, without its start.
        shutil.rmtree(self.folder / ".snakemake/locks", ignore_errors=True)
        return self.start(under=under)

    def running(self, process: subprocess.Popen) -> list[str]:
        """The rules whose jobs have begun and not ended."""
        said = self.said(process)
        begun = re.findall(r"^(?:local)?rule (\w+):.*?^    jobid: (\d+)$", said, re.MULTILINE | re.DOTALL)
        done = set(re.findall(r"^Finished jobid: (\d+)", said, re.MULTILINE))
        return [rule for rule, job in begun if job not in done]

    def finished(self, process: subprocess.Popen) -> int:
        """How many jobs have ended well."""
        return len(re.findall(r"^Finished jobid: ", self.said(process), re.MULTILINE))

    def wait(self, process: subprocess.Popen, seconds: float, jobs: int = 0) -> bool:
        """Let it finish so many jobs, then work for `seconds` more with one begun; whether it is still at work then."""
        while process.poll() is None and not (self.finished(process) >= jobs and self.running(process)):
            time.sleep(0.1)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for its good end. Raises LaidError where it fails."""
        if status := process.wait():
            raise LaidError(f"exit status {status}: {self.said(process)[-2000:]}")

    def kill(self) -> None:
        """End all that was started here."""
        for process in self.at_work():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def at_work(self) -> list[psutil.Process]:
        """All processes that were started here, by Snakemake too."""
        found, groups = [], set()
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                group = os.getpgid(process.pid)
                if group in self.groups and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
                    groups.add(group)
        self.groups = groups
        return found

    def orphans_end(self) -> None:
        """Wait for jobs whose Snakemake was killed."""
        while self.at_work():
            time.sleep(0.5)


def disturb(builds: Builds, fault: str, jobs: int, seconds: float, disk: Disk | None) -> str:
    """One build under one fault, `seconds` after that many of its jobs; what it did when it came."""
    if fault == "no room" and disk:
        process = builds.go_on(under=disk.full())
        status = process.wait()
        disk.empty()
        said = re.search(r"^laid .*: error: .*$", builds.said(process), re.MULTILINE)
        return said[0] if said else builds.said(process)[-2000:] if status else "what was left to do had room"
    process = builds.go_on()
    if not builds.wait(process, seconds, jobs):
        builds.finish(process)
        return "the build was over"
    met = ", ".join(builds.running(process)) or "between jobs"
    if fault == "two at once":
        second = builds.start()
        refused = second.wait(PATIENCE) and "cannot be locked" in builds.said(second)
        if process.poll() == 0:
            return "the build was over"
        if not refused:
            raise LaidError(f"a second Snakemake was not refused: {builds.said(second)[-2000:]}")
        third = builds.start("--nolock")
        builds.wait(third, seconds)
        builds.kill()
        third.wait(PATIENCE)
    elif fault == "kill -9 of Snakemake alone":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL if fault == "kill -9" else signal.Signals[fault])
    process.wait(PATIENCE)
    return met


class Disk:
    """Where the results lie, made full for one build."""

    def __init__(self, folder: Path):
        self.folder = folder
        words = ["mount", "-t", "tmpfs", "-o", "size=80%", "laid-chaos", folder]
        self.mounted = not subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode

    def _resize(self, size: str | int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    def full(self, left: int = 300) -> list[str]:
        """Leave that many kilobytes; or the words before a command that let it write no larger file."""
        if not self.mounted:
            return ["bash", "-c", f'ulimit -f {left}; exec "$@"', "limited"]
        state = os.statvfs(self.folder)
        self._resize((state.f_blocks - state.f_bfree) * state.f_frsize + 1024 * left)
        return []

    def empty(self) -> None:
        if self.mounted:
            self._resize("80%")

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=True)


def faults(
    kills: int, others: Sequence[str], chance: random.Random, jobs: int, seconds: float
) -> list[tuple[str, int, float]]:
    """(fault, jobs that its build finishes before it, seconds after those), in an order of chance.

    jobs: of the whole build, over which the faults are spread evenly: what a killed job did is lost, so that moments on the clock
    would all be moments of the first long one. seconds: of one job.
    """
    found = [("kill -9 of Snakemake alone" if k % 3 == 2 else "kill -9") for k in range(kills)] + [*others]
    chance.shuffle(found)
    moments = sorted(int(chance.uniform(0, 0.95 * jobs)) for _ in found)
    return [
        (fault, at - before, chance.uniform(0, seconds))
        for fault, at, before in zip(found, moments, [0, *moments])
    ]


def left_behind(folder: Path) -> list[str]:
    """Half-written files, locks, and what trainings and evaluations go on from, below a folder."""
    hidden = (
        path for path in folder.rglob(".*") if re.search(r"\.(tmp-.*|lock|checkpoint|part)$", path.name)
    )
    return [f"{path.relative_to(folder)}: left behind" for path in hidden]


def run(
    config: list[Path],
    targets: list[str],
    kills: int,
    seed: int,
    cores: int,
    folder: Path,
    others: Sequence[str] = ONCE,
) -> int:
    scale = load(config).scale
    undisturbed = Builds(folder / "undisturbed", config, targets, cores)
    code, started = provenance.code.__wrapped__(), time.monotonic()
    process = undisturbed.start()
    undisturbed.finish(process)
    seconds, jobs = time.monotonic() - started, undisturbed.finished(process)
    print(f"undisturbed: {jobs} jobs, {seconds:.0f} s", flush=True)

    builds = Builds(folder / "disturbed", config, targets, cores)
    disk = Disk(builds.results) if "no room" in others else None
    wrong, count = [], Counter()
    try:
        for fault, after, moment in faults(kills, others, random.Random(seed), jobs, seconds / jobs):
            met = disturb(builds, fault, after, moment, disk)
            builds.at_work()
            count["over" if met == "the build was over" else fault] += 1
            print(f"{fault} after {after} jobs and {moment:.1f} s: {met}", flush=True)
            logs = (builds.results / scale / "logs").rglob("*.log")
            wrong += [
                f"{log}: Traceback, after {fault}"
                for log in logs
                if "Traceback" in log.read_text(errors="replace")
            ]
        builds.orphans_end()
        builds.finish(builds.go_on())
        last = builds.start("--dry-run")
        builds.finish(last)
        if "Nothing to be done" not in builds.said(last):
            wrong.append(f"something is left to do: {builds.said(last)[-500:]}")
        if provenance.code.__wrapped__() != code:
            raise LaidError(f"{TOP} changed meanwhile (a commit, an edit), and records name its commit")
        same, lines = compare(undisturbed.results / scale, builds.results / scale)
        wrong += lines + left_behind(builds.results)
    finally:
        builds.kill()
        if disk:
            disk.remove()
    print(", ".join(f"{number} x {fault}" for fault, number in sorted(count.items())))
    for line in wrong:
        print(line)
    print(f"{same} files compared: " + (f"{len(wrong)} things wrong" if wrong else "the same bytes"))
    return 1 if wrong or not same else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[Path("config.yaml"), Path("configs/ci.yaml")]
    )
    parser.add_argument(
        "--targets", nargs="+", default=["all"], help="files or rules to build (default: all)"
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    # Begun in the background of a script, this ignores Ctrl-C, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="laid-chaos-") as folder:
        try:
            return run(args.config, args.targets, args.kills, args.seed, args.cores, Path(folder))
        except LaidError as error:
            print(f"chaos: error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    raise SystemExit(main())
