"""`laid plan` as its user meets it: the table, what it refuses, what it advises, and whether the advice is right."""

import importlib
import io
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from laid import cli
from laid.plan.estimate import Estimator
from laid.plan.fit import refusal, ways_out
from laid.plan.gpus import GIB, GPUS
from laid.plan.jobs import jobs_of, need_of
from laid.plan.speed import SHARES, share_of_peak
from laid.plan.table import job_tables, record
from laid.results.render import column_parts, rich_table
from laid.settings import load, merge

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


LESS = {  # fewer cells
    "models": {"students": ["qwen3b"]},
    "tables": {"methods": ["base", "laid"], "ablations": ["base", "laid"]},
    "haystacks": {"test": {"sizes": [150]}},
    "resources": {
        "evaluate": {"gpu": 1, "gpu_of": {"qwen32b": 1}},
        "train": {"gpu": 1},
        "teacher_cache": {"gpu": 1},
    },
}


def test_every_job_of_the_small_scale(plan):
    small = {
        "models": {"students": ["small"]},
        "tables": {"methods": ["base", "sft", "laid"], "ablations": ["base", "laid"]},
        "haystacks": {"test": {"sizes": [1, 20]}},
    }
    code, out, err, found = plan(small)
    assert (code, err, found["refused"]) == (0, "", [])
    jobs = found["jobs"]
    count = {rule: sum(j["jobs"] for j in jobs if j["rule"] == rule) for rule in {j["rule"] for j in jobs}}
    assert count == {
        "pretrain": 2,
        "teacher_cache": 1,
        "train": 2,
        "evaluate": 8,
    }  # beyond the test sizes too
    for job in jobs:
        assert job["peak_bytes"] == sum(job["memory"].values()) <= job["has_bytes"] and job["fits"]
        assert job["parameters"] > 0 and job["flop"] > 0 and job["tokens"] > 0
    assert "816K" in out and "small base, sft, laid" in out  # the README's teacher; like jobs in one row


def test_the_paper_offline_as_typed(plan):
    """No network, no checkpoint: a table, the paper's hours beside it, and what one A800 cannot hold."""
    code, out, err, found = plan(merge(PAPER, LESS))
    lines = err.splitlines()
    assert code == 1 and len(lines) == len(found["refused"]) >= 1
    assert all("needs " in line and " GiB, has " in line and "would fit" in line for line in lines)
    (line,) = [line for line in lines if "evaluate 32B base at 150 images" in line]
    assert "resources.evaluate.gpu_of: {qwen32b: 2}" in line
    assert "Beside the paper" in out and "built-in shapes" in out
    jobs = {(j["rule"], j["student"], j["method"], *j["sizes"]): j for j in found["jobs"]}
    laid = jobs["train", "qwen3b", "laid"]
    # 50,000 samples of 11 images on average. By hand: a forward pass, the same again for its activations, and twice
    # that backward; 2 FLOPs per weight of the decoder's layers and token. Attention and images come on top.
    layers = 36 * (2048 * (2048 + 2 * 256) + 2048 * 2048 + 3 * 2048 * 11008)
    # Every second epoch 50 questions each of 5, 20, 50 and 100 images are read, forward alone.
    trained, asked = 50_000 * (51 + 11 * 347.4), 5 * 50 * (4 * 50 + 175 * 347.4)
    by_hand = 2 * layers * (4 * trained + asked)
    assert laid["tokens"] == pytest.approx(trained + asked)
    assert by_hand < laid["flop"] < 1.5 * by_hand
    assert laid["share_of_peak"] == pytest.approx(0.324)  # packed passes
    hours = (20 + laid["flop"] / (312e12 * laid["share_of_peak"] * laid["devices"])) / 3600
    assert laid["hours"]["A800-80GB"] == pytest.approx(hours, rel=2e-3)
    teacher = jobs["evaluate", "qwen32b", "base", 150]
    assert teacher["memory"]["weights"] == pytest.approx(2 * 33_452_718_336, rel=1e-4)
    assert teacher["memory"]["cache"] == pytest.approx(
        2 * 64 * 8 * 128 * 2 * teacher["longest_tokens"], rel=0.1
    )
    features = jobs["features", "qwen3b", ""]  # one pass over the distinct images, kept in bfloat16
    images = features["disk_bytes"] / (345.4 * 2048 * 2)
    assert 40_000 < images < 60_000 and features["flop"] > 0
    assert features["images"] == pytest.approx(images, rel=1e-4) and laid["images"] == 0
    assert features["hours"]["A800-80GB"] == pytest.approx((20 + images / 58) / 3600, rel=1e-3)
    cache = jobs["teacher_cache", "qwen32b", ""]
    assert cache["disk_bytes"] == pytest.approx(cache["tokens"] * 48 * 128 * 2 + 5000 * 2 * 152064 * 4)


