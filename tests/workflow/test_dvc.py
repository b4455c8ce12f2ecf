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

from laid.provenance import fingerprint
from laid.results.needed import needed
from laid.settings import SLICES, load

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

    def run(self, *words, timeout=300, ok=True, **env):
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        source = os.pathsep.join([str(TOP / "src"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.path,
            env={**os.environ, "PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) is ok, f"{words}: {done.stdout[-3000:]}"
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

    def files(self, below="results"):
        """path -> (bytes, time of change) of every file below a folder."""
        found = (path for path in (self.path / below).rglob("*") if path.is_file())
        return {str(p.relative_to(self.path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def checkout(path):
    """The workflow's files in a new folder, no results, as a clone has them."""
    path.mkdir()
    own = shutil.ignore_patterns("cache", "tmp", "config.local")
    for name in ("workflow", "envs", "configs", "bench", ".dvc"):
        shutil.copytree(TOP / name, path / name, ignore=own)
    for name in ("Snakefile", "config.yaml", "claims.yaml", "dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(TOP / name, path)
    work = Checkout(path)
    work.git("init", "-q")
    return work


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Stage `data` reproduced, committed and pushed to the default remote."""
    work = checkout(tmp_path_factory.mktemp("dvc") / "checkout")
    few = {"train: 3000": "train: 240", "val: 1500": "val: 160", "questions: 5000": "questions: 40"}
    few |= {
        "questions: 200": "questions: 10",
        "sizes: [5, 20, 100, 300]": "sizes: [5]",
        "questions: 300": "questions: 10",
    }
    few |= {"sizes: [1, 2, 5, 10, 20, 50, 100, 150]": "sizes: [1, 2, 5, 50, 100]"}
    few |= {"sizes: [200, 300, 500]": "sizes: [110]", "questions: 100 ": "questions: 10 "}
    for old, new in few.items():
        work.edit(old, new)
    work.commit()
    work.made = work.run("dvc", "repro", "data")
    work.commit()
    work.run("dvc", "push", "data")
    return work


def colleague(origin, name):
    """A clone beside `origin`, where the default remote (a folder beside the checkout) is the same one."""
    origin.git("clone", "-q", origin.path, origin.path.parent / name)
    return Checkout(origin.path.parent / name)


# stage -> the steps of laid.settings.SLICES that it runs.
STEPS = {
    "data": ["data", "haystacks", "beyond_haystacks"],
    "family": ["pretrain", "teacher_cache"],
    "cells": ["train", "evaluate"],
    "tables": ["alignability", "analyse", "evaluate", "pope", "tables"],
}


def test_a_value_that_matters_to_a_step_is_a_param_of_its_stage():
    """Else DVC would say that nothing changed where Snakemake makes it again."""
    config = yaml.safe_load((TOP / "config.yaml").read_text())
    described = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
    assert described.keys() == STEPS.keys()
    for stage, steps in STEPS.items():
        (params,) = (entry["config.yaml"] for entry in described[stage]["params"])
        for param in params:  # DVC ends with an error at a param that is not there
            found = config
            for key in param.split("."):
                assert key in found, f"{stage}: {param} does not stand in config.yaml"
                found = found[key]
        for key in (key for step in steps for key in SLICES[step] if not key.startswith("-")):
            name = key.format(method="any", member="any")
            # Sizes and lengths of the questions come to later stages with the questions themselves.
            covered = any(name == param or name.startswith(f"{param}.") for param in params)
            assert covered or (stage != "data" and name.startswith("haystacks.t")), f"{stage}: {name}"


def test_lambda_of_laid_is_no_param_of_data():
    described = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
    assert not {"methods", "training"} & set(described["data"]["params"][0]["config.yaml"])


def kept(path, outs):
    return any(path == out or path.startswith(f"{out}/") for out in outs)


@pytest.mark.parametrize("overlay", [None, "paper.yaml"])
def test_stages_cover_what_the_rules_make(overlay, tmp_path):
    """An output that a stage forgets would be lost to a colleague; one that no rule makes would stop DVC."""
    work = checkout(tmp_path / "work")
    if overlay:
        work.run("laid", "config", "--config", "config.yaml", f"configs/{overlay}", "--out", "config.yaml")
    told = json.loads(work.run("dvc", "status", "--json"))
    outs = [out for stage in told.values() for part in stage for out in part.get("changed outs", ())]
    assert told.keys() == STEPS.keys() and len(outs) == len(set(outs)) == 19
    plan = work.run("snakemake", "--dry-run", "--forceall", "--cores", "2", "all", "page")
    made = {path for line in re.findall(r"^ +output: (.*)$", plan, re.MULTILINE) for path in line.split(", ")}
    scale = yaml.safe_load((work.path / "config.yaml").read_text())["scale"]
    for path in made:
        store = path.startswith(f"results/{scale}/features/")  # what any job fills again is no result
        assert store or kept(path, outs), f"{path}: no stage keeps it"
    for out in outs:
        # `mkdir` makes it where all models come from a hub, or no table goes beyond the test sizes.
        empty = [f"results/{scale}/{folder}" for folder in ("models", "beyond/haystacks", "cells/beyond")]
        alone = out in empty and overlay == "paper.yaml"
        assert alone or any(kept(path, [out]) for path in made), f"{out}: no rule makes it"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("scale: small", "scale: smal l", "config.yaml, line 3: scale = 'smal l': must match"),
        ("results: results", "", "Could not find 'results'"),
        ("\ndata:", "\ndates:", "Parameters 'data' are missing from 'config.yaml'"),
        ("seed: 0", "sead: 0", "unknown key; did you mean 'seed'?"),
    ],
)
def test_a_mistake_in_the_configuration_is_said_and_leaves_nothing(old, new, said, tmp_path):
    work = checkout(tmp_path / "work")
    work.edit(old, new)
    before = {path.name for path in work.path.iterdir()}
    output = work.run("dvc", "repro", "data", ok=False)
    assert said in output and "Traceback" not in output
    assert {path.name for path in work.path.iterdir()} - before <= {".snakemake", "tmp"}


def test_a_second_repro_does_nothing(origin):
    assert "4 of 4 steps" in origin.made  # data, haystacks, those beyond, and the target that names them
    again = origin.run("dvc", "repro", "data")
    assert "didn't change, skipping" in again and "steps" not in again


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


def store(s3):
    """A bucket "lab" on the server; what the environment must hold to reach it."""
    import boto3

    boto3.client("s3", endpoint_url=s3, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1").create_bucket(Bucket="lab")  # fmt: skip
    return {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Everything, from an empty clone, by `dvc repro`: the ci scale cut down further, as a user would choose a scale."""
    work = checkout(tmp_path_factory.mktemp("whole") / "checkout")
    (work.path / "micro.yaml").write_text(MICRO)
    overlays = ("configs/ci.yaml", "micro.yaml")
    work.run("laid", "config", "--config", "config.yaml", *overlays, "--out", "config.yaml")
    work.commit()
    work.made = work.run("dvc", "repro", timeout=3000)
    work.commit()
    return work


# A student, and of its methods one that the change of lambda_laid reaches and one, of the same make, that it does not.
MICRO = """\
scale: micro
models: {students: [small]}
tables: {methods: [base, laid], ablations: [base, laid_wo_laid, laid]}
data: {rendered: {train: 240, val: 160}}
haystacks:
  train: {questions: 16}
  validation: {questions: 4}
  test: {questions: 4, sizes: [1, 5, 50]}
beyond: {sizes: [100], questions: 4}
family:
  pretrain: {vision: {steps: 2}}
  members: {teacher: {window: 5, steps: 12}, small: {steps: 12}}
analysis: {questions: 2}
pope: {images: 4, objects: 2, methods: [base]}
"""
# What a job printed and cost is its machine's own.
NOT_KEPT = ("results/micro/logs/", "results/micro/benchmarks/")


def nothing_to_do(work):
    """Neither DVC nor Snakemake would do anything, and every cell is sound."""
    assert "Data and pipelines are up to date" in work.run("dvc", "repro")
    assert "Nothing to be done" in work.run("snakemake", "--dry-run", "--cores", "1", "all", "page")
    assert re.search(r"^(\d+) cells below \S+: \1 sound$", work.run("laid", "verify"), re.MULTILINE)


@pytest.mark.slow
def test_an_empty_clone_reproduces_everything(whole):
    assert [stage for stage in STEPS if f"Running stage '{stage}'" in whole.made] == list(STEPS)
    assert whole.git("status", "--porcelain") == ""
    nothing_to_do(whole)


@pytest.mark.slow
def test_all_that_snakemake_made_is_recorded_without_building(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns("locks"))
    copy = Checkout(tmp_path / "copy")
    recorded = (copy.path / "dvc.lock").read_text()
    (copy.path / "dvc.lock").unlink()
    shutil.rmtree(copy.path / ".dvc/cache")
    before = copy.files()
    said = copy.run("dvc", "repro")
    assert said.count("Nothing to be done") == said.count("Running stage") == len(STEPS)
    after = copy.files()
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    # DVC puts a copy of its own in the place of a file that is an output by itself; no rule reads it.
    touched = {name for name in after if after[name][1] != before[name][1]}
    assert touched <= {"results/micro/report.html"}
    assert (copy.path / "dvc.lock").read_text() == recorded


@pytest.mark.slow
def test_a_colleague_gets_everything_from_an_s3_store(whole, s3, tmp_path):
    """No folder in common: git's files through git, everything else through the store, which its address and keys name."""
    keys = store(s3)
    whole.run("dvc", "remote", "add", "-d", "-f", "s3", "s3://lab/laid")
    whole.run("dvc", "remote", "modify", "s3", "endpointurl", s3)
    whole.commit()
    whole.run("dvc", "push", **keys)
    whole.git("clone", "-q", whole.path, tmp_path / "elsewhere")
    clone = Checkout(tmp_path / "elsewhere")
    clone.run("dvc", "pull", **keys)
    expected = {
        name: content
        for name, (content, _) in whole.files().items()
        if not name.startswith(NOT_KEPT) and not name.endswith(".lock")
    }
    assert {name: content for name, (content, _) in clone.files().items()} == expected
    clone.run("snakemake", "--cores", "1", "--touch", "all", "page")
    nothing_to_do(clone)


@pytest.mark.slow
def test_a_change_of_lambda_builds_what_depends_on_it_and_compares_well(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns("locks"))
    work = Checkout(tmp_path / "copy")
    config = work.path / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["resources"]["pretrain"]["mem_mb"] += 1000
    config.write_text("# a comment\n" + yaml.safe_dump(values, sort_keys=False))
    nothing_to_do(work)
    work.edit("lambda_laid: 0.3", "lambda_laid: 30.0")
    assert json.loads(work.run("dvc", "status", "--json")).keys() == {"family", "cells", "tables"}
    before = work.files()
    said = work.run("dvc", "repro", timeout=900)
    assert re.findall(r"Running stage '(\w+)'", said) == ["family", "cells", "tables"]
    after = work.files()
    made = {name.removeprefix("results/micro/") for name in after if after[name][1] != before[name][1]}
    ours = re.compile(
        r"runs/\w+/laid/|cells/\w+/\w+/laid/|pope/pope\.|logs/"
        r"|benchmarks/train/\w+-laid\W|analysis/|inference_cost/|tables/|figures|claims/|report\.html"
    )
    assert {name.split("/")[0] for name in made} >= {"runs", "cells", "tables"}
    assert not [name for name in made if not ours.match(name)]
    nothing_to_do(work)
    work.commit()
    changed = json.loads(work.run("dvc", "metrics", "diff", "HEAD~1", "HEAD", "--json"))
    numbers = json.loads((work.path / "results/micro/tables/metrics.json").read_text())
    old = json.loads(before["results/micro/tables/metrics.json"][0])
    assert bool(changed) == (numbers != old)
    for name in changed.get("results/micro/tables/metrics.json", ()):
        assert name.split(".")[1] == "laid"
    drawn = json.loads(work.run("dvc", "plots", "diff", "HEAD~1", "HEAD", "--json"))
    assert not drawn.get("errors") and all(plot for plot in drawn["data"].values())


def test_two_commits_can_be_compared(tmp_path):
    """`dvc metrics diff` and `dvc plots diff`, with the plots of dvc.yaml and numbers as `laid tables` writes them."""
    models = {f"{student} {method}" for student, method, _ in needed(load([TOP / "config.yaml"]))}
    described = yaml.safe_load((TOP / "dvc.yaml").read_text())
    files = ["results/small/tables/metrics.json", "results/small/tables/curves.csv"]
    described["stages"] = {"tables": {"cmd": "true", "outs": ["results/small/tables"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(described))
    shutil.copy(TOP / "config.yaml", tmp_path)
    work = Checkout(tmp_path)
    work.git("init", "-q")
    work.run("dvc", "init", "-q")
    shutil.copytree(TOP / ".dvc/plots", tmp_path / ".dvc/plots", dirs_exist_ok=True)
    (tmp_path / "results/small/tables").mkdir(parents=True)
    for accuracy, window in ((50.25, 11.5), (75.5, ">= 150")):
        numbers = {"small": {"laid": {"accuracy": {"50": 97.0, "100": accuracy}, "window": window}}}
        (tmp_path / files[0]).write_text(json.dumps(numbers))
        rows = [["model", "images", "accuracy"]]
        rows += [[model, size, value] for model in models for size, value in ((50, 97.0), (100, accuracy))]
        (tmp_path / files[1]).write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
        work.run("dvc", "commit", "-q", "-f", "tables")
        work.commit()
    said = work.run("dvc", "metrics", "diff", "HEAD~1", "HEAD").splitlines()
    assert [line.split()[1:] for line in said[1:]] == [
        ["small.laid.accuracy.100", "50.25", "75.5", "25.25"],
        ["small.laid.window", "11.5", ">=", "150", "-"],
    ]
    drawn = json.loads(work.run("dvc", "plots", "diff", "HEAD~1", "HEAD", "--json"))
    assert not drawn.get("errors")
    ((plot,),) = drawn["data"].values()
    points, axes = plot["content"]["data"]["values"], plot["content"]["encoding"]
    lines = {(point[axes["strokeDash"]["field"]], point[axes["color"]["field"]]) for point in points}
    assert lines == {(rev, model) for rev in ("HEAD~1", "HEAD") for model in models}
    far = {float(point[axes["y"]["field"]]) for point in points if point[axes["x"]["field"]] == "100"}
    assert far == {50.25, 75.5}
