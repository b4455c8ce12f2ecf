"""Every command of the guides runs as it stands in its page, on results of the micro family, or is listed with a reason."""

import importlib
import os
import shutil
import sys

import pytest
import yaml

from chain import build
from chats import write_chats
from fake_site import Site, coco_site
from guides import ROOT, shell_commands, walk
from laid.cli import main

PAGES = sorted(
    str(page.relative_to(ROOT))
    for part in ("guides", "start")
    for page in (ROOT / "docs" / part).glob("*.md")
)
ELSEWHERE = {"docs/guides/own_data.md", "docs/guides/served_models.md"}  # test_own_data.py, test_served.py

# Commands that do not run here, by page, and why. Whatever stands in a page and not in this list runs.
NOT_HERE = {
    "docs/guides/benchmarks.md": {
        "python -m lmms_eval --model qwen2_5_vl --model_args pretrained=results/paper/runs/qwen7b/laid/seed0/model"
        " --tasks pope,mme --batch_size 1 --log_samples --output_path results/paper/lmms_eval/": "lmms-eval, a GPU",
        "python -m lmms_eval --model qwen2_5_vl --batch_size 1 --include_path docs/examples/lmms_eval"
        " --tasks vhs_1,vhs_10,vhs_50 --model_args pretrained=results/small/runs/small/laid_plus/seed0/model,device=cpu,"
        "device_map=cpu,min_pixels=784,max_pixels=784": "lmms-eval; what it asks: test_lmms_eval.py",
    },
    "docs/guides/cluster.md": {
        "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge": "root, network",
        "SLURM_NODES=2 SLURM_CPUS=1 tools/slurm/start.sh /tmp/cluster": "Slurm: test_slurm.py",
        ". /tmp/cluster/env": "Slurm: test_slurm.py",
        "tools/slurm/stop.sh /tmp/cluster": "Slurm: test_slurm.py",
    },
    "docs/guides/reproduce.md": {
        "python tools/same_bytes.py --config config.yaml configs/ci.yaml": "minutes",
        "python tools/same_bytes.py --config config.yaml configs/ci.yaml --against results/ci"
        " --target cells/test/small/laid/5.json": "minutes: .ci/run",
        "dvc repro": "runs Snakemake: test_dvc.py",
        "dvc commit": "of a built checkout: test_dvc.py",
        "dvc push": "of a built checkout: test_dvc.py",
    },
    "docs/guides/several_gpus.md": {
        "accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 4 -m laid train ...": "four GPUs;"
        " two processes: test_distributed.py",
        "torchrun --standalone --nproc_per_node 2 -m laid evaluate --model Qwen/Qwen2.5-VL-32B-Instruct ...": "two GPUs;"
        " two processes: test_parallel.py",
        "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 4 -m laid train ... --teacher"
        " Qwen/Qwen2.5-VL-32B-Instruct --teacher-device cuda:4,cuda:5,cuda:6,cuda:7": "eight GPUs; two processes:"
        " test_distributed.py",
    },
    "docs/guides/watching.md": {
        "tensorboard --logdir results/small/runs": "serves until it is stopped; its files: test_trackers.py",
    },
    "docs/start/first_run.md": {
        "make demo": "20 minutes; its steps: test_demo.py, test_install.py",
        "make report": "after make demo; its target: a dry run of test_rules.py",
        "docker build -t laid .devcontainer": "Docker",
        'docker run --rm -it -v "$PWD":/laid laid': "Docker",
        'docker run --rm -it -v "$PWD":/laid laid make test': "Docker",
    },
    "docs/start/own_model.md": {
        "pip install .": "network: test_install.py, test_installed.py",
        "laid push mine OWNER/NAME --merge STUDENT --yes": "of an adapter, which this page's example is not: test_hub.py",
    },
}  # fmt: skip
HUB = "Qwen/Qwen2.5-VL-7B-Instruct"
# What is not taken as it stands: a hub's model, places outside the working folder, words that a page leaves out.
STAND_INS = {
    "docs/guides/benchmarks.md": {HUB: "results/small/models/small"},
    "docs/guides/official_vhs.md": {HUB: "results/small/models/small"},
    "docs/guides/own_model.md": {"/data/coco": "data/coco", "/models/big": "models/big"},
    "docs/guides/several_gpus.md": {
        "Qwen/Qwen2.5-VL-32B-Instruct ...": "results/small/models/teacher --student-name teacher --method base --out cells"
        " --coco results/small/coco --questions results/small/haystacks/test --sizes 2",
        " ...": "",
    },
    "docs/start/first_run.md": {"/tmp/cells": "cells"},
}
# What a page takes for granted beside results/small: its name there -> which part of results/small that is.
QUESTIONS = "haystacks/test/visual_haystack_{}.json"
GIVEN = {
    "docs/guides/benchmarks.md": {"COCO": "coco"},
    "docs/guides/official_vhs.md": {
        "VHs_large/visual_haystack_oracle.json": QUESTIONS.format(1),
        "VHs_large/visual_haystack_2.json": QUESTIONS.format(2),
        "VHs_large/visual_haystack_10.json": QUESTIONS.format(10),
        "multi_needle/visual_haystack_5.json": QUESTIONS.format(5),
    },
    "docs/guides/own_model.md": {
        "data/coco": "coco",
        "models/big": "models/teacher",
        "org/tiny-vl": "models/small",
    },
    "docs/guides/watching.md": {
        "results/small/runs/small/sft/seed0.trackers": "runs/small/laid/seed0.trackers"
    },
    "docs/start/own_model.md": {"TEACHER": "models/teacher", "STUDENT": "models/small", "IMAGES": "coco"},
}
SIZES = [1, 2, 5, 10, 20, 50, 100]
FEW = {
    "scale": "small",
    "data": {"rendered": {"train": 160, "val": 220}},
    "tables": {"methods": ["base", "laid"], "ablations": ["base"]},
    **{part: {"methods": ["base", "laid"]} for part in ("analysis", "beyond", "pope")},
}


