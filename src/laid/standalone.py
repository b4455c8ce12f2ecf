"""`laid distill`: one student, one teacher, any question file, without the workflow; a model card beside the result."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laid import provenance
from laid.data.images import require_images
from laid.data.questions import Question, read_questions
from laid.errors import LaidError
from laid.evaluation.evaluate import Evaluator
from laid.evaluation.scoring import is_right
from laid.io import dumps, read_json, safe_join, sha256_file, sha256_json, write_json, write_text
from laid.methods.registry import load_with_method
from laid.model_card import card
from laid.models.loading import empty_model, parameters, require_weights, resolve, source_of
from laid.models.processing import Processor
from laid.settings import plain, slice_for
from laid.training.engine import start
from laid.training.recipe import Run, made, require_sensible, train
from laid.training.teacher_cache import build_cache


def distill(run: Run, held_out: str | Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Teacher's pass, training, export to out/model with its card; returns the record written to out/distill.json.

    run: with its teacher. held_out: questions answered before and after. An earlier result in `out` is replaced. The teacher's
    cache lies beside `out` while it is needed; a killed run goes on from it and from its checkpoint. Raises LaidError for a
    method without training, a broken file, an `out` that holds anything else, or models that do not fit.
    """
    out, teacher = run.out, run.teacher
    earlier = (out / "distill.json").is_file()
    require_sensible(run)
    questions = read_questions(run.questions)
    asked = read_questions(held_out) if held_out else []
    require_images(run.coco, sorted({p for q in asked for p in q.needles + q.distractors}), [held_out])
    sizes = {}
    for role, source in (
        ("teacher", teacher),
        ("student", run.student),
    ):  # both, before the teacher's long pass
        model = empty_model(source)
        require_weights(resolve(source))
        Processor.load(source).require_fits(model.config)
        sizes[role] = parameters(model)
    answers: dict[str, Any] = {}
    if asked:
        answers["teacher"] = _answers(run, "base", teacher, None, asked, device)
        answers["before"] = _answers(run, "base", run.student, None, asked, device)
    cache = _cache(run, device) if run.from_teacher else None
    cached = replace(run, teacher=None, teacher_cache=cache)
    # A run without distill.json was killed while its held-out questions were answered.
    trained = None if earlier else made(cached)
    trained = trained or train(cached, start(run.settings.training, device, run.logs))
    if asked:
        # Under the folder's own method: an adapter is merged, a checkpoint is loaded as it is.
        answers["after"] = _answers(run, run.method, run.student, out, asked, device)
    counts = [question.size for question in questions]
    start_from = made_from(run, held_out)
    record = start_from | {
        "name": run.name,
        "overlap": _overlap(questions, asked),
        "parameters": sizes,
        "steps": trained["steps"],
        "loss": trained["final"]["loss"],
        "questions": len(questions),
        "sizes": [min(counts), max(counts)],
        "accuracy": answers,
        "hashes": start_from["hashes"] | {"exported": provenance.fingerprint(out / "model")},
    }
    sources = {"teacher": str(teacher), "student": str(run.student), "data": Path(run.questions).name}
    adapter = (out / "model/adapter_config.json").is_file()
    write_text(out / "model" / "README.md", card(record, sources, adapter))
    write_json(out / "distill.json", record)
    if cache is not None:
        shutil.rmtree(cache)
    return record


def made_from(run: Run, held_out: str | Path | None) -> dict[str, Any]:
    """What a distillation depends on, as it stands in distill.json."""
    return {
        "method": run.method,
        "seed": run.seed,
        "hashes": {
            "data": sha256_file(run.questions),
            **({"held_out": sha256_file(held_out)} if held_out else {}),
            "teacher": provenance.fingerprint(source_of(run.teacher), kept=True),
            "student": provenance.fingerprint(source_of(run.student), kept=True),
        },
        "settings": plain({run.method: run.how, "training": run.settings.training}),
        "libraries": provenance.libraries(),
        "code": provenance.code(),
    }


def finished(run: Run, held_out: str | Path | None) -> dict[str, Any] | None:
    """The record of the distillation that lies in `out`, if it is this very one."""
    if not (run.out / "distill.json").is_file():
        return None
    record = read_json(run.out / "distill.json")
    hashes = {name: digest for name, digest in record.get("hashes", {}).items() if name != "exported"}
    wanted = made_from(run, held_out)
    same = dumps({name: record.get(name) for name in wanted} | {"hashes": hashes}) == dumps(wanted)
    return record if same else None


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


def _cache(run: Run, device: str) -> Path:
    """The teacher's cache beside `out`, made unless the same one is there; it keeps the layers that are aligned."""
    layers = {layer for _, layer in run.how.alignment.pairs} if "laid" in run.from_teacher else ()
    settings = run.settings.changed({"teacher_cache": {"layers": sorted(layers)}})
    key = sha256_json(
        [
            provenance.fingerprint(source_of(run.teacher), kept=True),
            sha256_file(run.questions),
            provenance.fingerprint((run.coco, run.images), kept=True),
            slice_for("teacher_cache", settings),
        ]
    )
    folder = run.out.parent / f".{run.out.name}.teacher-{key[:12]}"
    if not (folder / "index.json").is_file():
        build_cache(settings, run.teacher, run.coco, run.questions, folder, device)
    return folder


def _answers(
    run: Run, method: str, model: str | Path, made: Path | None, asked: Sequence[Question], device: str
) -> dict[str, list[int]]:
    """size -> [right, questions]."""
    loaded = load_with_method(run.settings, method, model, made, device)
    evaluator = Evaluator(loaded, run.coco, run.settings.evaluation, str(model))
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
