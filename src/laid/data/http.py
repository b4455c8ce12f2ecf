"""Downloads that end whole or with a clear error: resumed, retried, checked, then renamed into place. Requests to APIs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
import urllib3

from laid import __version__
from laid.errors import LaidError
from laid.io import write_json

CHUNK = 1 << 18
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Transient(Exception):
    """A failure that may pass. `moved` says that bytes arrived before it; `after` what the server asks to wait."""

    def __init__(self, text: str, moved: bool = False, after: float = 0.0):
        super().__init__(text)
        self.moved, self.after = moved, after


class _Unfit(_Transient):
    """The part at hand is no beginning of the file that the server has."""

    def __init__(self) -> None:
        super().__init__("the part at hand does not fit the file any more")


class Refused(LaidError):
    """What a server says of a request that no further try changes. status: by HTTP's numbers."""

    def __init__(self, url: str, status: int, said: str):
        super().__init__(f"{url}: {said}")
        self.status, self.said = status, said


class Http:
    """HTTP with retries, over kept connections. A failure that passes (dropped connection, time-out, 429, 5xx) is
    tried again up to `retries` times in a row without a byte gained, after waits of `wait`, 2 `wait`, 4 `wait` ...
    seconds (at most 60). Threads may share it; `connections` of them without waiting for one another. key: goes with every
    request, and into no message."""

    def __init__(
        self,
        retries: int = 5,
        timeout: float = 60.0,
        wait: float = 1.0,
        connections: int = 1,
        key: str | None = None,
    ):
        self.retries, self.timeout, self.wait, self.key = retries, timeout, wait, key
        self.session = requests.Session()
        if key is not None:
            self.session.auth = self._sign  # a header alone would lose against ~/.netrc
        self.session.headers = {"User-Agent": f"laid/{__version__}", "Accept-Encoding": "identity"}
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=connections))

    def length(self, url: str) -> int | None:
        """Size in bytes that the server states for `url`; None where it does not. Raises LaidError where it is not there."""

        def ask() -> int | None:
            with self._open(url, {"Range": "bytes=0-0"}) as answer:
                return _content_range(answer)[1] if answer.status_code == 206 else _content_length(answer)

        return self._persist(url, ask)

    def read(self, url: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of `url`. Raises LaidError where the server does not serve ranges."""

        def ask() -> bytes:
            with self._open(url, {"Range": f"bytes={start}-{start + length - 1}"}) as answer:
                if answer.status_code != 206:
                    raise LaidError(f"{url}: the server does not serve parts of files")
                if _content_range(answer)[0] != start:
                    raise _Transient("the server sent another part than asked for")
                data = b"".join(_chunks(answer))
                if len(data) < length:
                    raise _Transient(f"the connection closed after {len(data)} of {length} bytes")
                return data[:length]

        return self._persist(url, ask)

    def post(self, url: str, body: Any) -> Any:
        """What a server answers to `body`, both JSON. Raises Refused where no further try would help."""
        data = json.dumps(body).encode()

        def ask() -> Any:
            head = {"Content-Type": "application/json"}
            answer = self._asked("POST", url, data=data, headers=head, allow_redirects=False)
            if answer.status_code != 200:
                said = f"the server answers {answer.status_code} {answer.reason}: {self._words(answer)}"
                if answer.status_code not in TRY_AGAIN:
                    raise Refused(url, answer.status_code, said)
                raise _Transient(said, after=_retry_after(answer))
            try:
                return answer.json()
            except (ValueError, RecursionError):
                raise _Transient(f"the answer is not JSON: {self._words(answer)}") from None

        return self._persist(url, ask)

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _words(self, answer: requests.Response) -> str:
        """What the body of an answer says, in a line; servers differ in where they say it."""
        text = answer.text
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            found = answer.json()
            error = found.get("error") or found
            text = str(
                error if isinstance(error, str) else error.get("message") or error.get("detail") or error
            )
        text = " ".join(text.split())[:300] or "nothing more"
        return text.replace(self.key, "***") if self.key else text

    def download(
        self,
        url: str,
        target: str | Path,
        *,
        size: int | None = None,
        md5: str | None = None,
        check: Callable[[Path], str | None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Put the bytes of `url` at `target`, whole and checked, or raise LaidError.

        Bytes gather in .<name>.part beside the target; an interrupted call, in this process or an earlier one, goes on
        where it stopped (Range with If-Range, so that a file which changed meanwhile starts over). Then: length against
        `size` and the server's own statement, `md5`, and `check(file)`, which returns what is wrong or None. What fails a
        check is deleted; if part of it came from an earlier attempt it is fetched once more from the beginning.
        `progress` is called with bytes gained (negative when a part is thrown away).
        """
        target = Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _Part(url, target, progress or (lambda count: None))
        for last in (False, True):
            part.patched = part.bytes() > 0
            self._persist(url, lambda: self._gather(url, part, size))
            problem = part.problem(size, md5) or (check(part.path) if check else None)
            if problem is None:
                part.finish(target)
                return
            patched = part.patched
            part.discard()
            if last or not patched:
                raise LaidError(f"{url}: {problem}; the partial file was deleted, the next call starts over")

    def _gather(self, url: str, part: _Part, size: int | None) -> None:
        have, known = part.bytes(), size if size is not None else part.total
        if known is not None and have > known:
            part.discard()
            have = 0
        if known is not None and have == known:
            return
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if part.validator:
                headers["If-Range"] = part.validator
        gained = 0
        try:
            answer = self._open(url, headers)
        except _Unfit:
            part.discard()
            raise
        with answer:
            if answer.status_code == 206:
                start, total = _content_range(answer)
                if start != have or (known is not None and total is not None and total != known):
                    part.discard()
                    raise _Unfit
            else:
                total = _content_length(answer)
                if have:
                    part.discard()
                    have = 0
            if size is not None and total is not None and total != size:
                raise LaidError(
                    f"{url}: the server has {total} bytes, expected {size}: is data.download.base right?"
                )
            part.patched = part.patched and have > 0
            part.begin(total, answer.headers)
            try:
                with open(part.path, "ab") as file:
                    for chunk in _chunks(answer):
                        file.write(chunk)
                        gained += len(chunk)
                        part.progress(len(chunk))
                    file.flush()
                    os.fsync(file.fileno())
            except _Transient as error:
                part.patched = True
                raise _Transient(str(error), moved=gained > 0) from None
            except OSError as error:
                raise LaidError(f"{part.path}: cannot be written ({error.strerror})") from None
        if total is not None and have + gained < total:
            part.patched = True
            raise _Transient(
                f"the connection closed after {have + gained} of {total} bytes", moved=gained > 0
            )

    def _open(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        if not url.startswith(("http://", "https://")):
            raise LaidError(f"{url}: not an http:// or https:// address")
        answer = self._asked("GET", url, headers=headers, stream=True)
        if answer.ok:
            return answer
        with answer:
            if answer.status_code == 416 and "Range" in headers:
                raise _Unfit
            said = f"the server answers {answer.status_code} {answer.reason}"
            if answer.status_code not in TRY_AGAIN:
                raise LaidError(f"{url}: {said}")
            raise _Transient(said, after=_retry_after(answer))

    def _asked(self, method: str, url: str, **how: Any) -> requests.Response:
        try:
            return self.session.request(method, url, timeout=self.timeout, **how)
        except ValueError as error:  # no address: however often it is asked, nobody answers
            raise LaidError(f"{url}: cannot be asked: {' '.join(str(error).split())[:200]}") from None
        except requests.RequestException as error:
            raise _Transient(f"no answer ({_reason(error)})") from None

    def _persist(self, url: str, action: Callable[[], Any]) -> Any:
        failures = 0
        while True:
            try:
                return action()
            except _Transient as error:
                trouble = error
            failures = 0 if trouble.moved else failures + 1
            if failures > self.retries:
                raise LaidError(
                    f"{url}: {trouble}; gave up after {failures} attempts in a row, the next call goes on from there"
                ) from None
            time.sleep(min(60.0, max(self.wait * 2 ** max(0, failures - 1), min(trouble.after, 60.0))))


class _Part:
    """The bytes of one unfinished download, and what the server said about the file they belong to."""

    def __init__(self, url: str, target: Path, progress: Callable[[int], None]):
        self.path = target.with_name(f".{target.name}.part")
        self.note = target.with_name(f".{target.name}.part.json")
        self.url, self.progress = url, progress
        self.total: int | None = None
        self.validator = ""
        self.patched = False
        try:
            said = json.loads(self.note.read_text(encoding="utf-8"))
            fits = said["url"] == url
            self.total, self.validator = said["total"], str(said["validator"])
        except (OSError, ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            self.total, self.validator = None, ""
            self.path.unlink(missing_ok=True)  # bytes of unknown origin
        self.progress(self.bytes())

    def bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self, total: int | None, headers: Any) -> None:
        tag = headers.get("ETag") or ""
        self.total = total
        self.validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""
        write_json(self.note, {"url": self.url, "total": total, "validator": self.validator})

    def discard(self) -> None:
        self.progress(-self.bytes())
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.total, self.validator = None, ""

    def problem(self, size: int | None, md5: str | None) -> str | None:
        found = self.bytes()
        if size is not None and found != size:
            return f"came with {found} bytes, expected {size}"
        if md5 is not None:
            with open(self.path, "rb") as file:
                sum_ = hashlib.file_digest(file, "md5").hexdigest()
            if sum_ != md5:
                return f"its MD5 is {sum_}, expected {md5}"
        return None

    def finish(self, target: Path) -> None:
        os.replace(self.path, target)
        self.note.unlink(missing_ok=True)


class RemoteFile(io.RawIOBase):
    """A file on a server as a seekable, read-only file: enough for zipfile to read an archive's directory."""

    def __init__(self, client: Http, url: str):
        size = client.length(url)
        if size is None:
            raise LaidError(f"{url}: the server does not state its size")
        self.client, self.url, self.size, self.at = client, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self.at, self.size)[whence]
        if at < 0:
            raise OSError(f"seek to {at}")
        self.at = at
        return at

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        count = left if count is None or count < 0 else min(count, left)
        data = self.client.read(self.url, self.at, count) if count else b""
        self.at += len(data)
        return data


def _chunks(answer: requests.Response) -> Iterator[bytes]:
    """What comes of the body, as it comes; a short body ends without an error. Raises _Transient where the line breaks."""
    answer.raw.enforce_content_length = False  # else urllib3 keeps back the last bytes before a break
    try:
        while chunk := answer.raw.read1(CHUNK):
            yield chunk
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _Transient(f"the connection broke ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """The innermost cause: requests and urllib3 wrap it several times over."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__


def _content_range(answer: requests.Response) -> tuple[int, int | None]:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    if not found:
        raise _Transient("the server sent a part without saying which")
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _content_length(answer: requests.Response) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _retry_after(answer: requests.Response) -> float:
    with contextlib.suppress(ValueError):
        return float(answer.headers.get("Retry-After", ""))
    return 0.0
