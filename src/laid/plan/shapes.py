"""What a member of the family is made of, without its weights: its config, and the model on the meta device.

Images and tokenizers are imported where they are needed, so that benchmarks run with torch and transformers alone.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from laid.errors import LaidError
from laid.models.loading import resolve, source_errors
from laid.settings import Settings

# The shapes of the paper's three checkpoints, so that a plan needs no network: as their config.json files state them.
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "hidden": 2048, "layers": 36, "heads": 16, "kv": 2, "mlp": 11008, "words": 151936, "tied": True, "vision_mlp": 3420,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "mlp": 18944, "words": 152064, "tied": False, "vision_mlp": 3420,
    },
    "Qwen/Qwen2.5-VL-32B-Instruct": {
        "hidden": 5120, "layers": 64, "heads": 40, "kv": 8, "mlp": 27648, "words": 152064, "tied": False, "vision_mlp": 3456,
    },
}  # fmt: skip


def published_config(name: str) -> PreTrainedConfig:
    """The config of one of PUBLISHED, as far as shapes go."""
    s = PUBLISHED[name]
    return AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={
            "vocab_size": s["words"],
            "hidden_size": s["hidden"],
            "intermediate_size": s["mlp"],
            "num_hidden_layers": s["layers"],
            "num_attention_heads": s["heads"],
            "num_key_value_heads": s["kv"],
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": None,
            "eos_token_id": 151645,
            "pad_token_id": 151643,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": s["vision_mlp"],
            "num_heads": 16,
            "out_hidden_size": s["hidden"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=s["tied"],
    )


def member_config(
    config: Settings, member: str, configs: str | Path | None = None
) -> tuple[PreTrainedConfig, str]:
    """(config, where its shapes come from) of a member named in `models`.

    configs: a folder whose <member>/ or <checkpoint's name>/ holds a config.json; it goes first. Then the checkpoint
    of models.checkpoints: a local folder (config.json is enough), the hub's cache, PUBLISHED, the hub itself; a
    member without checkpoint is made of the section `family`. Raises LaidError where none of these knows it.
    """
    given = config.models.checkpoints.get(member)
    for name in [member, *([given.rstrip("/").rpartition("/")[2]] if given else [])]:
        if configs is not None and (Path(configs) / name / "config.json").is_file():
            return _read(Path(configs) / name), str(Path(configs) / name)
    if given is None:
        family = config.family
        if member not in family.members:
            raise LaidError(
                f"models: {member!r} has neither a checkpoint (models.checkpoints) nor a member in family.members"
            )
        from laid.toy.family import build_config

        return build_config(_processor(family.image_pixels), family, family.members[member]), "family"
    if Path(given).is_dir():
        return _read(given), given
    resolve(given)
    known = cached_file(
        given, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    if known is None and given in PUBLISHED:
        return published_config(given), f"{given} (built-in shapes)"
    try:
        return _read(given), given
    except LaidError as error:
        raise LaidError(
            f"{error}; to plan without it put its config.json into DIR/{member}/ and give --configs DIR"
        ) from None


def _read(source: str | Path) -> PreTrainedConfig:
    with source_errors(resolve(source)):
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)


@cache
def _processor(image_pixels: int):
    from laid.toy.family import build_processor
    from laid.toy.render import CATEGORIES

    return build_processor(sorted(CATEGORIES), image_pixels)


def meta_model(
    config: PreTrainedConfig, dtype: str = "bfloat16", attention: str = "sdpa", device: str = "meta"
) -> PreTrainedModel:
    """The model of that config in evaluation mode, on the meta device: shapes without content.

    device: another one gives it random weights, for benchmarks.
    """
    config = copy.deepcopy(config)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation="eager" if attention == "eager" else "sdpa",
            trust_remote_code=False,
        )
    return model.eval()


def text_tokens(config: Settings) -> int | None:
    """Tokens of a prompt beside its images, where the family is made here; None where checkpoints bring a tokenizer."""
    if config.models.checkpoints:
        return None
    from laid.data.questions import TEMPLATES, with_article
    from laid.toy.render import CATEGORIES

    anchor, target = (with_article(name) for name in list(CATEGORIES)[:2])
    question = TEMPLATES["single"].format(anchor=anchor, target=target)
    encoded = _processor(config.family.image_pixels).encoder.encode(question, [(1, 1)])
    return len(encoded.ids) - 3
