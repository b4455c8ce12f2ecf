"""laid as a wheel, away from its checkout and without the tools that run it as a workflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from laid.settings import merge

pytestmark = pytest.mark.slow
TOP = Path(__file__).resolve().parents[1]
# One start for several verbs: importing the libraries takes longer than their work.
TOGETHER = """
import json, sys
from laid.cli import main
for words in sys.argv[1:]:
    assert main(json.loads(words)) == 0, words
"""
BLOCK = "import sys; sys.modules.update(dict.fromkeys({absent}))"
ABSENT = {"snakemake", "dvc", "pytest", "hypothesis", "jsonschema"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: building leaves files behind."""
    root = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        TOP / "src", root / "checkout/src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, root / "checkout" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root)]
    subprocess.run([*build, str(root / "checkout")], check=True)
    return next(root.glob("*.whl"))


@pytest.fixture(scope="module")
def laid(wheel, tmp_path_factory):
    """laid(verb, ...): run it installed, in the folder `cwd`; returns the finished process. program: what Python runs."""
    root = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(root / "site"), str(wheel)], check=True)
    (root / "block").mkdir()
    (root / "block/sitecustomize.py").write_text(BLOCK.format(absent=ABSENT))
    environment = os.environ | {"PYTHONPATH": f"{root / 'block'}{os.pathsep}{root / 'site'}"}

    def run(*arguments, cwd, program=("-m", "laid")):
        command = [sys.executable, *program, *map(str, arguments)]
        done = subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    where = subprocess.run(
        [sys.executable, "-c", "import laid; print(laid.__file__)"],
        cwd=root, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(root / "site")
    return run


def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    listed = subprocess.run(
        ["git", "ls-files", "src/laid"], cwd=TOP, capture_output=True, text=True, check=True
    )
    files = {name.removeprefix("src/") for name in listed.stdout.split() if (TOP / name).is_file()}
    assert files and files <= packed


def test_what_laid_needs_is_in_the_lock():
    """Every dependency is pinned, and neither snakemake nor DVC is one of them."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    needs = {need.split("=")[0].split(">")[0].split("[")[0] for need in project["dependencies"]}
    pinned = {line.split("==")[0] for line in (TOP / "envs/requirements.lock").read_text().splitlines()}
    assert needs <= pinned and not needs & ABSENT


def test_configuration(laid, tmp_path):
    settings = yaml.safe_load(laid("config", cwd=tmp_path).stdout)
    assert {"base", "yarn", "self_extend", "sft", "kd", "laid"} <= settings["methods"].keys()
    schema = json.loads(laid("config", "--schema", cwd=tmp_path).stdout)
    assert "training" in schema["properties"]
    (tmp_path / "config.yaml").write_text("methods: {mine: {lambda_kl: 0.25}}")
    assert yaml.safe_load(laid("config", cwd=tmp_path).stdout)["methods"]["mine"]["lambda_kl"] == 0.25


def test_distill_evaluate_plan_tokens(laid, family, coco_root, haystacks, tmp_path):
    question_file = tmp_path / "questions.json"
    question_file.write_text(json.dumps(json.loads((haystacks / "train.json").read_text())[:8]))
    few = {
        "models": {"students": ["qwen3b"]},
        "tables": {"methods": ["base"], "ablations": ["base"]},
        "haystacks": {"test": {"sizes": [1]}},
    }
    paper = merge(yaml.safe_load((TOP / "configs/paper.yaml").read_text()), few)
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(paper))
    verbs = [
        ["distill", "--teacher", family["teacher"], "--student", family["small"], "--data", question_file, "--out", "mine"],
        ["evaluate", "--student-name", "small", "--method", "base", "--model", "mine/model", "--sizes", 2,
         "--questions", haystacks / "test", "--out", "cells/small/base"],
        ["tokens", "--model", family["small"], "--sizes", 1, 5],
    ]  # fmt: skip
    verbs = [["plan", "--config", "paper.yaml"], *([*verb, "--coco", coco_root] for verb in verbs)]
    words = [json.dumps([str(word) for word in verb]) for verb in verbs]
    found = laid(*words, cwd=tmp_path, program=("-c", TOGETHER))
    assert (tmp_path / "mine/model/model.safetensors").is_file()
    cell = json.loads((tmp_path / "cells/small/base/2.json").read_text())
    assert cell["n"] == 10 and len(cell["answers"]) == 10
    assert "M-RoPE positions" in found.stdout and "Qwen2.5-VL-32B" in found.stdout
