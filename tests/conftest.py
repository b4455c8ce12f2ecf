"""What many tests share, made once: a small rendered COCO, its questions, two tiny models, the real data's folder."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from laid.settings import Settings, validate

TRAINED = {"alignment": {"pairs": [[-1, -1]]}, "lr": 0.01}
# Everything the tests of models, evaluation and training rely on stands here, so that config.yaml may change.
MICRO = {
    "scale": "micro",
    "haystacks": {
        "hard_negatives": 0.8,
        "train": {"questions": 24, "min_size": 2, "max_size": 4},
        "validation": {"questions": 4, "sizes": [2]},
        "test": {"questions": 10, "sizes": [1, 2, 5]},
    },
    "models": {"teacher": "teacher", "students": ["small"]},
    "family": {
        "head_dim": 16,
        "mrope_section": [2, 3, 3],
        "vision": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "heads": 2},
        "pretrain": {"batch": 4, "targets": 3, "threshold": 0.0, "vision": {"steps": 4, "batch": 16}},
        "members": {
            "teacher": {
                "hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate_size": 64, "window": 6, "steps": 3,
            },
            "small": {
                "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "window": 4, "steps": 3,
            },
        },
    },
    "training": {
        "epochs": 2, "batch_size": 8, "per_device_batch": 8, "log_every": 1, "checkpoint_minutes": 0,
        "lr": 0.001, "lr_weights": 0.01, "lr_gain": 0.03,
    },
    "teacher_cache": {"layers": [-1], "dtype": "float32"},
    "evaluation": {"max_new_tokens": 3},
    "tables": {
        "methods": ["base", "yarn", "self_extend", "sft", "kd", "laid"],
        "ablations": ["base", "laid_wo_kl", "laid_wo_laid", "laid"],
    },
    "analysis": {"methods": ["base", "sft", "kd", "laid"]},
    "beyond": {"methods": ["base", "kd", "laid"]},
    "pope": {"wording": "haystack", "methods": ["base", "sft", "kd", "laid"]},
    "methods": {
        "yarn": {"factor": 2.0},
        "self_extend": {"group": 2, "window": 16},
        "sft": {"lora": {"rank": 2, "alpha": 4, "dropout": 0.1}, "lr": 0.05},
        "kd": {"lambda_kl": 0.7, "lr": 0.01},
        "laid": {
            **TRAINED,
            "lambda_kl": 0.5,
            "lambda_laid": 0.3,
            "distance": {"strength": 4.0},
            "gaps": {"reach": 120},
            "gain": True,
        },
        "laid_wo_kl": {"extends": "laid", "lambda_kl": 0.0},
        "laid_wo_laid": {"extends": "laid", "lambda_laid": 0.0},
        "laid_plus": {
            "lambda_kl": 0.7, "lr": 0.01, "gaps": {"reach": 120}, "dilution": {"reach": 60, "end": 0.5},
        },
    },
}  # fmt: skip


# Files that take longest come first, so that no worker ends on one alone. DVC builds on all cores while Slurm waits.
LONGEST = [
    "test_dvc.py",
    "test_slurm.py",
    "test_distributed.py",
    "test_rules.py",
    "test_chaos.py",
    "test_steps.py",
]


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture
def accelerator():
    """accelerator(precision): Accelerate on a CPU. Its settings are the process's: other tests leave theirs, none of these stay."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda precision: Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory) -> Path:
    """160 train and 100 val scenes of 84 x 84 pixels, laid out like COCO."""
    from laid.toy.render import render

    root = tmp_path_factory.mktemp("data") / "coco"
    render(root, train=160, val=100, seed=3)
    return root


@pytest.fixture(scope="module")
def opened():
    """image file -> times that it was decoded and cut into patches, until cleared."""
    from laid.models.processing import Processor

    counts, real = Counter(), Processor.pixels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processor, "pixels", lambda self, files: counts.update(set(files)) or real(self, files))
        yield counts


@pytest.fixture
def hub(monkeypatch):
    """The hub, in this process (fake_hub), and a token for it."""
    from fake_hub import hub_at

    with hub_at() as (address, found):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield found


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, official questions and published files; skips where there is none."""
    folder = os.environ.get("LAID_SHARED")
    if not folder:
        pytest.skip(
            "LAID_SHARED is not set: no real COCO images, official questions and published files at hand"
        )
    return Path(folder)


@pytest.fixture(scope="session")
def micro() -> Settings:
    """The validated micro configuration."""
    return validate(MICRO)


@pytest.fixture(scope="session")
def micro_file(tmp_path_factory) -> Path:
    """The micro configuration as a file, for the command line."""
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(yaml.safe_dump(MICRO, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def haystacks(micro, coco_root, tmp_path_factory) -> Path:
    """train.json and test/ of the micro configuration."""
    from laid.data.haystacks import build_haystacks

    out = tmp_path_factory.mktemp("questions") / "haystacks"
    build_haystacks(micro, coco_root, out)
    return out


@pytest.fixture(scope="session")
def family(micro, coco_root, tmp_path_factory) -> dict[str, Path]:
    """Checkpoint folders of a teacher and a student, untrained, with weights large enough that attention is uneven."""
    import torch

    from laid.data.coco import load_coco
    from laid.toy.family import build_config, build_model, build_processor

    root = tmp_path_factory.mktemp("models")
    categories = load_coco(coco_root, "train2017").categories
    processor = build_processor(categories, micro.family.image_pixels)
    for name, member in micro.family.members.items():
        model = build_model(build_config(processor, micro.family, member), seed=len(name))
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" not in key:
                    parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / name)
        processor.save(root / name)
    return {name: root / name for name in micro.family.members}


@pytest.fixture(scope="session")
def cache(micro, family, coco_root, haystacks, tmp_path_factory):
    from laid.training.teacher_cache import build_cache

    out = tmp_path_factory.mktemp("cache") / "teacher_cache"
    build_cache(micro, family["teacher"], coco_root, haystacks / "train.json", out)
    return out


@pytest.fixture(scope="session")
def start(family, coco_root, haystacks, cache):
    """start(config, method, out, ...): a Run, not begun."""
    from laid.training.recipe import Run

    def start(config, method, out, seed=0, **options):
        paths = {"student": family["small"], "teacher_cache": None if method == "sft" else cache}
        paths |= {"questions": haystacks / "train.json", "coco": coco_root} | options
        return Run(config, method, seed, "small", out=out, **paths)

    return start


@pytest.fixture(scope="session")
def runs(micro, start, tmp_path_factory):
    """One run per method, made when it is first asked for."""
    from trainer_runs import Finished

    made = {}

    def run(method):
        if method not in made:
            out = tmp_path_factory.mktemp("runs") / method / "seed0"
            made[method] = Finished(start(micro, method, out))
        return made[method]

    return run
