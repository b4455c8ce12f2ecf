"""Loading and saving checkpoints: Hugging Face format, by hub id or local folder, safetensors only."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging as hf_logging

from laid.errors import LaidError
from laid.io import read_json
from laid.models import parallel
from laid.models.families import FAMILIES, unsupported

hf_logging.disable_progress_bar()
FLOATS = ("F16", "BF16", "F32", "F64")
WEIGHTS = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")
SPREAD = 0.5  # of a GPU's memory: what is left is for activations and the key-value cache of long prompts


def resolve(source: str | Path) -> str:
    """A local folder's path as given, or a hub id. Raises LaidError for a path that is not there."""
    text = str(source)
    path = Path(text)
    if path.is_dir():
        adapter = (path / "adapter_config.json").is_file()
        if adapter and not any(path.glob("model*.safetensors")):
            raise LaidError(
                f"{text}: holds an adapter alone: merge it into its base first (peft: merge_and_unload, then save_pretrained),"
                " and give the folder of the whole model"
            )
        if adapter:  # transformers would load another folder, the one that this file names
            raise LaidError(
                f"{text}: holds a model and an adapter_config.json, and it is not clear which is meant: remove that file,"
                " or merge the adapter first"
            )
        if not (path / "config.json").is_file():
            raise LaidError(f"{text}: no config.json in this folder: not a checkpoint in Hugging Face format")
        return text
    if path.exists():
        raise LaidError(f"{text}: is a file, expected a checkpoint folder or a hub id")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise LaidError(f"{text}: no such checkpoint folder (a hub id has the form owner/name)")
    return text


def source_of(model: str | Path) -> str | Path:
    """A checkpoint as provenance names it: a local folder, or "hub:owner/name"."""
    return Path(model) if Path(model).is_dir() else f"hub:{model}"


def name_of(model: str | Path) -> str:
    """The last part of a folder's or a hub checkpoint's name."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model).rsplit("/", 1)[-1]


@contextmanager
def source_errors(source: str) -> Iterator[None]:
    """Turn what the loading libraries raise for a bad checkpoint into one line that names it; their tables and retries
    are not shown."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    except LaidError:
        raise
    except Exception as error:  # the libraries raise OSError, ValueError, SafetensorError, KeyError, ...
        if Path(source).is_dir():
            for file in sorted(Path(source).glob("*.json")):
                read_json(file)  # the file that is broken, by its name
        reason = " ".join(str(error).split())
        if "couldn't connect to" in reason:
            reason = "the hub cannot be reached and the files are not in the cache: check the network, or give a local folder"
        raise LaidError(f"{source}: cannot be loaded: {reason[:300] or type(error).__name__}") from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def require_family(source: str) -> None:
    """Raise LaidError, one line naming `source`, where its configuration is no known family's (laid.models.families)."""
    with source_errors(source):
        written, _ = PreTrainedConfig.get_config_dict(source)
    if not isinstance(written, dict):
        raise LaidError(f"{source}: config.json holds no names with values: get it again")
    kind = written.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise LaidError(f"{source}: {unsupported(kind)}")
    if written.get("transformers_weights"):  # weights by another name, that nobody would look at
        raise LaidError(
            f"{source}: config.json names weights of its own (transformers_weights): rename them to model.safetensors"
        )
    text = read_config(source).get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise LaidError(f"{source}: has sliding-window layers (use_sliding_window), which are not supported")


