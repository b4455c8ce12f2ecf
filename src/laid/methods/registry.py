"""All methods through one interface: which are trained, and how a student under a method is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from laid.errors import LaidError
from laid.io import read_json
from laid.methods.self_extend import apply_self_extend
from laid.methods.yarn import apply_yarn
from laid.models import parallel
from laid.models.loading import load_model, require_floats, resolve, source_errors
from laid.models.processing import Processor
from laid.settings import SelfExtend, Settings, TrainedMethod, Yarn


@dataclass
class Loaded:
    """A model ready to answer, with what prepares its inputs."""

    model: torch.nn.Module
    processor: Processor


def load_with_method(
    settings: Settings, method: str, model: str | Path, run: str | Path | None, device: str = "cpu"
) -> Loaded:
    """The student in `model` (hub id or folder) under `method`.

    run: the folder of a trained method's run; its model/ is a plain checkpoint or a PEFT adapter, which is
    merged. Raises LaidError for an unknown method, or a trained method without a run.
    """
    require_method(settings, method, run)
    how, evaluation = settings.methods[method], settings.evaluation
    dtype = getattr(torch, evaluation.dtype)
    processor = Processor.load(model)
    if run is None:
        student = load_model(model, dtype, evaluation.attention, device)
    else:
        student = load_run(Path(run) / "model", model, dtype, evaluation.attention, device)
    if isinstance(how, Yarn):
        trained = how.original_positions or student.config.text_config.max_position_embeddings
        apply_yarn(student, how.factor, trained, how.axes)
    elif isinstance(how, SelfExtend):
        apply_self_extend(student, how.group, how.window, how.axes)
    return Loaded(student, processor)


def require_method(settings: Settings, method: str, run: str | Path | None) -> None:
    """Raise LaidError, before anything is loaded, for an unknown method, and a trained one without a run, or another with one."""
    if method not in settings.methods:
        raise LaidError(f"no method {method!r}; methods: {', '.join(settings.methods)}")
    if isinstance(settings.methods[method], TrainedMethod) == (run is None):
        need = "takes no --runs" if run else "is trained: give its run folders with --runs"
        raise LaidError(f"method {method} {need}")
    if run is not None and not (Path(run) / "model").is_dir():
        raise LaidError(
            f"{Path(run) / 'model'}: no such folder: this run did not finish; make it again with `laid train`"
        )


def load_run(
    folder: Path, base: str | Path, dtype: torch.dtype, attention: str, device: str
) -> torch.nn.Module:
    """A run's model: its own checkpoint, or its adapter merged into `base`."""
    if not (folder / "adapter_config.json").is_file():
        return load_model(folder, dtype, attention, device)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # peft would read a pickled one instead
        raise LaidError(
            f"{folder}: no adapter_model.safetensors beside adapter_config.json; make the run again"
        )
    if parallel.world() > 1:
        raise LaidError(
            f"{folder}: an adapter cannot be merged into a model that several processes share: merge it first"
            " (peft: merge_and_unload, then save_pretrained), or use one GPU that is large enough"
        )
    from peft import PeftModel, get_peft_model_state_dict

    said = read_json(folder / "adapter_config.json")
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        raise LaidError(f"{folder / 'adapter_config.json'}: not a LoRA adapter's; make the run again")
    student = load_model(resolve(base), dtype, attention, device)
    with source_errors(str(folder)):
        with safe_open(weights, "pt") as file:
            require_floats(weights, file)
            found = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        adapted = PeftModel.from_pretrained(student, str(folder))
        wanted = {
            name: tuple(w.shape)
            for name, w in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
        }
        for what, names in (("lacks", wanted.keys() - found), ("has unknown", found.keys() - wanted)):
            if names:  # peft would train on, or leave out, without a word
                raise LaidError(
                    f"{weights}: {what} {len(names)} of the tensors that adapter_config.json describes, first {min(names)}:"
                    " make the run again"
                )
        return adapted.merge_and_unload().eval()
