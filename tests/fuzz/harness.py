"""Files as nobody meant them, and the check of what a verb makes of one.

A strategy below draws a broken copy of a sound file; `judge` runs a verb on it, in this process. What must come out: exit
status 0 and a sound result, or 2, one line that names the file, and nothing half-written. `make fuzz` draws thousands
(LAID_FUZZ examples a test), the test suite a few, the same ones each time.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from laid.cli import main
from laid.errors import LaidError

SECONDS = 60  # of the processor; the clock on the wall stops what hangs, as reading a FIFO does
COUNTS: Counter[tuple[str, str]] = Counter()  # (kind of file, what came out) -> runs


def examples(share: float = 1.0) -> settings:
    """Hypothesis settings of a test: LAID_FUZZ new examples, or a few that are always the same; `share` of them."""
    asked = int(os.environ.get("LAID_FUZZ") or 0)
    return settings(
        max_examples=max(1, round((asked or 40) * share)),
        derandomize=not asked,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


# ------------------------------------------------------------------ broken copies

# What JSON or YAML can say and nobody expects; RAW stands as it is in the text.
VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", ".", "..", "/",
    "~", "a", "\0", "a\0b", "a\nb", "\ud800", "\u202e", "é", "<|vision_start|>", "<|image_pad|>", "x" * 300, "x" * 5000,
    "../../etc/passwd", "/dev/zero", "train2017/", "nan", "1e-4", "9" * 30, [], {}, [[]], [None], {"": 1}, {"a": {"b": []}},
]  # fmt: skip
RAW_JSON = ["9" * 5000, "-" + "9" * 4000, "[" * 3000 + "]" * 3000, '{"a":' * 60 + "1" + "}" * 60, "1e999"]
RAW_YAML = [
    "2024-01-01", "2024-13-45", "!!binary aGk=", "!!int foo", "!!float foo", "!!timestamp x", "!!set {a}", "!!omap [a: 1]",
    "!!python/name:os.system", "!mine 1", ".nan", "-.inf", "1e-4", "0x1f", "0o17", "1_000", "12:30:45", "9" * 5000, "*none",
    "&a [*a]", "{? [a, b] : 1}", "{1: 2}", "{<<: [1]}", "{<<: {a: 1}}", "{a: 1, a: 2}", "[" * 3000 + "]" * 3000, "{a: " * 60,
    "\t1", "'", "|\n  a", "\x01", "=", "~", "on", "!!null x", "!!bool maybe", "!!str 1", "!!map [1]", "!!seq {a: 1}",
]  # fmt: skip
_MARK = "@raw{}@"


def _places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    if at:
        yield at
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from _places(child, (*at, key))


def _at(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


@st.composite
def _document(draw: Callable, sound: Any, raw: Sequence[str]) -> Any:
    """`sound` with one or two values replaced, taken away, doubled, renamed or exchanged."""
    made = copy.deepcopy(sound)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        kinds: dict[tuple, list[tuple]] = {}  # places of the same kind, so that each kind is met as often
        for place in _places(made):
            kinds.setdefault(tuple("*" if isinstance(key, int) else key for key in place), []).append(place)
        if not kinds:
            break
        place = draw(st.sampled_from(draw(st.sampled_from(sorted(kinds.values(), key=str)))))
        above, last = _at(made, place[:-1]), place[-1]
        value = draw(
            st.sampled_from([*VALUES, *(_MARK.format(k) for k in range(len(raw)))])
            | st.text(max_size=5)
            | st.integers()
            | st.floats()
        )
        what = draw(st.sampled_from(["set", "set", "set", "drop", "double", "rename", "other", "wrap"]))
        if what == "drop":
            del above[last]
        elif what == "double" and isinstance(above, list):
            above.append(copy.deepcopy(above[last]))
        elif what == "rename" and isinstance(above, dict):
            above[value if isinstance(value, str) else "a"] = above.pop(last)
        elif what == "other":
            above[last] = copy.deepcopy(
                _at(made, draw(st.sampled_from(draw(st.sampled_from(sorted(kinds.values(), key=str))))))
            )
        elif what == "wrap":
            above[last] = [above[last]]
        else:
            above[last] = copy.deepcopy(value)
    return made


def broken_bytes(sound: bytes) -> st.SearchStrategy[bytes]:
    """`sound` cut, with bytes changed, put in or taken out, or preceded by a mark of some encoding."""
    at = st.integers(0, max(0, len(sound) - 1))
    part = st.binary(min_size=1, max_size=8) | st.sampled_from(
        [b"\0" * 64, b"\xff", b"\xef\xbb\xbf", b"\r\n"]
    )
    return st.one_of(
        at.map(lambda k: sound[:k]),
        st.tuples(at, st.integers(0, 7)).map(
            lambda p: sound[: p[0]] + bytes([sound[p[0]] ^ 1 << p[1]]) + sound[p[0] + 1 :]
        ),
        st.tuples(at, part).map(lambda p: sound[: p[0]] + p[1] + sound[p[0] :]),
        st.tuples(at, part).map(lambda p: sound[: p[0]] + p[1] + sound[p[0] + len(p[1]) :]),
        st.tuples(at, at).map(lambda p: sound[: min(p)] + sound[max(p) :]),
        st.tuples(at, at).map(lambda p: sound[: max(p)] + sound[min(p) :]),
        st.just(b"\xef\xbb\xbf" + sound),
        st.binary(max_size=64),
    )


def broken_json(sound: Any, lines: bool = False) -> st.SearchStrategy[bytes]:
    """A JSON file of `sound` (lines: of its entries, one a line), its values broken, or its bytes."""

    def text(value: Any) -> bytes:
        split = lines and isinstance(value, list)
        written = "".join(json.dumps(entry) + "\n" for entry in value) if split else json.dumps(value)
        for k, raw in enumerate(RAW_JSON):
            written = written.replace(f'"{_MARK.format(k)}"', raw)
        return written.encode()

    values = _document(sound, RAW_JSON).map(text)
    return st.one_of(values, values, values, broken_bytes(text(sound)))


def broken_yaml(sound: Any) -> st.SearchStrategy[bytes]:
    """A YAML file of `sound`, its values broken, or its bytes."""

    def text(value: Any) -> bytes:
        written = yaml.safe_dump(value, sort_keys=False, allow_unicode=False, width=10**9)
        for k, raw in enumerate(RAW_YAML):
            written = written.replace(f"'{_MARK.format(k)}'", raw)
        return written.encode(errors="surrogatepass")

    values = _document(sound, RAW_YAML).map(text)
    return st.one_of(values, values, values, broken_bytes(text(sound)))


# ------------------------------------------------------------------ what comes out


def judge(
    kind: str,
    words: Sequence[Any],
    names: Sequence[Any],
    made: Path | None = None,
    sound: Callable[[str], None] | None = None,
) -> int:
    """Run `laid` with `words`; fail unless it ends as promised. Returns its exit status.

    kind: of the file, for the table of counts. names: a refusal's line holds one of them. made: where a refusal must leave
    nothing but hidden files. sound(stdout): fails where what was made of an accepted file is not sound.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limited():
        code = main([str(word) for word in words])
    said = err.getvalue()
    assert code in (0, 2), said
    assert "Traceback" not in said + out.getvalue()
    COUNTS[kind, "read" if code == 0 else "refused"] += 1
    if code == 0:
        if sound is not None:
            sound(out.getvalue())
        return code
    line = said.rstrip("\n").rpartition("\n")[2]
    assert line.startswith(f"laid {words[0]}: error: "), said
    assert any(str(name) in line for name in names), line
    assert line.isprintable() and len(line) < 1000, ascii(line[:2000])
    assert said.count(": error: ") == 1 or ": error: " in line.partition(": error: ")[2], said
    if made is not None and made.exists():
        left = [path for path in made.rglob("*") if not path.name.startswith(".")]
        assert not left, left
    return code


def refused(kind: str, read: Callable[[], Any], names: Sequence[Any]) -> bool:
    """Whether `read` refuses, in one line that holds one of `names`; anything else than a refusal is an error."""
    try:
        read()
    except LaidError as error:
        assert any(str(name) in str(error) for name in names) and "\n" not in str(error), error
        COUNTS[kind, "refused"] += 1
        return True
    COUNTS[kind, "read"] += 1
    return False


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("hangs")

    before, started = signal.signal(signal.SIGALRM, late), time.process_time()
    signal.alarm(10 * SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < SECONDS, f"not done after {SECONDS} seconds"
