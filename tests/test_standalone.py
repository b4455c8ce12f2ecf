"""`laid distill` on a tiny family: a loadable student, a card that says what it is, and mistakes told in one line."""

import re
import shutil
from contextlib import contextmanager

import pytest
import torch

from laid import standalone
from laid.cli import main
from laid.data.chat import read_chats
from laid.data.questions import haystack_file, read_questions, write_questions
from laid.errors import LaidError
from laid.io import read_json, sha256_file
from laid.models.loading import load_model


@pytest.fixture(scope="module")
def words(family, haystacks, coco_root, micro_file):
    return [
        "distill", "--config", str(micro_file), "--teacher", str(family["teacher"]), "--student", str(family["small"]),
        "--data", str(haystacks / "train.json"), "--coco", str(coco_root), "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(words, haystacks, opened, tmp_path_factory):
    """(folder, record) of one run with LAid and held-out questions."""
    out = tmp_path_factory.mktemp("distilled") / "mine"
    held_out = haystack_file(haystacks / "test", 5)
    opened.clear()
    assert main([*words, "--out", str(out), "--eval", str(held_out)]) == 0
    # Teacher and student are of one processor: what both learn from is opened once.
    learned = {file: times for file, times in opened.items() if file.parent.name == "train2017"}
    assert len(learned) > 24 and set(learned.values()) == {1}
    return out, read_json(out / "distill.json")


def test_the_student_is_exported_and_learned_something(done, family):
    out, record = done
    before, after = load_model(family["small"]), load_model(out / "model")
    assert before.config.text_config.hidden_size == after.config.text_config.hidden_size
    assert [p.shape for p in before.parameters()] == [p.shape for p in after.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters())]
    assert any(moved)
    assert (out / "log.jsonl").is_file() and record["steps"] == 2 * 24 // 8
    assert not list(out.parent.glob(".mine.*"))  # neither the teacher's cache nor a checkpoint stays behind


def test_the_card_says_what_it_is_and_no_path(done, haystacks, family):
    out, record = done
    card = (out / "model/README.md").read_text()
    assert sha256_file(haystacks / "train.json") in card and record["hashes"]["student"] in card
    assert "24 questions, 2 to 4 images" in card and '"lambda_laid": 0.3' in card and "## Licence" in card
    assert str(out.parent) not in card and str(family["small"].parent) not in card
    right, n = record["accuracy"]["before"]["5"]
    assert n == 10 and re.search(rf"\| 5 \| 10 \| {100 * right / n:.1f} \[", card)
    assert record["overlap"] == 0 and "also occur" not in card


def test_without_held_out_questions_nothing_is_claimed(words, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path / "sft"), "--method", "sft"]) == 0
    card = (tmp_path / "sft/model/README.md").read_text()
    assert "Not measured" in card and "PeftModel" in card  # SFT is an adapter
    assert "sft: 6 steps" in capsys.readouterr().out


def test_held_out_images_seen_in_training_are_told(haystacks):
    chats = read_chats(haystacks / "train.json")
    assert standalone._overlap(chats, chats[:1]) == chats[0].size


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "yarn"], "'yarn' is not a trained method; trained methods: sft"),
        (["--method", "nonsense"], "is not a trained method"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 on"),
        (["--coco", "."], "no such image: --images . is not where the paths in"),
    ],
)
def test_mistakes_are_told_in_one_line(words, tmp_path, capsys, more, said):
    assert code_of([*words, "--out", str(tmp_path / "x"), *more]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error.splitlines()[-1] and not (tmp_path / "x").exists()


def code_of(words):
    """The exit status, whether the verb or the parser of flags sets it."""
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def test_images_are_found_from_the_question_file_up(haystacks, coco_root, tmp_path):
    home = tmp_path / "a/b"
    home.mkdir(parents=True)
    shutil.copy(haystacks / "train.json", home)
    data = home / "train.json"
    assert standalone.image_root(data, coco_root) == coco_root
    with pytest.raises(LaidError, match="lies neither at .*/a/b nor above: name the folder with --images"):
        standalone.image_root(data)
    (tmp_path / "coco").symlink_to(coco_root)
    assert standalone.image_root(data) == tmp_path / "coco"
    image = read_questions(data)[0].needles[0]
    (home / image).parent.mkdir()
    shutil.copy(coco_root / image, home / image)
    assert standalone.image_root(data) == home  # the nearest counts


def test_teacher_student_and_data_are_all_it_needs(
    words, family, haystacks, coco_root, tmp_path, monkeypatch, capsys
):
    """As the help has it: the images are looked for, and the result lies here, under the student's and method's name."""
    shutil.copy(haystacks / "train.json", tmp_path)
    (tmp_path / "coco").symlink_to(coco_root)
    monkeypatch.chdir(tmp_path)
    given = words[: words.index("--data")] + ["--data", "train.json", "--device", "cpu", "--method", "sft"]
    assert main(given) == 0
    assert (tmp_path / "small-sft/model/README.md").is_file()
    assert "small-sft/model: the student" in capsys.readouterr().out
    # As if killed while held-out questions were answered: what was trained is not trained again.
    (tmp_path / "small-sft/distill.json").unlink()
    before = (tmp_path / "small-sft/run.json").stat().st_mtime_ns
    assert main(given) == 0 and (tmp_path / "small-sft/distill.json").is_file()
    assert (tmp_path / "small-sft/run.json").stat().st_mtime_ns == before


def test_a_folder_with_other_things_is_not_replaced(words, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert (
        "is not an earlier result of this verb, which would be replaced (it holds precious.txt)"
        in capsys.readouterr().err
    )
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_the_second_of_two_waits_and_takes_what_the_first_made(words, done, haystacks, capsys, monkeypatch):
    """As if the lock had been held: nothing is computed again where the same was made, and everything where it was not."""
    held_out = haystack_file(haystacks / "test", 5)

    @contextmanager
    def waited(_):
        yield True

    monkeypatch.setattr("laid.io.alone", waited)
    monkeypatch.setattr(standalone, "distill", lambda *_: pytest.fail("is distilled again"))
    again = [*words, "--out", str(done[0])]
    assert main([*again, "--eval", str(held_out)]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    monkeypatch.setattr(standalone, "distill", lambda *_: 1 / 0)
    for other in (["--seed", "1"], [], ["--eval", str(haystack_file(haystacks / "test", 2))]):
        with pytest.raises(ZeroDivisionError):
            main([*again, *other])


def test_too_few_questions_are_told_before_the_teacher_runs(words, haystacks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(standalone, "build_cache", lambda *_: pytest.fail("the teacher runs"))
    write_questions(tmp_path / "few.json", read_questions(haystacks / "train.json")[:3])
    changed = [str(tmp_path / "few.json") if w.endswith("train.json") else w for w in words]
    assert main([*changed, "--out", str(tmp_path / "x"), "--method", "kd"]) == 2
    assert "3 questions do not fill one batch of 8" in capsys.readouterr().err
