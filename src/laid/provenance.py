"""Where a result came from, and what it cost.

`collect` is deterministic: the same code, configuration, inputs and libraries give the same record, so that it can
stand in a cell that must be byte-identical between builds. `cost` is not, and goes into a file beside it.
"""

from __future__ import annotations

import ast
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from laid import __version__
from laid.errors import LaidError
from laid.io import read_json, safe_join, sha256_file, sha256_json, write_json
from laid.settings import Settings, slice_for

PACKAGE = Path(__file__).resolve().parent
RECORDS = ("laid.json", "run.json", "pretrain.json", "log.jsonl", "cost.json")
LARGE = 256 << 20  # bytes of an input from which on its hashes are kept for other processes
SETTLED = 2 * 10**9  # nanoseconds
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "pillow")


Input = str | Path | tuple[str | Path, Sequence[str]]


def collect(step: str, config: Settings, inputs: Mapping[str, Input], **wildcards: Any) -> dict:
    """The record of one step: code, configuration slice, input hashes, seeds (if a wildcard), libraries.

    `inputs` maps a name to a file, a folder, or (folder, names of files in it); laid.audit.lineage knows by the name where
    to look again. A model given by hub id is passed as a plain string that is no path ("hub:Qwen/...@<revision>")
    and recorded as it is.
    The input named "model", if there is one, stands under "model" as well.
    Wildcards (student, method, seed, size, member) choose the slice and are recorded. Raises LaidError for an input
    that is missing.
    """
    settings = slice_for(step, config, **wildcards)
    data = {name: fingerprint(value, kept=True) for name, value in sorted(inputs.items())}
    return {
        "step": step,
        "wildcards": {key: value for key, value in sorted(wildcards.items())},
        "code": code(),
        "config": sha256_json(settings),
        "settings": settings,
        "data": data,
        "model": data.get("model"),
        "libraries": libraries(),
    }


def fingerprint(value: Input, kept: bool = False) -> str:
    """Hex SHA-256 of a file, of a folder's names and contents, or of the named files; "hub:..." stands for itself.

    kept: of large inputs (checkpoints, a training's photographs), hashes that earlier runs made hold while the files stay as
    they are (`_hashes`).

    A folder's own records (RECORDS) and hidden files are left out: the same weights made by another commit, or with
    another log, are the same model.
    """
    if isinstance(value, str) and value.startswith("hub:"):
        return value
    if isinstance(value, tuple):
        root = Path(value[0])
        return sha256_json(_hashes(root, {name: safe_join(root, name) for name in sorted(value[1])}, kept))
    path = Path(value)
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
        parts = {name: name.split("/") for name in files if name not in RECORDS}
        named = {n: files[n] for n in parts if not any(part.startswith(".") for part in parts[n])}
        return sha256_json(_hashes(path, named, kept))
    if path.is_file():
        return _hashes(path.parent, {path.name: path}, kept)[path.name]
    raise LaidError(f"{path}: no such file or folder, needed as an input")


