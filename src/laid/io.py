"""Reading and writing files: text and JSON only, written beside and renamed, paths kept inside their root."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from laid.errors import LaidError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # full disk, quota, limit on a file's size


@contextmanager
def atomic_path(target: str | Path, size: int = 0) -> Iterator[Path]:
    """Yield a fresh path beside `target`; on success it becomes `target`, on an error it is removed.

    Serves files and folders alike. A folder that exists is replaced whole, by a folder alone, and where `target` is a link to a folder, that
    folder is. Files can be read by whom the umask says. size: bytes that will be written, where the caller knows. Raises
    LaidError, naming `target`, where there is no room for them.
    """
    target = _behind(Path(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    beside = scratch / target.name
    try:
        if size > shutil.disk_usage(scratch).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield beside
        if not beside.exists():
            raise RuntimeError(f"nothing was written for {target}")
        _as_umask_has_it(beside)
        if target.is_dir() and not target.is_symlink():
            if not beside.is_dir():
                raise LaidError(f"{target}: is a folder, expected a file: name one in it")
            os.rename(target, scratch / "replaced")
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code not in NO_ROOM:
            raise
        written = sum(p.stat().st_size for p in scratch.rglob("*") if p.is_file())
        needed = f"{size:,} bytes are needed" if size else f"more than {written:,} bytes are needed"
        free = f"{shutil.disk_usage(scratch).free:,} are free"
        if code == errno.EFBIG:
            free = "the limit on a file's size (ulimit -f) is below that"
        raise LaidError(
            f"{_meant(target)}: {os.strerror(code)}: {needed}, {free}; nothing half-written is left:"
            " make room or choose another place, and give the same command again"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_room(folder: str | Path, size: int, what: str, instead: str = "choose another folder") -> None:
    """Raise LaidError, before any work, where the disk of `folder` has less room than `what` needs."""
    folder = Path(folder)
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if size > free:
        raise LaidError(f"{folder}: {what} needs {size_text(size)}, {size_text(free)} are free: {instead}")


def size_text(count: float) -> str:
    """1_234_567 -> "1.2 MB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _meant(target: Path) -> Path:
    """Where `target` will be once the folder that is being written around it has its name."""
    return Path(*(part for part in target.parts if not re.fullmatch(r"\..+\.tmp-\w+", part)))


def _behind(target: Path) -> Path:
    """The folder that `target` is a link to; else `target`."""
    return target.resolve() if target.is_symlink() and target.is_dir() else target


def _errno(error: OSError | SafetensorError) -> int | None:
    """What the system said; safetensors has it in words alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def require_place(target: str | Path, *own: str, file: bool = False) -> None:
    """Raise LaidError, before any work, where `target` cannot be written, or is a folder that holds other things.

    own: patterns of the names in a folder that laid writes whole and replaces, first one that every earlier result has;
    without them `target` is a file, or a folder that laid adds files to; file: it is a file. Leaves everything as it is.
    """
    target = Path(target)
    if target.is_symlink() and not target.exists():
        raise LaidError(f"{target}: is a link to {os.readlink(target)}, which is not there")
    place = _behind(target)
    if place.exists() and not (place.is_dir() or stat.S_ISREG(place.stat().st_mode)):
        raise LaidError(
            f"{target}: is neither a file nor a folder (a pipe or a device?): choose another place"
        )
    if file and place.is_dir():
        raise LaidError(f"{target}: is a folder, expected a file: name one in it")
    if own and place.exists():
        if not place.is_dir():
            raise LaidError(f"{target}: is a file, expected a folder: choose another place")
        names = sorted(p.name for p in place.iterdir() if not p.name.startswith("."))
        foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in own)]
        if foreign or (names and not any(fnmatch(name, own[0]) for name in names)):
            raise LaidError(
                f"{target}: exists and is not an earlier result of this verb, which would be replaced (it holds"
                f" {(foreign or names)[0]}): choose another folder for --out"
            )
    above = place if place.is_dir() and not own else place.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise LaidError(f"{target}: {above} is a file, expected a folder: choose another place")
    try:  # what permissions say is not all
        os.rmdir(tempfile.mkdtemp(prefix=".laid-", dir=above))
    except OSError as error:
        raise LaidError(f"{target}: {above} cannot be written to: {error.strerror}") from None
    if own and os.path.ismount(place):
        raise LaidError(f"{target}: is a whole disk, which cannot be replaced: name a folder on it")


def _as_umask_has_it(path: Path) -> None:
    """Let others read what this process's umask lets them: safetensors makes its files for their owner alone."""
    (probe := path.parent / ".mode").touch()
    usual = probe.stat().st_mode & 0o777
    for file in (path, *path.rglob("*")):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode & 0o777 | usual)


