"""Section tune: what is tried of each method, on several pretrained students.

Every setting becomes a method of its own, and every further pretrained student a member of the family: the rules that
train and evaluate need not know of tuning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from laid.settings.base import Distinct, Section
from laid.settings.measuring import Names

if TYPE_CHECKING:
    from laid.settings.tree import Settings

Values = Annotated[dict[str, Any], Field(min_length=1)]


class Tune(Section):
    """Which values a method gets (`snakemake tune`, configs/tune.yaml): settings of each method, tried on several pretrained students and chosen among on the validation questions. Each is trained with sweep.seeds seeds."""

    methods: dict[str, Annotated[Distinct[Values], Field(min_length=1)]] = {}
    """Method -> the settings that are tried: each a mapping of the method's keys, laid over it as a method of its own that is named by its values (sft_lr0p001_epochs5_lora_null)."""
    students: Names | None = None
    """Students that they are tried on; null: all."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """The most epochs that are chosen, where the time for training is limited; settings of more are tried and shown. null: any."""
    pretrained: Annotated[int, Field(ge=1, le=100)] = 1
    """How often each of these students is pretrained: of small the first is small itself, the others are small_1, small_2, ..., each with the next seed (family.members.<name>.seed)."""


def variants(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, tuple[str, int]]:
    """name -> (method, place in its list) of every setting in tune.methods, in the order written."""
    return {
        method + _spelt(setting): (method, place)
        for method, settings in methods.items()
        for place, setting in enumerate(settings)
    }


def copies(student: str, settings: Settings) -> list[str]:
    """The members that are `student` pretrained with its own seed, the next one and so on."""
    return [student, *(f"{student}_{k}" for k in range(1, settings.tune.pretrained))]


def tuned_students(settings: Settings) -> list[str]:
    """The pretrained students that settings are tried on."""
    chosen = settings.tune.students or settings.models.students
    return [name for student in chosen for name in copies(student, settings)]


def _spelt(value: Any) -> str:
    """A value as the end of a method's name: 0.002 as 0p002, {rank: 8} as _rank8, null as _null."""
    if isinstance(value, Mapping):
        return "".join(f"_{key}{_spelt(child)}" for key, child in value.items())
    if isinstance(value, (list, tuple)):
        return "".join(f"_{_spelt(child).lstrip('_')}" for child in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.12g}".replace(".", "p").replace("-", "m").replace("+", "")
    text = "null" if value is None else str(value).lower()
    return "_" + re.sub(r"[^a-z0-9]", "_", text)
