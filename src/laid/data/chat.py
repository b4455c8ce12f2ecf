"""Conversations about images, as the ecosystem writes them, and Visual Haystacks questions as one case of them.

One reader, `read_chats`, for a JSON list, JSON Lines, Parquet, or a folder of Parquet or Arrow files (a Hugging Face dataset). An
entry is one of

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...], "images": [...]}
    {"prompt": [...], "completion": [...], "images": [...]}                            messages too; TRL's second form
    {"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image": "a.jpg"}        LLaVA, ShareGPT
    {"question": "...", "answer": "...", "image": ...}                                 columns of question answering
    a Visual Haystacks question (laid.data.questions)

An image is a path below the folder of images, a `data:` URL, or {"bytes", "path"}, what `datasets` writes into Parquet; in a message
it may stand in its part ({"type": "image", "image": ...}). Images that no part and no `<image>` places come before the first user's
text, as TRL has it. Images that come as bytes are kept once in a cache folder, by their hash.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laid.data.questions import OFFICIAL_PROMPT, Question, ordered_images, read_questions
from laid.errors import LaidError
from laid.io import atomic_path, half_character, read_json, safe_join

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
STORED = "sha256:"  # an image that came as bytes: this and the hash


@dataclass(frozen=True)
class Turn:
    """What one side says. content: texts, and None where the next image stands. learned: an answer that is learned."""

    role: str
    content: tuple[str | None, ...]
    learned: bool = False

    @property
    def text(self) -> str:
        """The turn's texts, one after the other."""
        return "".join(part for part in self.content if part is not None)


@dataclass(frozen=True)
class Chat:
    """A conversation; its last turn is an answer.

    images: paths, or STORED and a hash, in the order shown. needles: places among them of those that the answer rests on; None
    where the data does not say.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    needles: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.images)


def read_chats(path: str | Path, order_seed: int = 0) -> list[Chat]:
    """The conversations of a file or a folder. order_seed: of the images of Visual Haystacks questions, which have no order.

    Raises LaidError with the file and the entry's number for what is none of the forms above, an image that is not there as it is
    placed, a text that holds a special token, a conversation without an answer, and no entries at all.
    """
    path = Path(path)
    if are_questions(path):
        return [of_question(question, order_seed) for question in read_questions(path)]
    chats = []
    for at, entry in enumerate(_entries(path)):
        try:
            chats.append(_parse(entry, at))
        except _Wrong as problem:
            raise LaidError(f"{path}: entry {at}: {problem}") from None
    if not chats:
        raise LaidError(f"{path}: holds no conversations")
    return chats


def waiting(messages: Sequence[Any]) -> Chat:
    """Messages as an API takes them, as a conversation whose last answer is to come: one letter stands for it. Raises LaidError."""
    try:
        return _parse({"messages": [*messages, {"role": "assistant", "content": "-"}]}, 0)
    except _Wrong as problem:
        raise LaidError(f"messages: {problem}") from None


def are_questions(path: str | Path) -> bool:
    """Whether a file holds Visual Haystacks questions (or nothing that can be told from them)."""
    path = Path(path)
    if path.is_dir() or path.suffix in (".parquet", ".arrow", ".jsonl", ".ndjson"):
        return False
    data = read_json(path)
    return not isinstance(data, list) or not data or (isinstance(data[0], dict) and "pos_image" in data[0])


def of_question(question: Question, order_seed: int) -> Chat:
    """A Visual Haystacks question as a conversation: its images in the order shown, the official prompt, one word."""
    images, needles = ordered_images(question, order_seed)
    asked = Turn("user", (*[None] * question.size, OFFICIAL_PROMPT + question.text))
    answer = Turn("assistant", (question.answer,), learned=True)
    return Chat(question.id, (asked, answer), tuple(images), tuple(needles))


def image_file(root: str | Path) -> Callable[[str], Path]:
    """Image of a conversation -> file on disk; paths start at `root` and stay below it."""

    def file(image: str) -> Path:
        if image.startswith(STORED):
            return store_folder() / image.removeprefix(STORED)
        return safe_join(root, image)

    return functools.cache(file)


def named_images(chats: Sequence[Chat]) -> list[str]:
    """The images that conversations name by their path, sorted."""
    return sorted({image for chat in chats for image in chat.images if not image.startswith(STORED)})


def store_folder() -> Path:
    """Where images that come as bytes are kept: <cache>/laid/images, the cache by XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laid/images"


# ------------------------------------------------------------------ entries of any file


