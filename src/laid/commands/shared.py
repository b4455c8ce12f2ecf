"""What several verbs share: the configuration flag and a deterministic start."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE [FILE ...]`."""
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[Path("config.yaml")], metavar="FILE", help="base, then overlays"
    )


def deterministic(threads: int | None = None) -> None:
    """Same inputs, same seed, same bytes: deterministic kernels and a fixed number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    if threads:
        torch.set_num_threads(threads)
