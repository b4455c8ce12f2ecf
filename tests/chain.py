"""The chain from images to cells, each step by its verb, as the rules call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from laid.cli import main


def build(top: Path, values: Mapping, cells: Mapping[str, Sequence[int]]) -> None:
    """config.yaml and results/<scale> below `top`: data, haystacks, both models of the micro family, the run small/laid.

    values: the configuration. cells: <student>/<method> -> the sizes that it is asked.
    """
    import torch

    root = f"results/{values['scale']}"
    (top / "config.yaml").write_text(yaml.safe_dump(dict(values), sort_keys=False))
    coco, device = f"--coco {root}/coco", "--device cpu"
    questions = f"--questions {root}/haystacks/train.json {coco}"
    commands = [
        f"data --out {root}/coco",
        f"haystacks {coco} --out {root}/haystacks",
        f"pretrain --member teacher {coco} --out {root}/models/teacher",
        f"pretrain --member small {coco} --out {root}/models/small",
        f"teacher-cache --teacher {root}/models/teacher {questions} --out {root}/teacher_cache/train {device}",
        f"train --student-name small --method laid --student {root}/models/small {questions} {device}"
        + f" --teacher-cache {root}/teacher_cache/train --out {root}/runs/small/laid/seed0",
    ]
    for cell, sizes in cells.items():
        student, method = cell.split("/")
        runs = "" if method == "base" else f"--runs {root}/runs/{cell}/seed0"
        commands.append(
            f"evaluate --student-name {student} --method {method} --model {root}/models/{student} {runs} {coco}"
            f" --questions {root}/haystacks/test --sizes {' '.join(map(str, sizes))} --out {root}/cells/test/{cell} {device}"
        )
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        for command in commands:
            assert main(command.split()) == 0, command
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