def _entries(path: Path) -> Iterator[Any]:
    if path.is_dir():
        yield from _rows(path, _tables(path))
    elif path.suffix in (".parquet", ".arrow"):
        yield from _rows(path, [path])
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _lines(path)
    else:
        yield from read_json(path)


def _lines(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise LaidError(f"{path}: no such file")
    with path.open(encoding="utf-8-sig", errors="strict") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield json.loads(line)
        except UnicodeDecodeError as error:
            raise LaidError(f"{path}: not UTF-8 text (after line {number}: {error.reason})") from None
        except json.JSONDecodeError as error:
            raise LaidError(
                f"{path}: not valid JSON, line {number} column {error.colno}: {error.msg}"
            ) from None
        except (ValueError, RecursionError):
            raise LaidError(
                f"{path}: line {number}: a number or a nesting beyond what JSON is used for"
            ) from None


def _tables(folder: Path) -> list[Path]:
    """The Parquet or Arrow files of a dataset's folder; of several splits, those of train."""
    found = [*folder.rglob("[!.]*.parquet"), *folder.rglob("[!.]*.arrow")]
    # What `datasets` keeps of a map or a filter lies beside the data that it was made from.
    files = sorted(file for file in found if not file.name.startswith("cache-"))
    if not files:
        raise LaidError(f"{folder}: a folder without Parquet or Arrow files: name a file of conversations")
    train = [file for file in files if "train" in file.relative_to(folder).as_posix()]
    return train or files


def _rows(path: Path, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise LaidError(
            f"{path}: reading Parquet needs pyarrow (pip install pyarrow), or use JSON Lines"
        ) from None
    for file in files:
        if not file.is_file():  # a pipe would be waited for
            raise LaidError(f"{file}: no such file")
        try:
            if file.suffix == ".arrow":
                batches: Any = pa.ipc.open_stream(file)
            else:
                batches = pq.ParquetFile(file).iter_batches(batch_size=64)
            for batch in batches:
                yield from batch.to_pylist()
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            OverflowError,
        ) as error:  # text that is no UTF-8, dates
            raise LaidError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None


# ------------------------------------------------------------------ one entry


class _Wrong(Exception):
    """What is wrong with one entry; the reader adds file and number."""


def _parse(entry: Any, at: int) -> Chat:
    if not isinstance(entry, dict):
        raise _Wrong(f"expected an object, found {type(entry).__name__}")
    if "pos_image" in entry:
        raise _Wrong("is a Visual Haystacks question: those stand in a list of their own, in a .json file")
    listed = [_image(value) for value in _listed(entry)]
    turns = _turns(entry)
    inline: list[str] = []
    read = [_content(value, inline) for _, value, _ in turns]
    placed = sum(part is None for content in read for part in content)
    if inline and (listed or len(inline) < placed):
        raise _Wrong(
            "images stand both in the messages and beside them, or are missing in some: give them in one place"
        )
    images = inline or listed
    if not placed and images:
        first = next((k for k, (role, _, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise _Wrong("has images and no user who shows them")
        read[first] = (*[None] * len(images), *read[first])
    elif placed != len(images):
        raise _Wrong(f"places {placed} images and has {len(images)}")
    made = [Turn(role, content, learned) for (role, _, learned), content in zip(turns, read, strict=True)]
    while made and not made[-1].learned:
        made.pop()  # what nobody answers
    if not made:
        raise _Wrong("has no answer (a turn of the assistant) to learn")
    if any(not turn.text.strip() for turn in made if turn.learned):
        raise _Wrong("has an empty answer")
    if any(None in turn.content for turn in made if turn.learned):
        raise _Wrong("shows an image in an answer: answers are text")
    shown = sum(part is None for turn in made for part in turn.content)
    name = entry.get("id")
    if isinstance(name, str) and not name.isprintable():
        raise _Wrong(f"id is {name!r:.40}, which is not printable")
    return Chat(
        str(at) if name is None else str(name), tuple(made), tuple(images[:shown]), _needles(entry, shown)
    )


def _listed(entry: Mapping[str, Any]) -> list[Any]:
    found = next((entry[key] for key in ("images", "image") if entry.get(key) is not None), None)
    if found is None:
        return []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _turns(entry: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """(role, content, whether it is learned) of each turn."""
    if isinstance(entry.get("prompt"), list) and isinstance(entry.get("completion"), list):
        parts = [(turn, False) for turn in entry["prompt"]] + [(turn, True) for turn in entry["completion"]]
    elif entry.get("question") is not None and entry.get("answer") is not None:
        return [("user", entry["question"], False), ("assistant", entry["answer"], True)]
    else:
        said = next((entry[key] for key in ("messages", "conversations") if entry.get(key) is not None), None)
        if not isinstance(said, list):
            raise _Wrong(
                f"has none of messages, prompt and completion, conversations, question and answer as lists or texts;"
                f" it has {', '.join(map(str, sorted(entry)))[:120] or 'nothing'}"
            )
        parts = [(turn, True) for turn in said]
    found = []
    for number, (turn, learned) in enumerate(parts):
        if not isinstance(turn, dict):
            raise _Wrong(f"turn {number} is {type(turn).__name__}, expected an object")
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise _Wrong(f"turn {number} is of {role!r:.40}, expected one of {', '.join(ROLES)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        found.append((ROLES[role], content, learned and ROLES[role] == "assistant"))
    return found


def _content(value: Any, inline: list[str]) -> tuple[str | None, ...]:
    """A turn's content as `Turn` has it; images that stand in it are added to `inline`."""
    if isinstance(value, str):
        return _tagged(value)
    if not isinstance(value, list):
        raise _Wrong(f"a turn's content is {type(value).__name__}, expected text or a list of parts")
    found: list[str | None] = []
    for part in value:
        if not isinstance(part, dict):
            raise _Wrong(f"a part of a message is {type(part).__name__}, expected an object")
        kind = part.get("type") or ("text" if part.get("text") is not None else "image")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise _Wrong("a part of a message is of type text and has none")
            found.append(_plain(part["text"]))
        elif kind in ("image", "image_url"):
            given = next(
                (part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None),
                None,
            )
            if isinstance(given, dict) and given.get("url") is not None:
                given = given["url"]
            if given is not None:
                inline.append(_image(given))
            found.append(None)
        else:
            raise _Wrong(f"a part of a message is of type {kind!r}: text and images are what laid reads")
    return tuple(found)


def _tagged(text: str) -> tuple[str | None, ...]:
    """Text with `<image>` where images stand; blanks around the tag belong to it."""
    pieces = text.split("<image>")
    if len(pieces) == 1:
        return (_plain(text),)
    found: list[str | None] = []
    for number, piece in enumerate(pieces):
        found += [None] if number else []
        found += [_plain(piece.strip())] if piece.strip() else []
    return tuple(found)


def _plain(text: str) -> str:
    special = re.search(r"<\|\w+\|>|<video>|<audio>", text)
    if special:
        raise _Wrong(f"a text holds {special[0]}, which a model would not read as text: take it out")
    if half_character(text):
        raise _Wrong("a text holds half a character (a surrogate): take it out")
    return text


def _image(value: Any) -> str:
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return _stored(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return _stored(value)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _Wrong(f"an image is {str(value)[:40]!r}, expected a path, a data: URL or bytes")
    if value.startswith("data:"):
        head, _, body = value.partition(",")
        try:
            return _stored(base64.b64decode(body, validate=True))
        except (binascii.Error, ValueError):
            raise _Wrong(f"an image is a URL {head[:40]} that is not base64") from None
    if re.match(r"https?://", value):
        raise _Wrong(
            f"an image is {value[:80]}: download it first, laid opens no address that a data file names"
        )
    return value.removeprefix("file://")


def _stored(content: bytes) -> str:
    name = hashlib.sha256(content).hexdigest()
    file = store_folder() / name
    try:
        if not file.is_file():
            with atomic_path(file) as beside:
                beside.write_bytes(content)
    except OSError as error:
        raise LaidError(
            f"{file.parent}: keeps the images that come as bytes, and cannot be written to: {error.strerror}:"
            " name another cache folder with XDG_CACHE_HOME"
        ) from None
    return STORED + name


def _needles(entry: Mapping[str, Any], images: int) -> tuple[int, ...] | None:
    found = entry.get("needles")
    if found is None:
        return None
    if not isinstance(found, list) or not found or not all(type(k) is int and 0 <= k < images for k in found):
        raise _Wrong(f"needles is {str(found)[:40]}, expected places among its {images} images, from 0")
    return tuple(sorted(set(found)))


def answered(chat: Chat) -> list[Chat]:
    """The conversation up to each of its answers: what an evaluation asks, one by one."""
    found = []
    for k, turn in enumerate(chat.turns):
        if turn.learned:
            shown = sum(part is None for part in itertools.chain(*(t.content for t in chat.turns[:k])))
            found.append(Chat(chat.id, chat.turns[: k + 1], chat.images[:shown]))
    return found
