"""Question files, annotations, images and configurations, broken in every way that comes to mind."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml
from harness import broken_bytes, broken_json, broken_yaml, examples, judge, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from laid.data.chat import read_chats
from laid.data.coco import load_labels
from laid.data.export import lay_out
from laid.data.images import open_image
from laid.data.pope import read_pope
from laid.data.questions import check_haystacks, read_questions, write_questions
from laid.settings import load

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(outside, tmp_path):
    """The small COCO, to be broken, and the configuration that names it."""
    shutil.copytree(outside.coco, tmp_path / "coco")
    config = tmp_path / "fuzz.yaml"
    config.write_text(
        yaml.safe_dump(outside.settings | {"data": {"source": "local", "root": str(tmp_path / "coco")}})
    )
    return tmp_path


def test_questions(outside, tmp_path):
    file, out = tmp_path / "q.json", tmp_path / "coco"
    labels, _ = load_labels(outside.coco)

    def sound(_: str) -> None:
        questions = read_questions(file)
        assert len({q.id for q in questions}) == len(questions)
        assert all(path in labels for q in questions for path in q.needles + q.distractors)
        write_questions(tmp_path / "again.json", questions)
        assert read_questions(tmp_path / "again.json") == questions

    @examples()
    @given(broken_json(outside.questions))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        words = ["data", "--config", outside.config, "--out", out, "--questions", file]
        judge("question files: data", words, [file], sound=sound)

    broken()


def test_questions_that_a_model_is_asked(outside, family, micro_file, tmp_path):
    file, out = tmp_path / "q.json", tmp_path / "made"

    def sound(_: str) -> None:
        assert all(json.loads(cell.read_text())["n"] > 0 for cell in out.glob("[0-9]*.json"))

    @examples(0.2)
    @given(broken_json(outside.questions))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        words = ["evaluate", "--config", micro_file, "--student-name", "small", "--method", "base"]
        words += ["--model", family["small"], "--coco", outside.coco, "--questions", file, "--out", out]
        judge("question files: evaluate", [*words, "--device", "cpu"], [file], out, sound)

    broken()


def test_popes_questions(outside, tmp_path):
    file, out = tmp_path / "coco_pope_random.json", tmp_path / "coco"
    image = next(path for path, held in load_labels(outside.coco)[0].items() if held)
    lines = [
        {"question_id": k, "image": image, "text": f"Is there a {name} in the image?", "label": label}
        for k, (name, label) in enumerate((("star", "yes"), ("ring", "no"), ("post", "no")), 1)
    ]

    @examples()
    @given(broken_json(lines, lines=True))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        words = ["data", "--config", outside.config, "--out", out, "--questions", file]
        judge("POPE files", words, [file], sound=lambda _: read_pope(file, outside.coco))

    broken()


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_conversations(tmp_path, monkeypatch, suffix):
    """Of every form that laid reads; images that come as bytes are kept in the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / f"chats.{suffix}"
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    said = [
        {"id": 1, "image": "a.png", "needles": [0], "conversations": [
            {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A star."}]},
        {"messages": [{"role": "system", "content": "Be brief."}, asked, {"role": "assistant", "content": "That."}]},
        {"prompt": [asked], "completion": [{"role": "assistant", "content": "That."}]},
        {"question": "Which?", "answer": "This.", "images": ["a.png", {"path": "b/c.png"}]},
    ]  # fmt: skip

    def read() -> None:
        for chat in read_chats(file):
            assert chat.turns[-1].learned and chat.turns[-1].text.strip()
            assert sum(part is None for turn in chat.turns for part in turn.content) == chat.size
            json.dumps([turn.text for turn in chat.turns] + list(chat.images), ensure_ascii=False).encode()

    @examples()
    @given(broken_json(said, lines=suffix == "jsonl"))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        refused("conversations", read, [file])

    broken()


def test_exports(outside, tmp_path):
    """Of annotation tools: one file for all images."""
    file, out = tmp_path / "export.json", tmp_path / "made"
    whole = json.loads((outside.coco / "annotations/instances_val2017.json").read_text())

    def read() -> None:
        shutil.rmtree(out, ignore_errors=True)
        lay_out(file, outside.coco / "val2017", out)
        load_labels(out)

    @examples()
    @given(broken_json(whole))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        refused("exports of annotation tools", read, [file, out])

    broken()


@pytest.mark.parametrize("verb", ["haystacks", "data"])
def test_annotations(copy, verb):
    file, out = copy / "coco/annotations/instances_val2017.json", copy / "made"
    whole = json.loads(file.read_text())

    def sound(_: str) -> None:
        labels, _ = load_labels(copy / "coco")
        for made in (out / "test").glob("*.json"):
            assert not check_haystacks(read_questions(made), labels)

    @examples()
    @given(broken_json(whole))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        out.unlink() if out.is_symlink() else None
        words = {
            "haystacks": ["haystacks", "--config", copy / "fuzz.yaml", "--coco", copy / "coco", "--out", out],
            "data": ["data", "--config", copy / "fuzz.yaml", "--out", out],
        }[verb]
        judge(
            f"annotations: {verb}", words, [file, copy / "coco"], out, sound if verb == "haystacks" else None
        )

    broken()


@st.composite
def odd_images(draw) -> bytes:
    """Images of every kind that Pillow writes, whole ones too."""
    mode = draw(st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK", "YCbCr"]))
    kind = draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]))
    size = draw(st.sampled_from([(28, 28), (28, 28), (27, 28), (1, 1), (1, 400), (500, 2), (3000, 40)]))
    image, more = Image.new(mode, size), {}
    if draw(st.booleans()):
        more["exif"] = Image.Exif()
        more["exif"][0x0112] = draw(st.sampled_from([1, 3, 6, 8, 9, 0]))
    file = io.BytesIO()
    try:
        image.save(file, kind, **more)
    except (OSError, ValueError, KeyError):  # no such mode in this format
        return b""
    return file.getvalue()


def test_images(copy):
    link, config = copy / "made", copy / "fuzz.yaml"
    victim = min((copy / "coco/val2017").iterdir())
    jpeg = io.BytesIO()
    Image.effect_noise((28, 28), 90).convert("RGB").save(jpeg, "JPEG")

    def sound(_: str) -> None:
        assert open_image(victim).size == (28, 28)

    @examples()
    @given(st.one_of(broken_bytes(victim.read_bytes()), broken_bytes(jpeg.getvalue()), odd_images()))
    def broken(data: bytes) -> None:
        victim.write_bytes(data)
        judge("images", ["data", "--config", config, "--out", link], [victim], sound=sound)

    broken()


def test_configurations(tmp_path):
    base, file = TOP / "config.yaml", tmp_path / "overlay.yaml"
    whole = yaml.safe_load(base.read_text())
    parts = (
        "scale",
        "results",
        "seeds",
        "data",
        "haystacks",
        "models",
        "training",
        "evaluation",
        "tables",
        "methods",
    )
    document = {key: whole.get(key, {}) for key in parts}

    def finite(value) -> bool:
        if isinstance(value, dict):
            return all(map(finite, value.values()))
        if isinstance(value, list):
            return all(map(finite, value))
        return not isinstance(value, float) or math.isfinite(value)

    def sound(printed: str) -> None:
        assert json.loads(printed) == load([base, file]).model_dump() and finite(json.loads(printed))

    @examples()
    @given(broken_yaml(document))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        judge(
            "configurations",
            ["config", "--json", "--config", base, file],
            [file, "command line"],
            sound=sound,
        )

    broken()


@pytest.mark.parametrize("option", ["--config", "--questions", "--coco", "--out", "data.root"])
def test_odd_paths(outside, tmp_path, option):
    """What a path can be that is no file and no folder: none is waited for, none ends in a traceback."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "file").write_text("{}")
    overlay = tmp_path / "overlay.yaml"
    names = [
        "pipe",
        "loop",
        "nowhere",
        "file/below",
        "x" * 300,
        "x" * 5000,
        "\udcff",
        "a\nb",
        "\u202e",
        "é" * 200,
    ]
    for odd in [*(str(tmp_path / name) for name in names), "/dev/zero", "/dev/null/x"]:
        overlay.write_text(yaml.safe_dump({"data": {"source": "local", "root": odd}}))
        coco = ["--coco", outside.coco]
        words = {
            "--config": ["config", "--config", odd],
            "--questions": [
                "data",
                "--config",
                outside.config,
                "--out",
                tmp_path / "coco",
                "--questions",
                odd,
            ],
            "--coco": ["haystacks", "--config", outside.config, "--coco", odd, "--out", tmp_path / "made"],
            "--out": ["haystacks", "--config", outside.config, *coco, "--out", f"{odd}/q"],
            "data.root": ["data", "--config", outside.config, overlay, "--out", tmp_path / "coco"],
        }[option]
        shown = odd[:40] if odd.isprintable() else tmp_path
        judge(f"paths: {option}", words, [shown, overlay], tmp_path / "made")
