"""`laid plan` as its user meets it: the table, what it refuses, what it advises, and whether the advice is right."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from laid import cli, config
from laid.plan.estimate import Estimator
from laid.plan.fit import refusal, ways_out
from laid.plan.gpus import GIB, GPUS
from laid.plan.jobs import jobs_of, need_of
from laid.plan.table import record
from laid.results.tables import needed

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """Run `laid plan` on an overlay of config.yaml; (exit status, output, errors, plan.json)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(overlay, *words):
        file = tmp_path / "overlay.yaml"
        file.write_text(yaml.safe_dump(overlay))
        out = tmp_path / "out"
        code = cli.main(["plan", "--config", str(TOP / "config.yaml"), str(file), "--out", str(out), *words])
        said = capsys.readouterr()
        return code, said.out, said.err, json.loads((out / "plan.json").read_text()) if code != 2 else None

    return run


PAPER = yaml.safe_load((TOP / "configs/paper.yaml").read_text())


def paper(**changes):
    """The paper's configuration with fewer cells."""
    less = {
        "models": {"students": ["qwen3b"]},
        "tables": {"methods": ["base", "sft", "laid"], "ablations": ["base", "laid"]},
        "haystacks": {"test": {"sizes": [1, 150]}},
    }
    return config.merge(config.merge(PAPER, less), changes)


def test_every_job_of_the_small_scale(plan):
    code, out, err, found = plan({"haystacks": {"test": {"sizes": [1, 20]}}})
    assert (code, err, found["refused"]) == (0, "", [])
    settings = config.load([TOP / "config.yaml"])
    cells = {(s, m) for s, m, _ in needed(settings)}
    jobs = found["jobs"]
    count = {rule: sum(j["jobs"] for j in jobs if j["rule"] == rule) for rule in {j["rule"] for j in jobs}}
    trained = {(s, m) for s, m in cells if "lambda_sft" in settings["methods"][m]}
    assert count == {"pretrain": 3, "teacher_cache": 1, "train": len(trained), "evaluate": len(cells)}
    for job in jobs:
        assert job["peak_bytes"] == sum(job["memory"].values()) <= job["has_bytes"] and job["fits"]
        assert job["parameters"] > 0 and job["flop"] > 0 and job["tokens"] > 0
    assert "816K" in out and "evaluate" in out  # the README's teacher


def test_the_paper_offline_as_typed(plan):
    """No network, no checkpoint: a table, the paper's hours beside it, and what one A800 cannot hold."""
    code, out, err, found = plan(paper())
    lines = err.splitlines()
    assert code == 1 and len(lines) == len(found["refused"]) >= 1
    assert all("needs " in line and " GiB, has " in line and "would fit" in line for line in lines)
    assert any("evaluate 32B base at 150 images" in line for line in lines)
    assert "Beside the paper" in out and "built-in shapes" in out
    jobs = {(j["rule"], j["student"], j["method"], *j["sizes"]): j for j in found["jobs"]}
    laid = jobs["train", "qwen3b", "laid"]
    # 50,000 samples of 11 images and 3,873 tokens, 5 epochs' worth of FLOPs by hand: two forward passes and one
    # backward of two, 2 per weight of the decoder's layers and token, within what attention and vision add.
    layers = 36 * (2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 11008)
    by_hand = 8 * layers * laid["tokens"]
    assert laid["tokens"] == pytest.approx(50_000 * (51 + 11 * 347.4))
    assert by_hand < laid["flop"] < 1.5 * by_hand
    hours = laid["flop"] / (312e12 * 0.4 * laid["devices"]) / 3600
    assert laid["hours"]["A800-80GB"] == pytest.approx(hours, rel=1e-3)
    teacher = jobs["evaluate", "qwen32b", "base", 150]
    assert teacher["memory"]["weights"] == pytest.approx(2 * 33_452_718_336, rel=1e-4)
    assert teacher["memory"]["cache"] == pytest.approx(
        2 * 64 * 8 * 128 * 2 * teacher["longest_tokens"], rel=0.1
    )
    cache = jobs["teacher_cache", "qwen32b", "train"]
    assert cache["disk_bytes"] == pytest.approx(cache["tokens"] * 48 * 128 * 2 + 5000 * 2 * 152064 * 4)


