"""`laid distill`: one student, one teacher, any conversations with images, without the workflow; a model card beside the result."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laid import provenance
from laid.data.chat import STORED, Chat, image_file, read_chats
from laid.data.images import require_images
from laid.errors import LaidError
from laid.evaluation.held_out import HeldOut, Scores
from laid.io import dumps, read_record, safe_join, sha256_json, write_json, write_text
from laid.methods.registry import load_with_method
from laid.model_card import card, per_token
from laid.models.decoder import vision_tower
from laid.models.features import ImageFeatures
from laid.models.loading import empty_model, load_model, parameters, require_weights, resolve, source_of
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
    order = run.settings.evaluation.order_seed
    chats = read_chats(run.questions, order)
    asked = HeldOut.read([held_out], order) if held_out else None
    if asked:
        require_images(run.coco, asked.images, [held_out])
    sizes = {}
    for role, source in (
        ("teacher", teacher),
        ("student", run.student),
    ):  # both, before the teacher's long pass
        model = empty_model(source)
        require_weights(resolve(source))
        Processor.load(source).require_fits(model.config)
        sizes[role] = parameters(model)
    answers: dict[str, Scores] = {}
    if asked:
        answers["teacher"] = scores_of(run, asked, "base", teacher, None, device)
        answers["before"] = scores_of(run, asked, "base", run.student, None, device)
    cache = _cache(run, device) if run.from_teacher else None
    seen = out.parent / f".{out.name}.features"
    cached = replace(run, teacher=None, teacher_cache=cache, features=seen if seen.is_dir() else None)
    # A run without distill.json was killed while its held-out questions were answered.
    trained = None if earlier else made(cached)
    trained = trained or train(cached, start(run.settings.training, device, run.logs))
    if asked:
        # Under the folder's own method: an adapter is merged, a checkpoint is loaded as it is.
        answers["after"] = scores_of(run, asked, run.method, run.student, out, device)
    counts = [chat.size for chat in chats]
    start_from = made_from(run, held_out)
    record = start_from | {
        "name": run.name,
        "overlap": _overlap(chats, asked.chats if asked else []),
        "parameters": sizes,
        "steps": trained["steps"],
        "loss": trained["final"]["loss"],
        "questions": len(chats),
        "sizes": [min(counts), max(counts)],
        "accuracy": {role: _named(found.right) for role, found in answers.items()},
        "hashes": start_from["hashes"] | {"exported": provenance.fingerprint(out / "model")},
    }
    if "best" in trained:
        record["validation"] = {"step": trained["exported"], "every": run.settings.training.validation.every}
    if asked and asked.free:
        record["likelihood"] = {role: _named(found.likely) for role, found in answers.items()}
    sources = {"teacher": str(teacher), "student": str(run.student), "data": Path(run.questions).name}
    adapter = (out / "model/adapter_config.json").is_file()
    write_text(out / "model" / "README.md", card(record, sources, adapter))
    write_json(out / "distill.json", record)
    if cache is not None:
        shutil.rmtree(cache)
    shutil.rmtree(seen, ignore_errors=True)
    return record


def made_from(run: Run, held_out: str | Path | None) -> dict[str, Any]:
    """What a distillation depends on, as it stands in distill.json."""
    return {
        "method": run.method,
        "seed": run.seed,
        "hashes": {
            "data": provenance.fingerprint(Path(run.questions)),
            **({"held_out": provenance.fingerprint(Path(held_out))} if held_out else {}),
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
    record = read_record(run.out / "distill.json")
    hashes = {name: digest for name, digest in (record.get("hashes") or {}).items() if name != "exported"}
    wanted = made_from(run, held_out)
    same = dumps({name: record.get(name) for name in wanted} | {"hashes": hashes}) == dumps(wanted)
    return record if same else None


def _named(by_size: Mapping[int, Any]) -> dict[str, Any]:
    """As JSON names it."""
    return {str(size): value for size, value in by_size.items()}


def image_root(data: str | Path, given: str | Path | None = None) -> Path:
    """The folder that the image paths in `data` start from: `given`, else the first above `data` that holds an image.

    Looked at are the question file's folder and those above it, and `coco` in each of them. Raises LaidError, naming
    the image and where it was looked for.
    """
    firsts = (chat.images[chat.needles[0] if chat.needles else 0] for chat in read_chats(data) if chat.images)
    image = next((image for image in firsts if not image.startswith(STORED)), None)
    if image is None:  # all come with the data
        return Path(given or Path(data).resolve().parent)
    above = Path(data).resolve().parents
    roots = [Path(given)] if given else [root for folder in above for root in (folder, folder / "coco")]
    for root in roots:
        if safe_join(root, image).is_file():
            return root
    if given:
        raise LaidError(
            f"{roots[0] / image}: no such image: --images {given} is not where the paths in {data} start from"
        )
    raise LaidError(
        f"{data}: its first image, {image}, lies neither at {above[0]} nor above: name the folder with --images"
    )


def _cache(run: Run, device: str) -> Path:
    """The teacher's cache beside `out`, made unless the same one is there; it keeps the layers that are aligned."""
    layers = {layer for _, layer in run.how.alignment.pairs} if "laid" in run.from_teacher else ()
    settings = run.settings.changed({"teacher_cache": {"layers": sorted(layers)}})
    key = sha256_json(
        [
            provenance.fingerprint(source_of(run.teacher), kept=True),
            provenance.fingerprint(Path(run.questions)),
            provenance.fingerprint((run.coco, run.images), kept=True),
            slice_for("teacher_cache", settings),
            run.how.temperature,
        ]
    )
    folder = run.out.parent / f".{run.out.name}.teacher-{key[:12]}"
    if not (folder / "index.json").is_file():
        build_cache(
            settings, run.teacher, run.coco, run.questions, folder, device, other=_student(run, device)
        )
    return folder


