"""Keys of the configuration that the documents name exist, and overlays that they show load."""

import re
import typing
from pathlib import Path

import pytest
import yaml

from laid.settings import Section, Settings, TrainedMethod, load

ROOT = Path(__file__).resolve().parents[2]
HISTORY = ROOT / "docs/lab/tuning.md"  # names options as they were
DOCUMENTS = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if p != HISTORY]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
DOTTED = re.compile(r"[a-z_]+(?:\.(?:\w+|<\w+>|\*))+")


def sections(annotation) -> list[type[Section]]:
    """The section classes in a field's type, in a mapping's values too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in sections(part)]


def known(parts: list[str], models: list[type[Section]]) -> bool:
    """Whether a dotted key leads somewhere from one of `models`; * and <name> stand for any key."""
    if not parts:
        return True
    for model in models:
        for name, field in model.model_fields.items():
            if name == parts[0] or parts[0][0] == "<" or parts[0][-1] == "*":
                below, rest = sections(field.annotation), parts[1:]
                if typing.get_origin(field.annotation) is dict:
                    rest = rest[1:]
                if known(rest, below):
                    return True
    return False


def flat(value, before=()) -> list[list[str]]:
    """The paths of a mapping's leaves."""
    if not isinstance(value, dict) or not value:
        return [list(before)]
    return [path for key, child in value.items() for path in flat(child, (*before, str(key)))]


def keys(text: str) -> list[list[str]]:
    """Dotted keys and `key: value` in inline code that start with a section or with a part of a method."""
    found = []
    prose = re.sub(r"\[`[^`]+`\]\(", "(", FENCED.sub("", text))  # links name functions
    for span in re.findall(r"`([^`\n]+)`", prose):
        head, colon, value = span.partition(": ")
        if colon and re.fullmatch(r"[a-z_.]+", head):
            paths = [head.split(".") + path for path in flat(yaml.safe_load(value) if "{" in value else None)]
        elif DOTTED.fullmatch(span):
            paths = [span.split(".")]
        else:
            continue
        found += [
            path
            for path in paths
            if path[0] in Settings.model_fields or path[0] in TrainedMethod.model_fields
        ]
    return [path for path in found if path[-1] not in ("json", "md", "py", "yaml", "safetensors", "html")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_keys_exist(document):
    found = keys(document.read_text(encoding="utf-8"))
    assert not [".".join(path) for path in found if not known(path, [Settings, TrainedMethod])]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_overlays_that_are_shown_load(document, tmp_path):
    for language, block in FENCED.findall(document.read_text(encoding="utf-8")):
        shown = yaml.safe_load(block.replace("!function ", "")) if language == "yaml" else None
        if shown and shown.keys() <= Settings.model_fields.keys():
            overlay = tmp_path / "mine.yaml"
            overlay.write_text(block, encoding="utf-8")
            load([ROOT / "config.yaml", overlay])


def test_keys_were_found():
    assert len([key for document in DOCUMENTS for key in keys(document.read_text(encoding="utf-8"))]) > 40
