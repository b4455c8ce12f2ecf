"""COCO 2017 by HTTP: annotations first, then only the images that questions name, one by one or as a whole split.

A file appears under its own name only when it is whole and checked. After an interruption, call again to go on. Single
images are checked against the CRC-32 that the split's zip archive records for them: the archive's directory is read
over HTTP, 10 MB instead of 19 GB.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from laid.data.coco import SPLITS, annotation_file, image_problem, load_coco
from laid.data.http import Http, RemoteFile
from laid.errors import LaidError
from laid.io import atomic_path, read_json, safe_join, write_json
from laid.progress import Progress

BASE = "http://images.cocodataset.org"


class Archive(NamedTuple):
    """A zip file below the base address, with its published size in bytes and MD5."""

    path: str
    size: int | None
    md5: str | None


ARCHIVES = {
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"
    ),
    "train2017": Archive("zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    "val2017": Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
}
MEAN_IMAGE = 170_000  # bytes, where no archive directory says it exactly


class CocoDownload:
    """COCO 2017 in the folder `out`, fetched as it is needed.

    base: address that serves zips/, annotations/, train2017/ and val2017/ as images.cocodataset.org does.
    images: "single" fetches images one by one, "zip" whole splits, "auto" the zip when more than half of a split is
    missing. checksums: compare archives with their published size and MD5, and images with the archive's CRC-32;
    off for a mirror that packs its own archives (images are still decoded and measured).
    Every method raises LaidError, one line, and leaves nothing half done under a final name.
    """

    def __init__(
        self,
        out: str | Path,
        base: str = BASE,
        images: str = "auto",
        retries: int = 5,
        timeout: float = 60.0,
        connections: int = 8,
        checksums: bool = True,
        archives: Mapping[str, Archive] | None = None,
        wait: float = 1.0,
    ):
        self.out, self.base = Path(out), base.rstrip("/")
        self.how, self.connections, self.checksums = images, connections, checksums
        self.archives = ARCHIVES if archives is None else archives
        self.http = Http(retries, timeout, wait, connections)
        self.scratch = self.out / ".download"

    def annotations(self) -> None:
        """Make sure that both instance files are there."""
        targets = {
            f"annotations/instances_{split}.json": annotation_file(self.out, split) for split in SPLITS
        }
        with self._alone():
            if not all(target.is_file() for target in targets.values()):
                self._unpack("annotations", targets, unpacked=2.0)

    def all_images(self) -> None:
        """Make sure that every annotated image of both splits is there."""
        self.images(path for split in SPLITS for path in load_coco(self.out, split).images)

    def images(self, paths: Iterable[str]) -> int:
        """Make sure that these images ("val2017/000000000139.jpg") are there; returns how many had to be fetched.

        Raises LaidError for a path that the annotations do not list.
        """
        wanted: dict[str, set[str]] = {split: set() for split in SPLITS}
        for path in paths:
            split = path.split("/")[0]
            if split not in wanted:
                raise LaidError(f"{path}: not an image of COCO 2017 (expected train2017/... or val2017/...)")
            wanted[split].add(path)
        fetched = 0
        with self._alone():
            for split, named in wanted.items():
                if not named:
                    continue
                coco = load_coco(self.out, split)
                unknown = sorted(named - coco.images.keys())
                if unknown:
                    raise LaidError(
                        f"{len(unknown)} images are not in {annotation_file(self.out, split)}, first {unknown[0]}"
                    )
                missing = sorted(path for path in named if not coco.file(path).is_file())
                if not missing:
                    continue
                if self.how == "zip" or (self.how == "auto" and len(missing) > len(coco.images) / 2):
                    self._unpack(split, {path: coco.file(path) for path in coco.images}, unpacked=1.0)
                else:
                    self._one_by_one(split, missing, coco)
                fetched += len(missing)
        return fetched

    # ------------------------------------------------------------------ single images

    def _one_by_one(self, split: str, paths: list[str], coco) -> None:
        known = self._directory(split) if self.checksums else {}
        need = sum(known[path][0] if path in known else MEAN_IMAGE for path in paths)
        self._ask_space(need, f"{len(paths)} images of {split}")
        lock, done = Lock(), 0

        with Progress(len(paths), f"downloading images of {split}", "image") as bar:

            def fetch(path: str) -> None:
                nonlocal done
                entry = coco.images[path]

                def check(file: Path) -> str | None:
                    if path in known and (found := _crc(file)) != known[path][1]:
                        return f"its CRC-32 is {found:08x}, expected {known[path][1]:08x}"
                    problem = image_problem(file, entry)
                    return problem and problem.removeprefix(f"{file}: ").removesuffix(": replace it")

                size = known[path][0] if path in known else None
                self.http.download(f"{self.base}/{path}", coco.file(path), size=size, check=check)
                with lock:
                    done += 1
                    bar.update()

            with ThreadPoolExecutor(self.connections) as pool:
                try:
                    for _ in pool.map(fetch, paths):
                        pass
                except LaidError as error:
                    pool.shutdown(cancel_futures=True)
                    raise LaidError(
                        f"{error} ({done} of {len(paths)} images are there and are kept)"
                    ) from None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _directory(self, split: str) -> dict[str, tuple[int, int]]:
        """path -> (bytes, CRC-32) from the directory of the split's archive, kept for the next call."""
        kept = self.scratch / f"{split}.directory.json"
        if kept.is_file():
            with contextlib.suppress(LaidError, TypeError, ValueError):
                data = read_json(kept)
                if data["base"] == self.base:
                    return {path: (int(size), int(crc)) for path, (size, crc) in data["files"].items()}
        url = f"{self.base}/{self.archives[split].path}"
        try:
            with zipfile.ZipFile(RemoteFile(self.http, url)) as archive:
                files = {e.filename: (e.file_size, e.CRC) for e in archive.infolist() if not e.is_dir()}
        except zipfile.BadZipFile as error:
            raise LaidError(
                f"{url}: not a zip archive ({error}); set data.download.checksums: false to do without"
            ) from None
        except LaidError as error:
            raise LaidError(
                f"{error}; set data.download.checksums: false to do without the archive's checksums"
            ) from None
        write_json(kept, {"base": self.base, "files": files}, indent=None)
        return files

    # ------------------------------------------------------------------ archives

    def _unpack(self, name: str, targets: Mapping[str, Path], unpacked: float) -> None:
        """Fetch an archive and put these members of it at their targets. `unpacked`: bytes unpacked per byte packed."""
        known = self.archives[name]
        size, md5 = (known.size, known.md5) if self.checksums else (None, None)
        url = f"{self.base}/{known.path}"
        packed = self.scratch / Path(known.path).name
        if not packed.is_file():
            total = size if size is not None else self.http.length(url)
            part = packed.with_name(f".{packed.name}.part")
            have = part.stat().st_size if part.is_file() else 0
            if total is not None:
                self._ask_space(int(total * (1 + unpacked)) - have, f"{name} (archive and files)")
            with Progress((total or 0) // 10**6, f"downloading {packed.name}", "MB") as bar:
                self.http.download(url, packed, size=size, md5=md5, progress=_in_megabytes(bar))
        try:
            with zipfile.ZipFile(packed) as archive:
                self._extract(archive, url, targets)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            packed.unlink()
            raise LaidError(
                f"{url}: not a whole zip archive ({error}); deleted, the next call starts over"
            ) from None
        packed.unlink()

    def _extract(self, archive: zipfile.ZipFile, url: str, targets: Mapping[str, Path]) -> None:
        members = {}
        for entry in archive.infolist():
            mode = entry.external_attr >> 16
            plain = not mode or stat.S_ISREG(mode) or stat.S_ISDIR(mode) or not stat.S_IFMT(mode)
            if (
                not plain
                or entry.filename.startswith("/")
                or re.search(r"(^|/)\.\.(/|$)|\\|\0|^[A-Za-z]:", entry.filename)
            ):
                raise LaidError(
                    f"{url}: holds {entry.filename!r}, which would leave the folder: the archive is not used"
                )
            members[entry.filename] = entry
        absent = sorted(targets.keys() - members.keys())
        if absent:
            raise LaidError(f"{url}: lacks {len(absent)} of {len(targets)} files, first {absent[0]}")
        todo = [(members[name], target) for name, target in targets.items()]
        todo = [
            (e, t)
            for e, t in todo
            if not (t.is_file() and t.stat().st_size == e.file_size and _crc(t) == e.CRC)
        ]
        self._ask_space(sum(entry.file_size for entry, _ in todo), f"unpacking {url.rsplit('/', 1)[1]}")
        with Progress(len(todo), f"unpacking {url.rsplit('/', 1)[1]}", "file") as bar:
            for entry, target in todo:
                safe_join(self.out, target.relative_to(self.out).as_posix())
                with atomic_path(target) as beside, archive.open(entry) as source, open(beside, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)  # zipfile compares the CRC-32 at the end
                bar.update()

    # ------------------------------------------------------------------ the folder

    def _ask_space(self, need: int, what: str) -> None:
        free = shutil.disk_usage(self.out).free
        if need > free:
            raise LaidError(
                f"{self.out}: {what} need {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room or use another disk"
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder: two downloads into one folder would write the same parts."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        with open(self.scratch / "lock", "w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LaidError(
                    f"{self.out}: another process is downloading into it: wait for it to end"
                ) from None
            except (ImportError, OSError):
                pass  # no locks here (another system, some network disks): the checks still hold
            yield


def _crc(file: Path) -> int:
    crc = 0
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _in_megabytes(bar: Progress):
    counted = shown = 0

    def gained(count: int) -> None:
        nonlocal counted, shown
        counted += count
        bar.update(counted // 10**6 - shown)
        shown = counted // 10**6

    return gained
