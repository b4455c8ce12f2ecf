"""What several verbs share: the configuration flag and a deterministic start."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE [FILE ...]`."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[Path("config.yaml")],
        metavar="FILE",
        help="base, then overlays",
    )


def device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads (the same number gives the same bytes)"
    )


def pick_device(name: str) -> str:
    """The device `--device` stands for. Raises LaidError for one that is not there."""
    import torch

    from laid.errors import LaidError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise LaidError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise LaidError(f"--device {name}: expected auto, cpu, cuda or cuda:<number>")
    return name


def deterministic(threads: int | None = None) -> None:
    """Same inputs, same seed, same bytes: deterministic kernels and a fixed number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    if threads:
        torch.set_num_threads(threads)