def test_a_larger_gpu_takes_what_a_smaller_refuses(plan):
    assert plan(paper(), "--gpu", "h200-141gb")[0] == 0
    code, _, err, found = plan(paper(), "--gpu", "RTX4090-24GB", "--utilisation", "0.5")
    assert code == 1 and found["gpus"][0] == "RTX4090-24GB" and found["utilisation"] == 0.5
    assert any(line.startswith("laid plan: does not fit: train 3B laid: needs ") for line in err.splitlines())


@pytest.fixture(scope="module")
def tight():
    """Jobs of a 3B student on a 24 GB GPU: training and evaluation do not fit."""
    settings = config.load([TOP / "config.yaml", TOP / "configs/paper.yaml"])
    settings = config.merge(settings, config.merge(config.fill({}, {"type": "object"}), paper()))
    settings["models"]["teacher"] = "qwen7b"
    settings["training"] |= {"gradient_checkpointing": False, "per_device_batch": 2}
    settings["resources"]["train"]["gpu"] = 1
    settings["tables"]["methods"] = settings["tables"]["ablations"] = ["base", "laid"]
    settings = config.validate(settings)
    estimator = Estimator(settings)
    return estimator, list(jobs_of(estimator, GPUS["RTX4090-24GB"]))


def test_each_way_out_is_one(tight):
    """What is advised is done, planned anew, and fits; a GPU that is named is large enough."""
    estimator, jobs = tight
    refused = [job for job in jobs if not job.fits]
    assert {job.rule for job in refused} >= {"train", "evaluate"}
    for job in refused:
        line = refusal(estimator, job)
        assert (
            "\n" not in line and f"needs {job.need.bytes / GIB:.1f} GiB, has {job.has / GIB:.1f} GiB" in line
        )
        for way in ways_out(estimator, job):
            if way.startswith("one "):
                assert GPUS[way[4:]].usable >= job.need.bytes
                continue
            key, _, value = way.partition(" with ")[0].partition(": ")
            changed = copy.deepcopy(dict(estimator.config))
            section = changed
            for part in key.split(".")[:-1]:
                section = section[part]
            section[key.split(".")[-1]] = yaml.safe_load(value)
            if " with " in way:
                changed["resources"]["train"]["gpu"] = int(way.rpartition(": ")[2])
            changed = config.validate(changed)
            need = need_of(estimator.under(changed), job.rule, job.student, job.method, job.sizes)
            assert need.bytes <= job.has, way


def test_the_record_is_plain_json(tight):
    estimator, jobs = tight
    text = json.dumps(record(jobs, [GPUS["A800-80GB"]], 0.4, []), allow_nan=False)
    assert len(json.loads(text)["jobs"]) == len(jobs)
    assert estimator.rehearsed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "A900"], "no GPU 'A900' is known; known: RTX4090-24GB,"),
        (["--utilisation", "0"], "--utilisation 0: a share of peak, above 0"),
    ],
)
def test_wrong_words_are_one_line(plan, words, says):
    code, out, err, _ = plan({}, *words)
    assert (
        (code, out) == (2, "")
        and err.startswith("laid plan: error: ")
        and says in err
        and err.count("\n") == 1
    )


def test_the_benchmark_runs_at_toy_size(tmp_path):
    """bench/gpu.py as a process of its own: every case is measured, and the plan is within 15 % of every peak."""
    done = subprocess.run(
        [sys.executable, TOP / "bench/gpu.py", "--toy", "--json", tmp_path / "toy.json"],
        capture_output=True, text=True, check=False, timeout=600,
        env={"PYTHONPATH": str(TOP / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads((tmp_path / "toy.json").read_text())["cases"]
    assert {(c["kind"], c["member"]) for c in cases} == {
        ("teacher", "32B"), ("read", "32B"), ("train", "7B"), ("lora", "7B"), ("read", "7B"), ("train", "3B"),
        ("lora", "3B"), ("read", "3B"),
    }  # fmt: skip
    for case in cases:
        assert case["seconds"] > 0 and not case["note"], case
        assert case["planned"] == pytest.approx(case["peak"], rel=0.15), case
    assert "planned / measured" in done.stdout
