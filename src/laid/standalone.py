"""`laid distill`: one student, one teacher, any question file, without the workflow; a model card beside the result."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laid import __version__, provenance
from laid.data.questions import Question, read_questions
from laid.errors import LaidError
from laid.evaluation.evaluate import Evaluator, source_of
from laid.evaluation.intervals import wilson
from laid.evaluation.scoring import is_right
from laid.io import dumps, safe_join, sha256_file, sha256_json, write_json, write_text
from laid.methods.registry import UNTRAINED, load_with_method
from laid.models.loading import empty_model, parameter_label, parameters, require_weights, resolve
from laid.models.processing import Processor
from laid.settings import plain
from laid.training.teacher_cache import build_cache
from laid.training.trainer import Trainer

LICENCE = (
    "The weights are derived from the student named above, whose licence applies to them; the teacher's licence may restrict"
    " what its outputs are used for, and the images' licences what models trained on them are used for. Check all three"
    " before passing this model on."
)


def distill(
    config: Mapping[str, Any],
    teacher: str | Path,
    student: str | Path,
    data: str | Path,
    coco_root: str | Path,
    out: str | Path,
    method: str = "laid",
    seed: int = 0,
    held_out: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Teacher's pass, training, export to out/model with its card; returns the record written to out/distill.json.

    data, held_out: question files in Visual Haystacks form, of any sizes; held_out is answered before and after.
    An earlier result in `out` is replaced. The teacher's cache lies beside `out` while it is needed; a killed run goes on from it and from its checkpoint.
    Raises LaidError for a method without training, a broken file, an `out` that holds anything else, or models that do
    not fit.
    """
    out = Path(out)
    if method in UNTRAINED or method not in config["methods"]:
        trained = [m for m in config["methods"] if m not in UNTRAINED]
        raise LaidError(f"--method {method}: not a trained method; trained methods: {', '.join(trained)}")
    if (
        out.exists()
        and not (out / "distill.json").is_file()
        and not (out.is_dir() and not any(out.iterdir()))
    ):
        raise LaidError(
            f"{out}: exists and is no earlier result of `laid distill`: choose another folder for --out"
        )
    settings = config["methods"][method]
    questions = read_questions(data)
    asked = read_questions(held_out) if held_out else []
    name = name_of(student)
    record: dict[str, Any] = {
        "name": name,
        "method": method,
        "seed": seed,
        "overlap": _overlap(questions, asked),
    }
    record["parameters"] = {}
    for role, source in (("teacher", teacher), ("student", student)):  # both, before the teacher's long pass
        model = empty_model(source)
        require_weights(resolve(source))
        Processor.load(source).require_fits(model.config)
        record["parameters"][role] = parameters(model)
    answers: dict[str, Any] = {}
    if asked:
        answers["teacher"] = _answers(config, "base", teacher, None, coco_root, asked, device)
        answers["before"] = _answers(config, "base", student, None, coco_root, asked, device)
    cache = None
    if any(settings[key] > 0 for key in ("lambda_kl", "lambda_laid", "lambda_rows")):
        cache = _cache(config, settings, teacher, coco_root, data, out, device)
    run = Trainer(config, method, seed, name, student, cache, coco_root, data, out, device).train()
    if asked:
        # Under the folder's own method: an adapter is merged, a checkpoint is loaded as it is.
        answers["after"] = _answers(config, method, student, out, coco_root, asked, device)
    record |= {
        "steps": run["steps"],
        "loss": run["final"]["loss"],
        "questions": len(questions),
        "sizes": _range(q.size for q in questions),
        "accuracy": answers,
        "hashes": {
            "data": sha256_file(data),
            **({"held_out": sha256_file(held_out)} if held_out else {}),
            "teacher": provenance.fingerprint(source_of(teacher)),
            "student": provenance.fingerprint(source_of(student)),
            "exported": provenance.fingerprint(out / "model"),
        },
        "settings": plain({method: settings, "training": config["training"]}),
        "libraries": provenance.libraries(),
        "code": provenance.code(),
    }
    sources = {"teacher": str(teacher), "student": str(student), "data": Path(data).name}
    write_text(
        out / "model" / "README.md", card(record, sources, (out / "model/adapter_config.json").is_file())
    )
    write_json(out / "distill.json", record)
    if cache is not None:
        shutil.rmtree(cache)
    return record