@contextmanager
def alone(target: str | Path) -> Iterator[bool]:
    """Hold the right to make `target`; wait, and say so, while another process on this file system holds it.

    Yields whether it waited: `target` may then be there already. What killed processes left half-written is removed.

    A job that a cluster believes dead, or that a killed workflow left behind, may still be writing. The lock is a
    hidden file beside `target`; it is free when its process ends, however it ends.
    """
    target = _behind(Path(target))
    lock, waited = target.parent / f".{target.name}.lock", False
    made = [folder for folder in target.parents if not folder.exists()]
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "a+")  # noqa: SIM115
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                print(
                    f"{target}: another process is making it; waiting for that one to end",
                    file=sys.stderr,
                    flush=True,
                )
            waited = True
            fcntl.lockf(handle, fcntl.LOCK_EX)
        if lock.exists() and os.path.samestat(os.stat(lock), os.fstat(handle.fileno())):
            break
        handle.close()  # whoever held it took the file away
    try:
        for name in (target.name, f"{target.name}.cost.json", f".{target.name}.checkpoint"):
            remove_half_written(target.parent, glob.escape(name))
        yield waited
    finally:
        lock.unlink(missing_ok=True)
        handle.close()
        with suppress(OSError):  # of nothing made, nothing stays
            for folder in made:
                folder.rmdir()


def remove_half_written(folder: Path, names: str = "*") -> None:
    """Remove what killed processes were writing in a folder. names: of what, as a pattern; whoever else may write that keeps away."""
    for left in folder.glob(f".{names}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    data = text.encode()
    with atomic_path(path, len(data)) as beside:
        beside.write_bytes(data)


def dumps(value: Any, indent: int | None = 1) -> str:
    """The JSON text of `value` in the one form laid writes: UTF-8, sorted keys, no NaN."""
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON atomically; the same value always gives the same bytes."""
    write_text(path, dumps(value, indent) + "\n")


def read_text(path: str | Path, what: str = "file") -> str:
    """The UTF-8 text of a file that comes from outside; a byte-order mark is skipped. what: the file, in messages.

    Raises LaidError where there is none, where it is no regular file (a pipe would be waited for), or not UTF-8.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            found = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
            raise LaidError(f"{path}: is a {found}, expected a {what}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise LaidError(f"{path}: no such {what}") from None
    except UnicodeDecodeError as error:
        raise LaidError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise LaidError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise LaidError(f"{path}: {UNPRINTABLE}") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a byte-order mark is skipped. Raises LaidError where it is missing, broken or cut short."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise LaidError(f"{path}: not JSON that laid writes: nested too deep") from None
    except json.JSONDecodeError as error:
        raise LaidError(
            f"{path}: not valid JSON, line {error.lineno} column {error.colno}: {error.msg}"
            " (cut short or edited? make it again)"
        ) from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise LaidError(
            f"{path}: holds a number of more than {sys.get_int_max_str_digits():,} digits"
        ) from None


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises LaidError as `read_json` does, and for anything else in it."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise LaidError(
            f"{path}: expected an object, found {type(found).__name__}: changed by hand? make it again"
        )
    return found


def parsed(value: Any, kind: Any, where: str | Path) -> Any:
    """`value`, read from `where`, if it is of `kind` (a TypedDict, say) all the way down; numbers are not made of text.

    Raises LaidError, one line, for the first place that is not.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        at = ".".join(str(part) for part in problems[0]["loc"])
        what = problems[0]["msg"].removeprefix("Value error, ")
        raise LaidError(f"{where}: {at or 'the file'}: {what}: changed by hand? make it again") from None


@cache
def _adapter(kind: Any) -> Any:
    """pydantic's reader of a kind: making one takes longer than reading a cell with it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's compact, key-sorted JSON."""
    return hashlib.sha256(dumps(value, indent=None).encode()).hexdigest()


def sha256_folder(path: str | Path) -> str:
    """Hex SHA-256 over the names and contents of all files below a folder, in name order."""
    digest = hashlib.sha256()
    root = Path(path)
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


UNPRINTABLE = "holds a character that no name has"
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def unprintable(text: str) -> bool:
    """Whether a text has control characters, line separators or halves of characters: nothing that a name has."""
    return _UNPRINTABLE.search(text) is not None


def half_character(text: str) -> bool:
    """Whether a text holds a surrogate, which no encoding of Unicode writes."""
    return re.search("[\ud800-\udfff]", text) is not None


def path_problem(name: str) -> str | None:
    """Why the path `name` in a data file cannot be one of a file below a folder, or None.

    By its text alone: links below the folder are the user's own, and resolving 118,000 paths on a network disk takes
    minutes.
    """
    parts = name.split("/")
    if ".." in parts or name.startswith("/"):
        return "leaves its folder"
    if "\\" in name:
        return "has backslashes: use /"
    if "" in parts or "." in parts:
        return "names no file"
    if unprintable(name):
        return UNPRINTABLE
    if len(name) > 63 and (len(name) > 4000 or any(len(part.encode()) > 255 for part in parts)):
        return f"is {len(name):,} characters long"
    return None


def safe_join(root: str | Path, name: str) -> Path:
    """`root`/`name`, where `name` comes from a data file. Raises LaidError if it leaves `root` or names no file."""
    if problem := path_problem(name):
        raise LaidError(f"{name!r:.80} {problem}: paths in data files must stay inside their folder {root}")
    return Path(root) / name


def update(path: str | Path, content: str | bytes) -> None:
    """Write a file whole, unless it holds this content already: an unchanged file keeps its time stamp.

    So a verb run by hand after the workflow leaves the workflow with nothing to do.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return
    with atomic_path(path, len(data)) as beside:
        beside.write_bytes(data)