@pytest.fixture(scope="module")
def checkout(micro_file, tmp_path_factory):
    """What a reader of the guides has: the checkout's files, and the results of `make demo`, small."""
    top = tmp_path_factory.mktemp("checkout")
    values = yaml.safe_load(micro_file.read_text())
    haystacks = values["haystacks"] | {"test": {"questions": 4, "sizes": SIZES}}
    cells = dict.fromkeys(("teacher/base", "small/base", "small/laid"), SIZES)
    training = values["training"] | {"trackers": ["dvclive"]}
    build(top, values | FEW | {"haystacks": haystacks, "training": training}, cells)
    for folder in ("configs", "slurm", ".dvc"):
        shutil.copytree(ROOT / folder, top / folder, ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
    shutil.copy(ROOT / "claims.yaml", top)
    coco = top / "results/small/coco"
    write_chats(top / "chats.jsonl", coco, 8)
    write_chats(top / "held_out.jsonl", coco, 4, split="val2017")
    return top


@pytest.fixture(scope="module")
def site(checkout):
    """The site that configs/paper.yaml of `checkout` fetches COCO from, and few of its questions."""
    site = Site(coco_site(checkout / "results/small/coco")[0])
    paper = checkout / "configs/paper.yaml"
    text = paper.read_text()
    for old, new in (
        ("source: download", f"source: download\n  download: {{base: {site.base}, checksums: false}}"),
        ("  wording: pope", "  images: 20\n  wording: pope"),
    ):
        assert old in text
        text = text.replace(old, new)
    paper.write_text(text)
    yield site
    site.close()


@pytest.fixture
def reader(checkout, site, hub, tmp_path, monkeypatch):
    """reader(page): the folder of one who reads that page becomes the current one. Files are links until they are replaced."""
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def reader(page):
        here = shutil.copytree(checkout, tmp_path / "here", copy_function=os.link)
        for name, part in GIVEN.get(page, {}).items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            source = here / "results/small" / part
            if source.is_dir():
                shutil.copytree(source, here / name, copy_function=os.link)
            else:
                os.link(source, here / name)
        monkeypatch.chdir(here)

    yield reader
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def snakemake(words):
    """A dry run."""
    words = ["--dry-run", "--snakefile", str(ROOT / "Snakefile"), *words]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["snakemake", *words])  # which the default profile reads
        importlib.import_module("snakemake.cli").main(words)
    return end.value.code


def dvc(words):
    return importlib.import_module("dvc.cli").main(words)


RUN = {"laid": main, "snakemake": snakemake, "dvc": dvc}


@pytest.mark.parametrize("page", sorted(set(PAGES) - ELSEWHERE))
def test_a_page_runs_as_it_stands(page, reader):
    for module in ("snakemake", "dvc"):
        pytest.importorskip(module)
    reader(page)
    for program, *words in walk(page, NOT_HERE.get(page, ()), STAND_INS.get(page)):
        assert program in RUN, f"{program} {' '.join(words)}: runs nowhere, and NOT_HERE does not say why"
        assert RUN[program](words) == 0, [program, *words]


def test_what_is_listed_stands_in_a_page():
    for page, commands in NOT_HERE.items():
        assert not commands.keys() - set(shell_commands(page)), page
    for page, texts in STAND_INS.items():
        assert all(text in (ROOT / page).read_text() for text in texts), page
    assert {*NOT_HERE, *STAND_INS, *GIVEN, *ELSEWHERE} <= set(PAGES)
