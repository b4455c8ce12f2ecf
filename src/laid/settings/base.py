"""What all sections have in common, and the kinds of values in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from laid.io import UNPRINTABLE, unprintable

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]  # the ends included
Fraction = Annotated[float, Field(gt=0, lt=1)]  # the ends excluded
Text = Annotated[str, Field(min_length=1)]


def _path(value: str) -> str:
    if unprintable(value):
        raise PydanticCustomError("path", UNPRINTABLE)
    return os.path.expanduser(value)


Place = Annotated[Text, AfterValidator(_path)]  # a path, ~ taken for the home folder


def _label(value: str) -> str:
    if unprintable(value) or "$" in value:
        raise PydanticCustomError(
            "label", "tables and figures print a label as it is: no $, no control characters"
        )
    return value


Label = Annotated[Text, AfterValidator(_label)]  # what tables and figures call something


def _distinct(values: list[T]) -> list[T]:
    if any(value in values[:i] for i, value in enumerate(values)):
        raise PydanticCustomError("distinct", "an entry is there twice")
    return values


Distinct = Annotated[list[T], AfterValidator(_distinct), Field(json_schema_extra={"uniqueItems": True})]


class Section(BaseModel):
    """A section of the configuration: frozen, closed to unknown keys, strict about types.

    The docstring of a class and the text below each field are what docs/reference/settings.md and the JSON schema say.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def changed(self, values: Mapping[str, Any]) -> Self:
        """A validated copy with `values` laid over it, key by key and at any depth."""
        return type(self).model_validate(merge(self.model_dump(), values))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge deeply, everything else is replaced. Neither argument is changed."""
    result = {key: plain(value) for key, value in base.items()}
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = plain(value)
    return result


def plain(value: Any) -> Any:
    """A copy of `value` in dictionaries, lists and scalars, as it would be written to a file."""
    if isinstance(value, Section):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return value