SMALL_GPU = GPUS["RTX4090-24GB"]


@pytest.fixture(scope="module")
def tight():
    """A 3B student and a 7B teacher on a 24 GB GPU, nothing spared: neither training nor evaluation of 7B fits."""
    settings = load([TOP / "config.yaml", TOP / "configs/paper.yaml"]).changed(LESS)
    settings = settings.changed(
        {
            "models": {"teacher": "qwen7b"},
            "training": {"gradient_checkpointing": False, "per_device_batch": 2},
            "evaluation": {"chunk_tokens": 0},
        }
    )
    estimator = Estimator(settings)
    return estimator, list(jobs_of(estimator, SMALL_GPU))


@pytest.mark.parametrize(("rule", "student"), [("train", "qwen3b"), ("evaluate", "qwen7b")])
def test_each_way_out_is_one(tight, rule, student):
    """What is advised is done, planned anew, and fits; a GPU that is named is large enough."""
    estimator, jobs = tight
    job = next(job for job in jobs if (job.rule, job.student) == (rule, student))
    assert not job.fits
    ways = ways_out(estimator, job)
    line = refusal(estimator, job)
    assert ways and all(way in line for way in ways) and "\n" not in line
    assert f"needs {job.need.bytes / GIB:.1f} GiB, has {job.has / GIB:.1f} GiB" in line
    for way in ways:
        if way.startswith("one "):
            assert GPUS[way[4:]].usable >= job.need.bytes
            continue
        key, _, value = way.partition(" with ")[0].partition(": ")
        change = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            change = {part: change}
        changed = estimator.config.changed(change)
        if " with " in way:
            changed = changed.changed({"resources": {"train": {"gpu": int(way.rpartition(": ")[2])}}})
        other = estimator.under(changed)
        assert need_of(other, SMALL_GPU, job.rule, job.student, job.method, job.sizes).bytes <= job.has, way


def test_methods_told_together_are_refused_together(tight):
    estimator, jobs = tight
    job = next(job for job in jobs if job.rule == "evaluate" and not job.fits)
    joined = replace(job, method=f"{job.method}, yarn, sft")
    assert ways_out(estimator, joined) == ways_out(estimator, job) != []


def test_a_larger_gpu_takes_what_a_smaller_refuses(tight):
    estimator, jobs = tight
    large = list(jobs_of(estimator, GPUS["B200-180GB"]))
    assert len(large) == len(jobs) and all(job.fits for job in large)
    # The GPU changes what there is, not what is needed.
    assert [job.need for job in large] == [job.need for job in jobs]
    text = json.dumps(record(jobs, [SMALL_GPU], 0.4, []), allow_nan=False)
    assert [j["fits"] for j in json.loads(text)["jobs"]] == [job.fits for job in jobs]


def test_tables_fit_a_terminal(tight):
    """Whole at 140 columns; at 80 in parts, of which none is wider and the first says hours and peak."""
    estimator, jobs = tight
    for table in job_tables(jobs, SMALL_GPU, 0.4, estimator):
        assert len(column_parts(table, 140)) == 1
        console = Console(width=80, file=io.StringIO())
        console.print(rich_table(table, 80))
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80 and "\u2026" not in "".join(lines)
        assert ("GPU-hours" if table.name == "plan" else "Peak GiB") in lines[2]