def name_of(student: str | Path) -> str:
    """The last part of a folder's or a hub checkpoint's name."""
    return Path(student).resolve().name if Path(student).is_dir() else str(student).rsplit("/", 1)[-1]


def image_root(data: str | Path, given: str | Path | None = None) -> Path:
    """The folder that the image paths in `data` start from: `given`, else the first above `data` that holds an image.

    Looked at are the question file's folder and those above it, and `coco` in each of them. Raises LaidError, naming
    the image and where it was looked for.
    """
    image = read_questions(data)[0].needles[0]
    above = Path(data).resolve().parents
    roots = [Path(given)] if given else [root for folder in above for root in (folder, folder / "coco")]
    for root in roots:
        if safe_join(root, image).is_file():
            return root
    if given:
        raise LaidError(
            f"{roots[0] / image}: no such image: --coco {given} is not where the paths in {data} start from"
        )
    raise LaidError(
        f"{data}: its first image, {image}, lies neither at {above[0]} nor above: name the folder with --coco"
    )


def _cache(config, settings, teacher, coco_root, data, out: Path, device: str) -> Path:
    """The teacher's cache beside `out`, made unless the same one is there; it keeps the layers that are aligned."""
    aligned = settings["lambda_laid"] > 0 or settings["lambda_rows"] > 0
    layers = sorted({teacher_layer for _, teacher_layer in settings["alignment"]["pairs"]}) if aligned else []
    queries = "all" if settings["lambda_laid"] > 0 else "question"
    config = config.changed({"teacher_cache": {"layers": layers, "queries": queries}})
    key = sha256_json(
        [
            provenance.fingerprint(source_of(teacher)),
            sha256_file(data),
            plain(config["teacher_cache"]),
        ]
    )
    folder = out.parent / f".{out.name}.teacher-{key[:12]}"
    if not (folder / "index.json").is_file():
        build_cache(config, teacher, coco_root, data, folder, device)
    return folder


def _answers(
    config, method, model, run, coco_root, asked: Sequence[Question], device: str
) -> dict[str, list[int]]:
    """size -> [right, questions]."""
    evaluator = Evaluator(
        load_with_method(config, method, model, run, device), coco_root, config["evaluation"], str(model)
    )
    found = evaluator.answer(evaluator.ask(asked))
    by_size: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for question, answer in zip(asked, found, strict=True):
        by_size[question.size][0] += is_right(answer)
        by_size[question.size][1] += 1
    return {str(size): by_size[size] for size in sorted(by_size)}


def _overlap(questions: Sequence[Question], asked: Sequence[Question]) -> int:
    """How many images of the held-out questions stand in the training questions too."""
    seen = {path for q in questions for path in q.needles + q.distractors}
    return len({path for q in asked for path in q.needles + q.distractors} & seen)


def _range(sizes) -> list[int]:
    sizes = list(sizes)
    return [min(sizes), max(sizes)]


# ------------------------------------------------------------------ the card


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
    lines = [
        "Held-out questions, accuracy in % with its 95 % interval (Wilson).",
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
    lines += ["", f"SHA-256 of the held-out file: `{record['hashes']['held_out']}`."]
    if record["overlap"]:
        lines.append(
            f"{record['overlap']} of its images also occur in the training questions: read the figures with care."
        )
    return [*lines, ""]


def _short(value: str) -> str:
    """A hash as it is; a hub id without its prefix."""
    return value.removeprefix("hub:")


def _last(source: str) -> str:
    """A folder by its name (its path is of no use elsewhere); a hub id whole."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def summary(record: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    done = f"{record['name']} {record['method']}: {record['steps']} steps, loss {record['loss']:.4f}"
    if not record["accuracy"]:
        return done
    totals = {}
    for key in ("before", "after"):
        right, n = (sum(v) for v in zip(*record["accuracy"][key].values(), strict=True))
        totals[key] = 100 * right / n
    return f"{done}; held-out accuracy {totals['before']:.1f} % before, {totals['after']:.1f} % after"
