"""The model families the code takes, one small file each; docs/guides/families.md says how to add one."""

from __future__ import annotations

from typing import Any

from laid.errors import LaidError
from laid.models.families.base import Family
from laid.models.families.qwen2_5_vl import Qwen25VL
from laid.models.families.qwen2_vl import Qwen2VL
from laid.models.families.qwen3_vl import Qwen3VL

FAMILIES = {family.model_type: family for family in (Qwen25VL(), Qwen2VL(), Qwen3VL())}
_BY_TEXT = {f"{name}_text": family for name, family in FAMILIES.items()}


def family_of(text_config: Any) -> Family:
    """The family of a decoder, from its text config. Raises LaidError for one that is not known."""
    kind = text_config.model_type
    if kind not in _BY_TEXT:
        raise unsupported(kind)
    return _BY_TEXT[kind]


def unsupported(model_type: Any) -> LaidError:
    """The error for a model of another family."""
    return LaidError(
        f"model_type {str(model_type)[:60]!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        " (docs/guides/families.md says how to add one)"
    )