def test_a_large_model_is_laid_over_the_gpus_of_its_job(tight):
    """Two GPUs hold half of the weights, keys and values each, and compute at once."""
    estimator, jobs = tight
    job = next(job for job in jobs if (job.rule, job.student) == ("evaluate", "qwen7b"))
    assert job.need.memory["weights"] > 0.5 * SMALL_GPU.gib * GIB
    two = estimator.config.changed({"resources": {"evaluate": {"gpu_of": {"qwen7b": 2}}}})
    need = need_of(estimator.under(two), SMALL_GPU, "evaluate", "qwen7b", "base", job.sizes)
    assert need.memory["weights"] == pytest.approx(job.need.memory["weights"] / 2, rel=0.1)
    assert need.memory["cache"] == job.need.memory["cache"] // 2
    assert (need.flops, need.devices) == (job.need.flops, 2)


def test_shares_of_peak_are_those_measured():
    """The tables of bench/GPU.md, of each model and kind of pass the newest."""
    kinds = {
        "training, LoRA": "lora", "LoRA step": "lora", "training, LoRA, 9 packed": "packed_lora",
        "training, all weights": "train", "step, all weights": "train", "training, all weights, 9 packed": "packed_train",
        "reading": "read", "reading, SelfExtend": "extend", "teacher's pass": "teacher", "256 photographs": "images",
    }  # fmt: skip
    found = {}
    for entry in reversed((TOP / "bench/GPU.md").read_text(encoding="utf-8").split("\n## ")):
        newer = {}
        for size, what, tokens, share in re.findall(
            r"^\| (\d+)B (.+?) \| ([\d,]+) \|.*?\| ([\d.]+) ?% \|", entry, re.MULTILINE
        ):
            newer.setdefault((kinds[what], int(size)), {})[int(tokens.replace(",", ""))] = float(share) / 100
        found |= newer
    names = {3.75e9: 3, 8.29e9: 7, 33.5e9: 32}
    said = {(kind, names[size]): by for kind, sizes in SHARES.items() for size, by in sizes.items()}
    del found["images", 3]
    assert said == {key: pytest.approx(by, abs=6e-4) for key, by in found.items()}
    assert share_of_peak("teacher", 8_000_000_000, 100) == 0.525  # shorter than any; of the only model


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "A900"], "no GPU 'A900' is known; known: RTX4090-24GB,"),
        (["--configs", "/nowhere"], "--configs /nowhere: no such folder"),
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


def test_the_benchmark_runs_at_toy_size(tmp_path, capsys, monkeypatch):
    """bench/gpu.py: every case is measured, the plan is within 15 % of every peak, and the entry says where, when and what."""
    monkeypatch.syspath_prepend(TOP / "bench")
    bench = importlib.import_module("gpu")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "GPU.md")
    with warnings.catch_warnings():
        assert bench.main(["--toy", "--write", "--json", str(tmp_path / "toy.json"), "--budget", "3600"]) == 0
    entry = (tmp_path / "GPU.md").read_text()
    assert re.search(r"^## Toy size, CPU$", entry, re.MULTILINE)
    assert f"Commit {bench.commit()}, torch" in entry and re.search(r"; 20\d\d-\d\d-\d\d; ", entry)
    assert re.search(r"^Images: [\d,]+ a second on \d+ CPU cores", entry, re.MULTILINE)
    cases = json.loads((tmp_path / "toy.json").read_text())["cases"]
    assert {(c["kind"], c["member"]) for c in cases} == {
        ("teacher", "32B"), ("read", "32B"), ("images", "3B"),
        *((kind, member) for kind in ("train", "packed_train", "lora", "packed_lora", "read", "extend")
          for member in ("7B", "3B")),
    }  # fmt: skip
    for case in cases:
        assert case["seconds"] > 0 and not case["note"], case
        if case["kind"] != "images":  # planned in closed form, for towers of the published width
            assert case["planned"] == pytest.approx(case["peak"], rel=0.15), case
    assert "planned / measured" in capsys.readouterr().out
