"""The card of a student that `laid distill` made: README.md in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laid import __version__
from laid.evaluation.intervals import wilson
from laid.io import dumps
from laid.models.loading import parameter_label

LICENCE = (
    "The weights are derived from the student named above, whose licence applies to them; the teacher's licence may restrict"
    " what its outputs are used for, and the images' licences what models trained on them are used for. Check all three"
    " before passing this model on."
)


def card(record: Mapping[str, Any], sources: Mapping[str, str], adapter: bool) -> str:
    """README.md of the exported student: what it is, from what, how it was made, what it scores."""
    counts = {role: parameter_label(n) for role, n in record["parameters"].items()}
    low, high = record["sizes"]
    hashes = record["hashes"]
    what = (
        f"A vision-language model ({counts['student']} parameters) trained by `laid distill` {__version__} with the method"
        f" `{record['method']}` (long-window anchoring distillation, Zhou et al., AAAI 2026) from a teacher of {counts['teacher']}."
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [laid, distillation, long-context]",
        "---",
        "",
        f"# {record['name']}, {record['method']}",
        "",
        what,
        "",
        "| | From | SHA-256 |",
        "|---|---|---|",
        f"| Student before | `{_last(sources['student'])}` | `{_short(hashes['student'])}` |",
        f"| Teacher | `{_last(sources['teacher'])}` | `{_short(hashes['teacher'])}` |",
        f"| Training questions | `{sources['data']}`: {record['questions']} questions, {low} to {high} images | `{hashes['data']}` |",
        f"| This model | | `{_short(hashes['exported'])}` |",
        "",
        "## Use",
        "",
        *_usage(adapter, sources["student"]),
        "## Accuracy",
        "",
        *_accuracy(record),
        "## Training",
        "",
        f"{record['steps']} steps, seed {record['seed']}, last logged loss {record['loss']:.4f}.",
        "",
        "```json",
        *dumps(record["settings"]).splitlines(),
        "```",
        "",
        "## Licence",
        "",
        LICENCE,
        "",
    ]
    return "\n".join(lines)


def for_hub(text: str, repo: str, adapter: bool) -> str:
    """A card as it stands in the repository `repo`: it says how to load that."""
    if not adapter:
        before, _, rest = text.partition("## Use\n")
        text = "\n".join(
            [f"{before}## Use", "", *_usage(False, ""), f"## Accuracy{rest.partition('## Accuracy')[2]}"]
        )
    return text.replace("<this folder>", repo)


def _usage(adapter: bool, student: str) -> list[str]:
    if adapter:
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForImageTextToText",
            f'base = AutoModelForImageTextToText.from_pretrained("{_last(student)}")',
            'model = PeftModel.from_pretrained(base, "<this folder>")',
        ]
    else:
        code = [
            "from transformers import AutoModelForImageTextToText",
            'model = AutoModelForImageTextToText.from_pretrained("<this folder>")',
        ]
    return ["```python", *code, "```", ""]


def _accuracy(record: Mapping[str, Any]) -> list[str]:
    answers = record["accuracy"]
    if not answers:
        return ["Not measured: no held-out questions were given (`--eval`).", ""]
    columns = [("before", "Before"), ("after", "After"), ("teacher", "Teacher")]
    free = record.get("likelihood")
    what = "exact match of the given answer (normalised as SQuAD does)" if free else "accuracy"
    lines = [
        f"Held-out questions, {what} in % with its 95 % interval (Wilson).",
        "",
        f"| Images | Questions | {' | '.join(title for _, title in columns)} |",
        f"|--:|--:|{'--:|' * len(columns)}",
    ]
    for size, (_, asked) in answers["after"].items():
        entries = []
        for key, _ in columns:
            right, n = answers[key][size]
            low, high = wilson(right, n)
            entries.append(f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"| {size} | {asked} | {' | '.join(entries)} |")
    if free:
        each = ", ".join(f"{title.lower()} {per_token(free[key]):.4f}" for key, title in columns)
        lines += ["", f"Mean log-likelihood of a token of the given answers: {each}."]
    lines += ["", f"SHA-256 of the held-out file: `{record['hashes']['held_out']}`."]
    if "validation" in record:
        chosen = record["validation"]
        lines.append(
            f"They were asked every {chosen['every']} steps of training (the first 100), and this model is that of step"
            f" {chosen['step']}, which answered best: its own figures are high for that reason too."
        )
    if record["overlap"]:
        lines.append(
            f"{record['overlap']} of its images also occur in the training questions: read the figures with care."
        )
    return [*lines, ""]


def per_token(by_size: Mapping[str, Any]) -> float:
    """The mean over sizes' tokens of {size: [sum of log-likelihoods, tokens]}."""
    total, tokens = (sum(column) for column in zip(*by_size.values(), strict=True))
    return total / tokens


def _short(value: str) -> str:
    """A hash as it is; a hub id without its prefix."""
    return value.removeprefix("hub:")


def _last(source: str) -> str:
    """A folder by its name (its path is of no use elsewhere); a hub id whole."""
    return Path(source).resolve().name if Path(source).is_dir() else source
