"""Loading and saving checkpoints: Hugging Face format, by hub id or local folder, safetensors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from laid.errors import LaidError
from laid.models.families import FAMILIES, unsupported

hf_logging.disable_progress_bar()


def resolve(source: str | Path) -> str:
    """A local folder's path as given, or a hub id. Raises LaidError for a path that is not there."""
    text = str(source)
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LaidError(f"{text}: no config.json in this folder: not a checkpoint in Hugging Face format")
        return text
    if path.exists():
        raise LaidError(f"{text}: is a file, expected a checkpoint folder or a hub id")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise LaidError(f"{text}: no such checkpoint folder (a hub id has the form owner/name)")
    return text


@contextmanager
def source_errors(source: str) -> Iterator[None]:
    """Turn what the loading libraries raise for a bad checkpoint into one line that names it."""
    try:
        yield
    except LaidError:
        raise
    except Exception as error:  # the libraries raise OSError, ValueError, SafetensorError, KeyError, ...
        reason = " ".join(str(error).split())
        raise LaidError(f"{source}: cannot be loaded: {reason[:300] or type(error).__name__}") from error


def require_family(source: str) -> None:
    """Raise LaidError, one line naming `source`, where its configuration is no known family's (laid.models.families)."""
    with source_errors(source):
        written, _ = PreTrainedConfig.get_config_dict(source)
    if written.get("model_type") not in FAMILIES:
        raise LaidError(f"{source}: {unsupported(written.get('model_type'))}")
    with source_errors(source):
        text = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise LaidError(f"{source}: has sliding-window layers (use_sliding_window), which are not supported")


def load_model(
    source: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A vision-language model, in evaluation mode; only safetensors weights are read and no remote code is
    run.

    Raises LaidError, one line naming `source`, for files that are missing, cut short, not safetensors, or
    another model's.
    """
    source = resolve(source)
    require_family(source)
    with source_errors(source):
        model, report = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    tied = model.config.tie_word_embeddings
    absent = [name for name in report["missing_keys"] if not (tied and name == "lm_head.weight")]
    if absent:
        raise LaidError(f"{source}: {len(absent)} weights are missing, first {min(absent)}: get it again")
    return model.to(device).eval()


def empty_model(source: str | Path) -> PreTrainedModel:
    """The model that `source` describes, without weights (on the meta device): to count or compare shapes."""
    source = resolve(source)
    require_family(source)
    with source_errors(source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)


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