def changed(folder: str | Path, hashes: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with files in `folder` that are no longer what was written, by name and hex SHA-256; all are read."""
    files = {name: safe_join(folder, name) for name in hashes}
    yield from (f"{file}: no such file" for file in files.values() if not file.is_file())
    found = _hashes(Path(folder), {n: file for n, file in files.items() if file.is_file()}, kept=False)
    yield from (f"{files[n]}: changed since it was written" for n in found if found[n] != hashes[n])


def _hashes(root: Path, files: Mapping[str, Path], kept: bool) -> dict[str, str]:
    """The hash of each named file below `root`; those of LARGE bytes together stay in the user's cache folder.

    Size and time of writing could be those of other bytes put in their place: the time of change of a file's entry
    (st_ctime) is set by the system at every write, and nothing sets it back. A file changed within the last seconds is not
    kept: a clock ticks more coarsely than programs write.
    """
    missing = next((file for file in files.values() if not file.is_file()), None)
    if missing is not None:
        raise LaidError(f"{missing}: no such file, needed as an input")
    stats = {name: file.stat() for name, file in files.items()}
    stamps = {name: _stamp(found) for name, found in stats.items()}

    def read(name: str) -> str:
        return _hash_at(os.path.realpath(files[name]), *stamps[name])

    if not kept or sum(s.st_size for s in stats.values()) < LARGE:
        return {name: read(name) for name in files}
    return _remembered(os.path.realpath(root), stamps, read)


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _remembered(what: str, stamps: Mapping[str, Sequence[int]], read: Callable[[str], str]) -> dict[str, str]:
    """What `read` finds for each name, kept in the user's cache folder under `what` for as long as the name's stamp
    (size, time of writing, time of change, inode) holds."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    store = Path(home, "laid", "hashes", f"{sha256_json(what)[:24]}.json")
    try:
        known = read_json(store)
    except LaidError:
        known = {}
    known = known if isinstance(known, dict) else {}
    whole = {n: entry for n, entry in known.items() if isinstance(entry, list) and entry}
    held = {n: whole[n][-1] for n, stamp in stamps.items() if whole.get(n, [None])[:-1] == stamp}
    settled = time.time_ns() - SETTLED
    found = held | {name: read(name) for name in stamps if name not in held}
    fresh = {n: [*stamps[n], found[n]] for n in stamps if n not in held and stamps[n][2] < settled}
    if fresh:
        with suppress(OSError, LaidError):  # a home that cannot be written, or is full, costs time alone
            write_json(store, known | fresh, indent=None)
    return found


@cache
def _hash_at(path: str, *_stamp: int) -> str:
    """sha256_file, read once per process while the file stays as it is."""
    return sha256_file(path)


@cache
def code() -> dict[str, Any]:
    """Version, git commit (None where it is not known), dirty (tracked files changed), and a hash of the package's syntax trees.

    The hash leaves comments, docstrings and layout out: it changes when the code's meaning may have changed.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    found = {"commit": commit, "dirty": None if changed is None else bool(changed)}
    return {"version": __version__, **(found if commit else _installed()), "source": source_hash(PACKAGE)}


def source_hash(package: Path) -> str:
    """Hex SHA-256 over all modules below `package`, blind to comments, docstrings and layout."""
    files = {file.relative_to(package).as_posix(): file for file in sorted(package.rglob("*.py"))}

    def read(name: str) -> str:
        tree = ast.parse(files[name].read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
                node.body[0].value.value = ""
        return sha256_json(ast.dump(tree))

    # Every job of a workflow asks, and parsing all takes a second; a tree is its Python's.
    what = f"{os.path.realpath(package)}: trees of Python {platform.python_version()}"
    return sha256_json(_remembered(what, {name: _stamp(file.stat()) for name, file in files.items()}, read))


@cache
def libraries() -> dict[str, str | None]:
    """Versions of Python and of the libraries that can change a number."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cost(start: float) -> dict[str, Any]:
    """What a step cost: seconds since `start` (time.perf_counter()), peak memory in bytes, and on which hardware."""
    gpus, gpu_peak = [], None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpu_peak = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "wall_seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "peak_gpu_memory_bytes": gpu_peak,
        "threads": torch.get_num_threads() if torch is not None else None,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": gpus,
        },
    }


def _git(*words: str) -> str | None:
    """Output of a git command in this checkout, None where there is no git or no checkout."""
    top = PACKAGE.parents[1]
    if not (top / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(top), *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed() -> dict[str, Any]:
    """commit and dirty as a wheel holds them (setup.py), or the commit that pip notes where it installs from a git address (PEP 610)."""
    if (PACKAGE / "built_from.json").is_file():
        return read_json(PACKAGE / "built_from.json")
    try:
        noted = metadata.distribution("laid").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        noted = None
    return {"commit": json.loads(noted or "{}").get("vcs_info", {}).get("commit_id"), "dirty": None}


@cache
def cpu_name() -> str:
    """The processor by its maker's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
