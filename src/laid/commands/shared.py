"""What several verbs share: the configuration flag and a deterministic start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laid.results.answers import Results
    from laid.settings import Settings


def config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE [FILE ...]`; `configuration` stands in where it is not given."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="base, then overlays (default: config.yaml in this folder; without one, the paper's methods and defaults)",
    )


def configuration() -> list[Path]:
    """The files that hold where no `--config` is given."""
    here = Path("config.yaml")
    if here.is_file():
        return [here]
    print(
        "no config.yaml here: going by the paper's methods and defaults (laid config prints them)",
        file=sys.stderr,
    )
    return [Path(__file__).resolve().parents[1] / "default.yaml"]


def results_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add --config, --cells and --out of the verbs about results; the last two default to places below
    <results>/<scale>."""
    config_argument(parser)
    parser.add_argument(
        "--cells",
        type=Path,
        help="folder of cells, <suite>/<student>/<method>/<size>.json (default <results>/<scale>/cells)",
    )
    parser.add_argument("--out", type=Path, help=f"where to write (default <results>/<scale>/{out})")


def root_of(settings: Settings) -> Path:
    """<results>/<scale> of a configuration."""
    return Path(settings.results) / settings.scale


@contextmanager
def output(folder: Path) -> Iterator[Path]:
    """The folder that a verb about results writes, which no other process does meanwhile: files of two do not mix."""
    from laid.io import alone, remove_half_written

    with alone(folder):
        remove_half_written(folder)
        yield folder


def read_results(args: argparse.Namespace) -> tuple[Results, Path, Path]:
    """The test cells that `--config` and `--cells` name, with those of larger sizes where beyond.table asks for them, the
    folder they lie in beside runs, figures and claims, and <results>/<scale>, where outputs go unless told."""
    from laid.evaluation.cells import load_cells
    from laid.results.answers import Results
    from laid.results.needed import needed_beyond
    from laid.settings import load

    settings = load(args.config)
    root = root_of(settings)
    cells = args.cells or root / "cells"
    near = load_cells(cells / "test")
    results = Results(near, settings, cells / "test")
    if beyond := list(needed_beyond(settings)):
        rows = dict.fromkeys((student, method) for student, method, _ in beyond)
        keys = [*((*row, size) for row in rows for size in results.sizes), *beyond]
        far = load_cells(cells / "beyond") if (cells / "beyond").is_dir() else {}
        results.farther = Results({**near, **far}, settings, cells / "beyond", keys)
    return results, cells.parent, root


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which model is measured, on which images, and how: --student-name to --threads."""
    parser.add_argument(
        "--student-name",
        required=True,
        help="name of the model in tables (models.students, or the teacher's)",
    )
    parser.add_argument("--method", required=True, help="a method of the configuration")
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument(
        "--runs", nargs="*", default=[], metavar="DIR", help="run folders of a trained method, one per seed"
    )
    parser.add_argument(
        "--coco", type=Path, required=True, help="COCO folder that the questions' image paths start from"
    )
    features_argument(parser)
    device_arguments(parser)


def checkpoint_argument(model: str) -> None:
    """Raise LaidError where --model is an adapter alone."""
    from laid.errors import LaidError

    if (Path(model) / "adapter_config.json").is_file():
        raise LaidError(
            f"{model}: an adapter, not a checkpoint: merge it into its base first (merge_and_unload of peft)"
        )


def device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: a GPU where there is one"
    )
    threads_argument(parser)


def features_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--features`."""
    parser.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="store of visual features, shared by all runs with the same vision tower",
    )


def features_folder(args: argparse.Namespace, settings: Settings) -> Path | None:
    """Where visual features are kept on disk: --features, or the configuration's place; None where they are not."""
    return args.features or (root_of(settings) / "features" if settings.evaluation.keep_features else None)


def threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    parser.add_argument(
        "--threads", type=count, default=1, help="CPU threads (the same number gives the same bytes)"
    )


def count(text: str, least: int = 1) -> int:
    """A flag's value that counts something: a whole number of 32 bits, `least` or more."""
    if not text.isdecimal() or len(text) <= 10 and int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from {least} on")
    if len(text) > 10 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is more than {2**31 - 1}")
    return int(text)


def seed(text: str) -> int:
    """A flag's value that is a seed: a whole number, 0 or more."""
    return count(text, least=0)


def pick_device(name: str, option: str = "--device") -> str:
    """The device that `option` stands for. Raises LaidError for one that is not there."""
    import re

    import torch

    from laid.errors import LaidError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise LaidError(f"{option} {name}: expected auto, cpu, cuda or cuda:<number>")
    there = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= there:
        raise LaidError(f"{option} {name}: this machine has {there or 'no'} CUDA devices; use {option} cpu")
    return name


def pick_devices(args: argparse.Namespace, model: str, dtype: str) -> str:
    """The device of this process, which may be one of several that share `model` (laid.models.parallel).

    Where the model is large for one of the GPUs at hand, this process becomes the launcher of one process for each.
    """
    import torch

    from laid.models import parallel
    from laid.models.loading import read_config, spread

    device = pick_device(args.device)
    if parallel.launched() == 1 and hasattr(args, "words") and spread(model, getattr(torch, dtype), device):
        count = parallel.processes(read_config(model), torch.cuda.device_count())
        if count > 1:
            parallel.start_processes(count, args.words)
    return parallel.join(device)


def deterministic(threads: int | None = None) -> None:
    """Same inputs, same seed, same bytes: deterministic kernels and a fixed number of threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    # Filling fresh memory finds reads of what was never written; it changes no result and costs 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if threads:
        torch.set_num_threads(threads)


def runs_by_method(settings: Settings, methods: list[str], runs: list[Path]) -> dict[str, Path | None]:
    """method -> the first of its run folders (<method>/seed<k>), None for one without training. Raises LaidError."""
    from laid.errors import LaidError
    from laid.settings import TrainedMethod

    found: dict[str, Path | None] = {}
    for method in methods:
        own = [run for run in runs if Path(os.path.abspath(run)).parent.name == method]
        if not own and isinstance(settings.methods.get(method), TrainedMethod):
            raise LaidError(
                f"method {method} is trained: give its run folder (.../{method}/seed0) with --runs"
            )
        found[method] = own[0] if own else None
    return found
