"""Conversations in the forms that the ecosystem writes are one and the same `Chat`; what is wrong is told with its place."""

import base64
import hashlib
import json
import os

import pytest

from laid.data.chat import STORED, Chat, Turn, are_questions, image_file, of_question, read_chats
from laid.data.questions import ordered_images, read_questions
from laid.errors import LaidError

USER, BOT = Turn("user", (None, None, "Which is red?")), Turn("assistant", ("The first.",), learned=True)
SAME = Chat("0", (USER, BOT), ("a.png", "b.png"))
TEXT = {"type": "text", "text": "Which is red?"}
ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, TEXT]}
SAID = {"role": "assistant", "content": "The first."}
BYTES = b"as a PNG would be"


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": [ASKED, SAID], "images": ["a.png", "b.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "file://b.png"}}, TEXT]}, SAID]},
        {"messages": [{"role": "user", "content": "Which is red?"}, SAID], "images": [{"path": "a.png", "bytes": None}, "b.png"]},
        {"messages": [{"role": "user", "content": "<image><image>Which is red?"}, SAID], "images": ["a.png", "b.png"]},
        {"prompt": [ASKED], "completion": [SAID], "images": ["a.png", "b.png"]},
        {"conversations": [{"from": "human", "value": "<image>\n<image>\nWhich is red?"}, {"from": "gpt", "value": "The first."}], "image": ["a.png", "b.png"]},
        {"question": "Which is red?", "answer": "The first.", "images": ["a.png", "b.png"]},
        {"messages": [ASKED, SAID, {"role": "user", "content": "Sure?"}], "images": ["a.png", "b.png"]},
    ],
    ids=["parts", "inline", "unplaced", "tags", "prompt-completion", "llava", "columns", "unanswered"],
)  # fmt: skip
def test_every_form_is_the_same_conversation(entry, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (tmp_path / "a.jsonl").write_text(json.dumps(entry) + "\n\n")
    assert read_chats(tmp_path / "a.json") == read_chats(tmp_path / "a.jsonl") == [SAME]


def test_turns_images_in_later_turns_and_needles(tmp_path):
    turns = ["<image>One?", "Yes.", "And <image> here?", "No, two."]
    said = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
    entry = {
        "id": 7,
        "conversations": [{"from": "system", "value": "Be brief."}, *said],
        "images": ["a", "b"],
        "needles": [1],
    }
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (chat,) = read_chats(tmp_path / "a.json")
    assert (chat.id, chat.images, chat.needles) == ("7", ("a", "b"), (1,))
    assert [turn.content for turn in chat.turns][1::2] == [(None, "One?"), ("And", None, "here?")]
    assert [turn.learned for turn in chat.turns] == [False, False, True, False, True]


def test_tables_and_images_as_bytes(tmp_path, monkeypatch):
    """As `datasets` writes them to Parquet and to disk: a struct of bytes and path; kept once, by content."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"role": "user", "content": [{"type": "image", "text": None}, TEXT]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "The first."}]}
    rows = [{"messages": [asked, said], "images": [{"bytes": BYTES, "path": "x.png"}]}] * 3
    table = pa.Table.from_pylist(rows)
    (tmp_path / "set/data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "set/data/train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "set/data/test-00000-of-00001.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    chats = read_chats(tmp_path / "set")
    assert len(chats) == 3 and chats == read_chats(tmp_path / "a.arrow")
    assert chats[0].images == (STORED + hashlib.sha256(BYTES).hexdigest(),)
    assert image_file("anywhere")(chats[0].images[0]).read_bytes() == BYTES
    url = "data:image/png;base64," + base64.b64encode(BYTES).decode()
    (tmp_path / "url.json").write_text(json.dumps([{"question": "?", "answer": "!", "image": url}]))
    assert read_chats(tmp_path / "url.json")[0].images == chats[0].images
    # What `datasets` keeps of a filter beside its data is no data.
    with pa.ipc.new_stream(tmp_path / "set/data/cache-0a1b.arrow", table.schema) as stream:
        stream.write_table(table)
    assert read_chats(tmp_path / "set") == chats
    os.mkfifo(tmp_path / "pipe.parquet")
    half = (
        pa.array([b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    )  # texts are not looked at as they are written
    pq.write_table(pa.table({"question": half, "answer": half}), tmp_path / "latin.parquet")
    for name, says in (("pipe", "no such file"), ("latin", "cannot be read: .*utf-8")):
        with pytest.raises(LaidError, match=f"{name}.parquet: {says}"):
            read_chats(tmp_path / f"{name}.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(LaidError, match=r"bad.parquet: cannot be read: "):
        read_chats(tmp_path / "bad.parquet")


def test_questions_are_conversations(haystacks):
    file = haystacks / "train.json"
    assert are_questions(file)
    for question, chat in zip(read_questions(file), read_chats(file, 5), strict=True):
        images, needles = ordered_images(question, 5)
        assert chat == of_question(question, 5)
        assert (list(chat.images), list(chat.needles)) == (images, needles)
        assert chat.turns[0].content[:-1] == (None,) * question.size and chat.turns[1].text == question.answer


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("x", "entry 0: expected an object, found str"),
        ({"text": "x"}, "has none of messages, prompt and completion, .* it has text"),
        ({"messages": [ASKED, SAID], "images": ["a.png"]}, "places 2 images and has 1"),
        ({"messages": [ASKED], "images": ["a.png", "b.png"]}, "has no answer"),
        ({"question": "?", "answer": " "}, "has an empty answer"),
        ({"question": "a <|im_end|> b", "answer": "x"}, r"a text holds <\|im_end\|>"),
        ({"question": "?", "answer": "x", "image": "https://a.b/c.png"}, "download it first"),
        ({"question": "?", "answer": "x", "image": "a", "needles": [1]}, r"needles is \[1\], expected places among its 1"),
        ({"messages": [{"role": "tool", "content": "x"}, SAID]}, "turn 0 is of 'tool', expected one of"),
        ({"messages": [{"role": ["user"], "content": "x"}, SAID]}, "turn 0 is of .'user'., expected one of"),
        ({"question": "a\ud800", "answer": "x"}, "a text holds half a character"),
        ({"question": "?", "answer": "x", "id": "a\ud800"}, "id is .*, which is not printable"),
        ({"question": "?", "answer": "x", "pos_image": []}, "is a Visual Haystacks question"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, SAID]}, "of type 'video'"),
        ({"messages": [ASKED, {"role": "assistant", "content": "<image> This."}], "images": ["a", "b", "c"]}, "shows an image in an answer"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_place(entry, said, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    with pytest.raises(LaidError, match=rf"a.jsonl: entry 0: .*{said}|a.jsonl: {said}"):
        read_chats(tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", ["9" * 5000, "[" * 100_000, '{"a": 1', "\xff"])
def test_lines_that_no_reader_takes_are_told(line, tmp_path):
    good = json.dumps({"question": "?", "answer": "x"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n", encoding="latin-1")
    with pytest.raises(LaidError, match=r"a.jsonl: (.*line 2|.*after line \d)") as caught:
        read_chats(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_a_cache_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    entry = {"question": "?", "answer": "x", "image": "data:image/png;base64,aGk="}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    with pytest.raises(
        LaidError, match="/proc/none/laid/images: .* name another cache folder with XDG_CACHE"
    ):
        read_chats(tmp_path / "a.jsonl")


def test_paths_stay_below_their_folder(tmp_path):
    with pytest.raises(LaidError, match="leaves its folder"):
        image_file(tmp_path)("../x.png")
