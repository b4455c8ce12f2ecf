"""Typed settings: one class a section, whose docstrings are the documentation; overlays, messages, slices."""

from laid.settings.base import Section, merge, plain
from laid.settings.loading import json_schema, load, merged, resolved_file, validate
from laid.settings.methods import Base, Method, SelfExtend, TrainedMethod, Yarn
from laid.settings.slices import SLICES, slice_for, slice_json
from laid.settings.tree import Settings

__all__ = [
    "SLICES", "Base", "Method", "Section", "SelfExtend", "Settings", "TrainedMethod", "Yarn",
    "json_schema", "load", "merge", "merged", "plain", "resolved_file", "slice_for", "slice_json", "validate",
]  # fmt: skip
