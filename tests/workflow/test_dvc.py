"""Real DVC on real Snakemake: recorded once, nothing twice, shared through a folder and through S3."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from laid.config import load
from laid.provenance import fingerprint
from laid.results.tables import needed

TOP = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
pytestmark = [
    pytest.mark.workflow,
    pytest.mark.skipif(not (BIN / "dvc").is_file(), reason="DVC is not installed (make test installs it)"),
]
OUTPUTS = ("results/small/coco", "results/small/haystacks")


class Checkout:
    """A git checkout of the workflow with a configuration of little work."""

    def __init__(self, path):
        self.path = path

    def run(self, *words, **env):
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        source = os.pathsep.join([str(TOP / "src"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.path,
            env={**os.environ, "PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}"
        return done.stdout

    def git(self, *words):
        return self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words)

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "-qm", "state")

    def edit(self, old, new):
        config = self.path / "config.yaml"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new, 1))

    def outputs(self):
        return [fingerprint(self.path / name) for name in OUTPUTS]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Stage `data` reproduced, committed and pushed to the default remote."""
    top = tmp_path_factory.mktemp("dvc") / "checkout"
    top.mkdir()
    for name in ("workflow", "envs", ".dvc"):
        shutil.copytree(TOP / name, top / name, ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in ("Snakefile", "config.yaml", "claims.yaml", "dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(TOP / name, top)
    work = Checkout(top)
    few = {"train: 3000": "train: 240", "val: 1500": "val: 160", "questions: 5000": "questions: 40"}
    few |= {
        "questions: 200": "questions: 10",
        "sizes: [5, 20, 50, 100]": "sizes: [5]",
        "questions: 300": "questions: 10",
    }
    few |= {"sizes: [1, 2, 5, 10, 20, 50, 100, 150]": "sizes: [1, 2, 5, 50, 100]"}
    for old, new in few.items():
        work.edit(old, new)
    work.git("init", "-q")
    work.commit()
    work.made = work.run("dvc", "repro", "data")
    work.commit()
    work.run("dvc", "push", "data")
    return work


def colleague(origin, name):
    """A clone beside `origin`, where the default remote (a folder beside the checkout) is the same one."""
    origin.git("clone", "-q", origin.path, origin.path.parent / name)
    return Checkout(origin.path.parent / name)


def test_stages_cover_what_the_rules_make(origin):
    """An output that a stage forgets would be lost to a colleague; one that no rule makes would stop DVC."""
    stages = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
    outs = [
        next(iter(out)) for stage in stages.values() for out in (*stage["outs"], *stage.get("metrics", ()))
    ]
    assert len(outs) == len(set(outs))
    plan = origin.run("snakemake", "--dry-run", "--forceall", "--cores", "2", "all", "page")
    made = {path for line in re.findall(r"^ +output: (.*)$", plan, re.MULTILINE) for path in line.split(", ")}
    for out in outs:
        assert any(path == out or path.startswith(f"{out}/") for path in made), f"{out}: no rule makes it"
    for path in made:
        if not path.startswith(
            "results/small/tables/"
        ):  # some of them are kept, all are made from cells in a second
            assert any(path == out or path.startswith(f"{out}/") for out in outs), (
                f"{path}: no stage keeps it"
            )


def test_a_second_repro_does_nothing(origin):
    assert "2 of 2 steps" in origin.made
    again = origin.run("dvc", "repro", "data")
    assert "didn't change, skipping" in again and "steps" not in again


def test_what_snakemake_made_is_recorded_without_building(origin, tmp_path):
    shutil.copytree(origin.path, tmp_path / "copy", symlinks=True)
    copy = Checkout(tmp_path / "copy")
    (copy.path / "dvc.lock").unlink()
    said = copy.run("dvc", "repro", "data")
    assert "Nothing to be done" in said and (copy.path / "dvc.lock").is_file()
    locks = [yaml.safe_load((c.path / "dvc.lock").read_text()) for c in (origin, copy)]
    assert locks[0]["stages"]["data"]["outs"] == locks[1]["stages"]["data"]["outs"]


def test_only_what_matters_makes_a_stage_stale(origin):
    clone = colleague(origin, "stale")
    clone.run("dvc", "pull", "data")

    def stale():
        return json.loads(clone.run("dvc", "status", "--json", "data"))

    assert clone.outputs() == origin.outputs() and stale() == {}
    clone.edit("lambda_laid:", "lambda_laid: 0.5 #")
    assert stale() == {}
    clone.edit("hard_negatives: 0.8", "hard_negatives: 0.7")
    assert "haystacks" in json.dumps(stale())


def test_a_colleague_pulls_and_snakemake_agrees(origin):
    clone = colleague(origin, "pulls")
    clone.run("dvc", "pull", "data")
    assert clone.outputs() == origin.outputs()
    clone.run("snakemake", "--cores", "1", "--touch", "haystacks")
    assert "Nothing to be done" in clone.run("snakemake", "--cores", "1", "haystacks")


@pytest.fixture
def s3(tmp_path):
    """Address of a real S3 server in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(tmp_path / "s3.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)  # fmt: skip
    try:
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "s3.log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def test_through_an_s3_store(origin, s3):
    import boto3

    key = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client("s3", endpoint_url=s3, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1")  # fmt: skip
    client.create_bucket(Bucket="lab")
    clone = colleague(origin, "s3")
    for work in (origin, clone):
        work.run("dvc", "remote", "add", "--local", "-f", "s3", "s3://lab/laid")
        work.run("dvc", "remote", "modify", "--local", "s3", "endpointurl", s3)
    origin.run("dvc", "push", "-r", "s3", "data", **key)
    assert client.list_objects_v2(Bucket="lab")["KeyCount"] > 0
    clone.run("dvc", "pull", "-r", "s3", "data", **key)
    assert clone.outputs() == origin.outputs()


def test_two_commits_can_be_compared(tmp_path):
    """`dvc metrics diff` and `dvc plots diff`, with the plots of dvc.yaml and numbers as `laid tables` writes them."""
    models = sorted({(student, method) for student, method, _ in needed(load([TOP / "config.yaml"]))})
    described = yaml.safe_load((TOP / "dvc.yaml").read_text())
    files = ["results/small/tables/metrics.json", "results/small/tables/curves.csv"]
    stage = {"cmd": "true", "metrics": files[:1], "outs": files[1:]}
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump({"stages": {"tables": stage}, "plots": described["plots"]})
    )
    work = Checkout(tmp_path)
    work.git("init", "-q")
    work.run("dvc", "init", "-q")
    (tmp_path / "results/small/tables").mkdir(parents=True)
    for accuracy, window in ((50.25, 11.5), (75.5, ">= 150")):
        numbers = {"small": {"laid": {"accuracy": {"50": 97.0, "100": accuracy}, "window": window}}}
        (tmp_path / files[0]).write_text(json.dumps(numbers))
        rows = [["images", *(f"{student} {method}" for student, method in models)]]
        rows += [[size, *([value] * len(models))] for size, value in ((50, 97.0), (100, accuracy))]
        (tmp_path / files[1]).write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
        work.run("dvc", "commit", "-q", "-f", "tables")
        work.commit()
    said = work.run("dvc", "metrics", "diff", "HEAD~1", "HEAD").splitlines()
    assert [line.split()[1:] for line in said[1:]] == [
        ["small.laid.accuracy.100", "50.25", "75.5", "25.25"],
        ["small.laid.window", "11.5", ">=", "150", "-"],
    ]
    drawn = json.loads(work.run("dvc", "plots", "diff", "HEAD~1", "HEAD", "--json"))
    assert not drawn.get("errors") and len(drawn["data"]) == len(described["plots"])
    for title, (plot,) in drawn["data"].items():
        points = plot["content"]["data"]["values"]
        lines = {(point["rev"], point["field"]) for point in points}
        (columns,) = next(p[title]["y"].values() for p in described["plots"] if title in p)
        assert lines == {(rev, column) for rev in ("HEAD~1", "HEAD") for column in columns}
        assert {float(p["dvc_inferred_y_value"]) for p in points if p["images"] == "100"} == {50.25, 75.5}