def require_weights(source: str) -> None:
    """Raise LaidError, one line, where a local folder's safetensors files are missing, not whole, elsewhere, or hold anything
    but floating-point weights (unless config.json says how they are quantised); a hub id is not asked.

    Reads headers only.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).is_file():
        if not index.is_file():
            pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            raise LaidError(
                f"{folder}: no model.safetensors"
                + (f", only {pickled[0]}, and pickled files are never opened" if pickled else "")
                + ": get the weights as safetensors"
            )
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise LaidError(f"{index}: holds no weight_map of names to files: get it again")
        files = sorted(set(shards.values()))
        odd = [name for name in files if not WEIGHTS.fullmatch(name)]
        if odd:  # what lies elsewhere, or is hidden, stands in no fingerprint
            raise LaidError(
                f"{index}: names {odd[0]!r}: weights must be .safetensors files in this folder itself: get it again"
            )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise LaidError(
            f"{folder}: {len(absent)} of {len(files)} weight files are missing, first {absent[0]}: get it again"
        )
    quantised = "quantization_config" in (read_json(folder / "config.json") or ())
    for file in (folder / name for name in files):
        try:
            with safe_open(file, "pt") as weights:
                if not quantised:
                    require_floats(file, weights)
        except (OSError, SafetensorError) as error:
            with file.open("rb") as stream:
                pointer = stream.read(40).startswith(b"version https://git-lfs")
            what = (
                "a Git LFS pointer, not the weights" if pointer else f"not a whole safetensors file ({error})"
            )
            raise LaidError(f"{file}: {what}, {file.stat().st_size:,} bytes: get it again") from None


def require_floats(file: Path, weights: Any) -> None:
    """Raise LaidError, naming `file`, where an open safetensors file holds what no weights are: integers, bool, complex."""
    for name in list(weights.keys()):
        kind = weights.get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise LaidError(
                f"{file}: {name} is {kind}, weights are {', '.join(FLOATS)}: converted by mistake? get it again"
            )


def load_model(
    source: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A vision-language model, in evaluation mode; only safetensors weights are read and no remote code is
    run.

    device: "cuda" without a number lays a model that is large for one GPU over all that are visible (see `spread`). Where
    several processes share models (laid.models.parallel), each has its part of this one.
    Raises LaidError, one line naming `source`, for files that are missing, cut short, not safetensors, or
    another model's, and for a model too large for the GPUs.
    """
    source = resolve(source)
    require_family(source)
    require_weights(source)
    shared = parallel.world() > 1
    over = None if shared else spread(source, dtype, device)
    place: dict[str, Any] = {"device_map": over}
    if shared:
        parallel.require_shares(source, read_config(source))
        place = {"distributed_config": DistributedConfig(tp_size=parallel.world())}
    with source_errors(source):
        model, report = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **place,
            ignore_mismatched_sizes=True,  # refused below, with the sizes
        )
    for name, theirs, ours in sorted(report["mismatched_keys"]):
        raise LaidError(
            f"{source}: {name} is {list(theirs)} in the file, {list(ours)} by config.json: they belong to different models"
        )
    tied = model.config.tie_word_embeddings
    absent = [name for name in report["missing_keys"] if not (tied and name == "lm_head.weight")]
    if absent:
        raise LaidError(f"{source}: {len(absent)} weights are missing, first {min(absent)}: get it again")
    surplus = [
        n for n in report["unexpected_keys"] if re.search(r"\.(layers|blocks)\.\d+\..*(weight|bias)$", n)
    ]
    if surplus:
        raise LaidError(
            f"{source}: {len(surplus)} weights are of layers that config.json does not have, first {min(surplus)}:"
            " they belong to different models"
        )
    if shared:
        return model.eval()
    if over is None:
        return model.to(device).eval()
    outside = [name for name, place in model.hf_device_map.items() if place in ("cpu", "disk")]
    if outside:
        raise LaidError(
            f"{source}: does not fit the {torch.cuda.device_count()} GPUs at hand ({len(outside)} parts are left over,"
            f" first {outside[0]}): ask for more GPUs"
        )
    return model.eval()


def spread(source: str, dtype: torch.dtype | str, device: str | torch.device) -> str | None:
    """transformers' device_map: None for one device, "auto" for layers laid over all visible GPUs, one after another.

    That is done where device is "cuda", there are several, and the weights alone are more than SPREAD of one GPU's memory.
    The verbs that read much let several processes share such a model instead (laid.models.parallel).
    """
    if str(device) != "cuda" or torch.cuda.device_count() < 2:
        return None
    size = parameters(empty_model(source)) * getattr(dtype, "itemsize", 4)
    return "auto" if size > SPREAD * torch.cuda.get_device_properties(0).total_memory else None


def empty_model(source: str | Path) -> PreTrainedModel:
    """The model that `source` describes, without weights (on the meta device): to count or compare shapes."""
    source = resolve(source)
    require_family(source)
    config = read_config(source)
    with source_errors(source), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)


def read_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of the checkpoint `source`. Raises LaidError, one line naming it, where it cannot be read."""
    with source_errors(str(source)):
        return AutoConfig.from_pretrained(resolve(source), trust_remote_code=False)


def parameters(model: torch.nn.Module) -> int:
    """Number of weights, shared ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def parameter_label(count: int) -> str:
    """A short name for a size: 7_600_000_000 -> "7.6B", 138_000 -> "138K"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            value = count / unit
            return f"{value:.0f}{name}" if value >= 20 else f"{value:.1f}{name}"
    return str(count)