def _student(run: Run, device: str) -> ImageFeatures | None:
    """The student's vision tower, which sees the images that the teacher's pass opens; what it makes of them is kept for the
    training, beside `out`. None where the tower is trained."""
    settings = run.settings
    if settings.training.train_vision:
        return None
    # The language model, many times as large, stays where it is.
    model = load_model(run.student, getattr(torch, settings.training.dtype), settings.evaluation.attention)
    vision_tower(model).to(device)
    folder = run.out.parent / f".{run.out.name}.features"
    return ImageFeatures(
        model, Processor.load(run.student), image_file(run.coco), limit_bytes=0, store=folder
    )


def scores_of(
    run: Run, asked: HeldOut, method: str, model: str | Path, made: Path | None, device: str
) -> Scores:
    """What a model under a method scores on held-out conversations. made: the run folder of a trained method."""
    loaded = load_with_method(run.settings, method, model, made, device)
    return asked.asker(loaded, run.coco, run.settings.evaluation, str(model))()


def known_needles(run: Run) -> Run:
    """The run; without dilution, and that said, where no conversation tells which of its images the answer rests on."""
    if not run.how.dilution.reach:
        return run
    chats = read_chats(run.questions)
    known = sum(chat.needles is not None for chat in chats)
    if known == len(chats):
        return run
    print(
        f"{run.method}: dilution needs to know which images an answer rests on, and {len(chats) - known} of {len(chats)}"
        f' conversations do not say ({run.questions}: "needles": [0]): those are not diluted',
        flush=True,
    )
    if known:
        return run
    return replace(run, settings=run.settings.changed({"methods": {run.method: {"dilution": {"reach": 0}}}}))


def _overlap(chats: Sequence[Chat], asked: Sequence[Chat]) -> int:
    """How many images of the held-out conversations stand in the training data too."""
    seen = {path for chat in chats for path in chat.images}
    return len({path for chat in asked for path in chat.images} & seen)


def summary(record: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    done = f"{record['name']} {record['method']}: {record['steps']} steps, loss {record['loss']:.4f}"
    if not record["accuracy"]:
        return done
    totals = {}
    for key in ("before", "after"):
        right, n = (sum(v) for v in zip(*record["accuracy"][key].values(), strict=True))
        totals[key] = 100 * right / n
    line = f"{done}; held-out accuracy {totals['before']:.1f} % before, {totals['after']:.1f} % after"
    if "likelihood" not in record:
        return line
    before, after = (per_token(record["likelihood"][key]) for key in ("before", "after"))
    return f"{line}; log-likelihood of the given answers {before:.3f} and {after:.3f} a token"
