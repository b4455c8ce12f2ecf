"""Files appear whole or not at all; paths stay inside; one process at a time makes a thing."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from laid import io
from laid.errors import LaidError

HOLD = """
import sys
from laid.io import alone
with alone(sys.argv[1]):
    with open(sys.argv[2], "a") as log:
        log.write("in ")
        log.flush()
        sys.stdin.read()
        log.write("out ")
"""


def start(target, log):
    """A process that holds `target` until its input ends."""
    words = [sys.executable, "-c", HOLD, str(target), str(log)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(log):
    end = time.monotonic() + 60
    while not (log.is_file() and log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_processes_never_make_the_same_thing_at_once(tmp_path):
    log = tmp_path / "log"
    first = start(tmp_path / "run", log)
    wait_for(log)
    second = start(tmp_path / "run", log)
    said = second.stderr.readline()
    assert said.endswith("another process is making it; waiting for that one to end\n")
    first.communicate()
    second.communicate()
    assert first.returncode == second.returncode == 0
    assert log.read_text() == "in out in out "


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    log = tmp_path / "log"
    first = start(tmp_path / "run", log)
    wait_for(log)
    first.kill()
    first.communicate()
    assert start(tmp_path / "run", log).communicate()[1] == ""


@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, folder):
    target = tmp_path / "thing"

    def fill(path, text):
        if folder:
            path.mkdir()
            path = path / "file"
        path.write_text(text)

    for text, fails in (("one", False), ("half", True), ("two", False)):
        try:
            with io.atomic_path(target) as beside:
                fill(beside, text)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert (target / "file" if folder else target).read_text() == "one"
        assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    assert (target / "file" if folder else target).read_text() == "two"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "a/../../../etc"])
def test_paths_do_not_leave_their_folder(tmp_path, name):
    with pytest.raises(LaidError, match="leaves its folder"):
        io.safe_join(tmp_path, name)


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=6))  # fmt: skip
def test_json_is_stable_and_comes_back(value):
    text = io.dumps(value)
    assert json.loads(text) == value and io.dumps(json.loads(text)) == text


@pytest.mark.parametrize(("content", "said"), [(b'{"a": 1', "cut short or edited"), (b"9" * 5000, "more than 4,300 digits"), (b"\xff", "not UTF-8"), (None, "no such file")])  # fmt: skip
def test_broken_json_is_one_line(tmp_path, content, said):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LaidError, match=said) as caught:
        io.read_json(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert isinstance(path, Path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pipe", "is a pipe, expected a file"),
        ("zero", "is a device, expected a file"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        (".", "is a folder, expected a file"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "holds a character that no name has"),
    ],
)
def test_what_is_no_file_is_one_line_at_once(tmp_path, name, said):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(LaidError, match=said):
        io.read_text(tmp_path / name)


def test_a_link_below_a_folder_is_the_users_own(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/val2017").symlink_to(tmp_path / "shared")
    assert io.safe_join(tmp_path / "root", "val2017/1.jpg") == tmp_path / "root/val2017/1.jpg"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_what_is_made_can_be_read_by_whom_the_umask_says(tmp_path, umask, mode):
    """safetensors makes its files for their owner alone; on a cluster others are to read checkpoints."""
    before = os.umask(umask)
    try:
        with io.atomic_path(tmp_path / "model") as folder:
            folder.mkdir()
            save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
            (folder / "run.sh").touch(0o700)
        with io.atomic_path(tmp_path / "one.safetensors") as file:
            save_file({"x": torch.zeros(1)}, file)
    finally:
        os.umask(before)
    modes = [(tmp_path / p).stat().st_mode & 0o777 for p in ("model/model.safetensors", "one.safetensors")]
    assert modes == [mode, mode]
    assert (tmp_path / "model/run.sh").stat().st_mode & 0o777 == mode | 0o700


HELD = [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded")]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kind", ["limit", "tensors", *HELD])
def test_no_room_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, kind, folder):
    """A limit on the size of files is the system's own refusal, met here by text and by safetensors."""
    target = tmp_path / "thing"
    io.write_text(target / "file" if folder else target, "before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(path):
        if folder:
            path.mkdir()
            path = path / "file"
        if kind == "limit":
            path.write_bytes(bytes(200_000))
        elif kind == "tensors":
            save_file({"x": torch.zeros(50_000)}, path)
        else:
            raise OSError(*kind)

    said = "File too large" if isinstance(kind, str) else kind[1]
    if isinstance(kind, str):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with (
            pytest.raises(
                LaidError, match=f"thing: {said}: .*bytes are needed, .*same command again"
            ) as caught,
            io.atomic_path(target) as beside,
        ):
            fill(beside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert (target / "file" if folder else target).read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "laid-test", disk]
    if not shutil.which("mount") or subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("mount is not allowed here")
    try:
        io.write_text(disk / "thing", "before")
        for fill in (
            lambda file: save_file({"x": torch.zeros(50_000)}, file),
            lambda file: file.write_bytes(bytes(200_000)),
        ):
            said = "thing: No space left on device: .*same command again"
            with pytest.raises(LaidError, match=said), io.atomic_path(disk / "thing") as beside:
                fill(beside)
        assert [(p.name, p.read_text()) for p in disk.iterdir()] == [("thing", "before")]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_what_is_known_not_to_fit_is_not_begun(tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(io.shutil, "disk_usage", lambda _: room)
    with pytest.raises(LaidError, match="x.json: No space left on device: 11 bytes are needed, 10 are free"):
        io.write_json(tmp_path / "x.json", {"a": [1]}, indent=None)
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_folder_is_written_through(tmp_path):
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    io.require_place(tmp_path / "out", "file")
    with io.alone(tmp_path / "out"), io.atomic_path(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "file").write_text("made")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/out/file").read_text() == "made"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    io.write_text(tmp_path / "mine/precious", "x")
    with pytest.raises(LaidError, match="mine: is a folder, expected a file"):
        io.update(tmp_path / "mine", "a page")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "mine",
        "mine/precious",
    ]


def foreign(root):
    (root / "out").mkdir()
    (root / "out/notes.txt").touch()


@pytest.mark.parametrize(
    "make, target, own, says",
    [
        (foreign, "out", ["run.json"], "is not an earlier result of this verb, which would be replaced .it holds notes.txt"),
        (lambda root: (root / "out").symlink_to(root / "gone"), "out", [], "is a link to .*gone, which is not there"),
        (lambda root: os.mkfifo(root / "out"), "out", [], "is neither a file nor a folder"),
        (lambda root: (root / "file").touch(), "file/below/out", [], "file is a file, expected a folder"),
        (lambda root: (root / "out").touch(), "out", ["run.json"], "is a file, expected a folder"),
        (lambda root: None, "/proc/out", ["run.json"], "/proc cannot be written to"),
        (lambda root: None, "/proc", ["run.json"], "is not an earlier result"),
    ],
    ids=["foreign", "link", "fifo", "below a file", "a file", "read only", "a disk"],
)  # fmt: skip
def test_where_nothing_can_be_written_is_told_before(tmp_path, make, target, own, says):
    make(tmp_path)
    with pytest.raises(LaidError, match=says):
        io.require_place(tmp_path / target, *own)


def test_an_earlier_result_and_a_fresh_place_are_taken(tmp_path):
    for name in ("run.json", "model", ".hidden"):
        (tmp_path / "out" / name).mkdir(parents=True)
    io.require_place(tmp_path / "out", "run.json", "model")
    io.require_place(tmp_path / "new/out", "run.json")
    io.require_place(tmp_path / "new/file.json", file=True)
    with pytest.raises(LaidError, match="is a folder, expected a file"):
        io.require_place(tmp_path / "out", file=True)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    """The thing itself, its record of costs, the checkpoint of a training; nothing of another's."""
    for name in (".run.tmp-abcd", ".run.cost.json.tmp-abcd", "..run.checkpoint.tmp-abcd", ".other.tmp-abcd"):
        (tmp_path / name).mkdir()
    with io.alone(tmp_path / "run"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".other.tmp-abcd"]
