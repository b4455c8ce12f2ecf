"""A student that `laid distill` made, on the Hugging Face hub: which files go there, under which names, with which card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import TypedDict

from laid import provenance
from laid.errors import LaidError
from laid.io import parsed, read_record, read_text, write_text
from laid.methods.registry import load_run
from laid.model_card import for_hub
from laid.models.loading import source_of
from laid.models.processing import Processor

RECORDS = ("distill.json", "run.json", "learned.json", "log.jsonl")  # below laid/ of the repository
KINDS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md")  # of a model's files; none is a pickle


class _Hashes(TypedDict):
    student: str
    exported: str


class _Training(TypedDict):
    dtype: Literal["float32", "bfloat16"]


class _Settings(TypedDict):
    training: _Training


class _Record(TypedDict):
    """What is used here of distill.json."""

    name: str
    hashes: _Hashes
    settings: _Settings


def files_of(folder: Path, repo: str, beside: Path, base: str | None = None) -> dict[str, Path]:
    """Name in the repository -> file here, of the result folder of `laid distill`.

    repo: owner/name, for the card. base: the checkpoint that an adapter is merged into. beside: an empty folder for what is made
    for the hub: the card, a merged checkpoint. Raises LaidError for another folder, weights that are not those of its record, a base
    that the adapter was not trained on, and a pickle.
    """
    record, model = _record(folder), folder / "model"
    card = read_text(model / "README.md")
    adapter = (model / "adapter_config.json").is_file()
    if base is not None:
        if not adapter:
            raise LaidError(f"{model}: no adapter, but a whole checkpoint: leave --merge out")
        if provenance.fingerprint(source_of(base), kept=True) != record["hashes"]["student"]:
            raise LaidError(
                f"--merge {base}: not the student that {folder} was trained from ({record['name']})"
            )
        dtype = getattr(torch, record["settings"]["training"]["dtype"])
        load_run(model, base, dtype, "sdpa", "cpu").save_pretrained(str(beside / "model"))
        Processor.load(base).save(beside / "model")
        card = card.replace(record["hashes"]["exported"], provenance.fingerprint(beside / "model"))
        model, adapter = beside / "model", False
    write_text(beside / "README.md", for_hub(card, repo, adapter))
    found = {path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()}
    strange = next((name for name in found if Path(name).suffix not in KINDS), None)
    if strange is not None:
        raise LaidError(f"{found[strange]}: not a file of a checkpoint ({', '.join(KINDS)}): take it out")
    records = {f"laid/{name}": folder / name for name in RECORDS if (folder / name).is_file()}
    return {**found, "README.md": beside / "README.md", **records}


def _record(folder: Path) -> Mapping[str, Any]:
    """distill.json of a finished distillation, whose weights are still those it names."""
    if not (folder / "distill.json").is_file() or not (folder / "model/README.md").is_file():
        raise LaidError(
            f"{folder}: not a result of `laid distill`: give the folder with distill.json and model/README.md"
        )
    file, model = folder / "distill.json", folder / "model"
    record = read_record(file)
    parsed(record, _Record, file)
    names = [p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()]
    names = [name for name in names if name != "README.md"]  # written after the hash
    if provenance.fingerprint((model, names)) != record["hashes"]["exported"]:
        raise LaidError(
            f"{model}: changed since {folder / 'distill.json'} was written: its card is not of these weights"
        )
    return record


def send(files: Mapping[str, Path], repo: str) -> str:
    """Commit files to a repository, a private one where there is none yet; returns the address.

    The token is that of HF_TOKEN or of `hf auth login`. Raises LaidError without one, and for whatever the hub says.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise LaidError("no token for the hub: set HF_TOKEN, or log in once with `hf auth login`")
    api = HfApi()
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message="laid push")
    except Exception as error:  # of the network, of the hub, of the token
        raise LaidError(f"{repo}: not sent: {' '.join(str(error).split())[:300]}") from error
    return str(done.repo_url)
