"""Provenance records: deterministic, blind to what does not matter, open-eyed for what does."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from laid import provenance
from laid.errors import LaidError
from laid.io import sha256_file
from laid.settings import load

TOP = Path(__file__).resolve().parents[1]


@pytest.fixture
def settings():
    return load([TOP / "config.yaml"])


def test_same_inputs_same_record_and_json_ready(settings, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    records = [provenance.collect("haystacks", settings, {"a.json": tmp_path / "a.json"}) for _ in range(2)]
    assert records[0] == records[1]
    assert json.loads(json.dumps(records[0])) == records[0]
    assert records[0]["data"]["a.json"] == hashlib.sha256(b"{}").hexdigest()
    assert {"code", "config", "data", "libraries", "settings"} <= records[0].keys()


def test_config_hash_follows_what_matters_only(settings):
    def record(changes):
        return provenance.collect("haystacks", settings.changed(changes), {})["config"]

    assert record({"seeds": 3, "scale": "other"}) == record({})
    assert record({"haystacks": {"seed": 9}}) != record({})


def test_wildcards_are_recorded(settings):
    record = provenance.collect("evaluate", settings, {}, student="small", method="base")
    assert record["wildcards"] == {"student": "small", "method": "base"}


def test_missing_input_is_one_line(settings, tmp_path):
    with pytest.raises(LaidError, match="gone.json: no such file or folder"):
        provenance.collect("haystacks", settings, {"x": tmp_path / "gone.json"})


def test_fingerprint_of_folders_and_hub_models(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/w.bin").write_bytes(b"1")
    before = provenance.fingerprint(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    assert provenance.fingerprint(tmp_path / "n") == before
    (tmp_path / "n/run.json").write_text("{}")
    (tmp_path / "n/.snakemake_timestamp").touch()
    assert provenance.fingerprint(tmp_path / "n") == before
    (tmp_path / "n/w.bin").write_bytes(b"2")
    assert provenance.fingerprint(tmp_path / "n") != before
    (tmp_path / "m/w.bin").rename(tmp_path / "m/v.bin")
    assert provenance.fingerprint(tmp_path / "m") != before
    assert provenance.fingerprint("hub:Qwen/x@1") == "hub:Qwen/x@1"


def test_a_large_file_is_read_once_by_all_processes(tmp_path, monkeypatch):
    """Until its bytes change, though its size and its time of change are put back."""
    reads = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(provenance, "LARGE", 4)
    monkeypatch.setattr(provenance, "SETTLED", 0)
    monkeypatch.setattr(provenance, "sha256_file", lambda p: reads.append(p) or sha256_file(p))

    def new_process(file, kept=True):
        provenance._hash_at.cache_clear()
        return provenance.fingerprint(file, kept)

    file = tmp_path / "w.safetensors"
    file.write_bytes(b"12345")
    assert new_process(file) == new_process(file) == hashlib.sha256(b"12345").hexdigest()
    assert len(reads) == 1
    before = file.stat()
    file.write_bytes(b"54321")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert new_process(file) == hashlib.sha256(b"54321").hexdigest() and len(reads) == 2
    new_process(file, kept=False)  # what `laid verify` asks for
    assert len(reads) == 3
    monkeypatch.setattr(provenance, "SETTLED", 10**12)
    file.write_bytes(b"43215")  # a moment ago: it may yet change within the same tick
    new_process(file), new_process(file)
    assert len(reads) == 5


@pytest.mark.parametrize("full", [False, True])
def test_a_home_that_is_full_or_cannot_be_written_costs_time_alone(tmp_path, monkeypatch, full):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache") if full else "/proc/none")
    monkeypatch.setattr(provenance, "LARGE", 0)
    monkeypatch.setattr(provenance, "SETTLED", 0)
    (tmp_path / "w.bin").write_bytes(b"1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 if full else before[0], before[1]))
    try:
        found = provenance.fingerprint(tmp_path / "w.bin", kept=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found == hashlib.sha256(b"1").hexdigest()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Another docstring."""\n\n# a comment\ndef f(x):\n    """Doc."""\n    return x + 1\n', True),
        (
            '"""Doc."""\n\ndef f(x):\n    return (x\n            + 1)\n',
            False,
        ),  # a docstring fewer is another tree
        ('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 2\n', False),
        ('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    "text"\n    return x + 1\n', False),
    ],
)
def test_source_hash_is_blind_to_comments_and_layout_only(tmp_path, text, same):
    for name, content in (("a", '"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 1\n'), ("b", text)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mod.py").write_text(content)
    a, b = (provenance.source_hash(tmp_path / name) for name in "ab")
    assert (a == b) is same


def test_code_names_commit_and_dirt(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M x"}
    monkeypatch.setattr(provenance, "_git", lambda *words: answers[words[0]])
    assert provenance.code.__wrapped__()["commit"] == "abc" and provenance.code.__wrapped__()["dirty"] is True
    answers["status"] = ""
    assert provenance.code.__wrapped__()["dirty"] is False
    monkeypatch.setattr(provenance, "_git", lambda *words: None)
    for noted, commit in (
        (None, None),
        ('{"url": "file:///laid", "dir_info": {"editable": true}}', None),
        ('{"url": "https://example.org/laid", "vcs_info": {"vcs": "git", "commit_id": "fed"}}', "fed"),
    ):
        installed = SimpleNamespace(read_text=lambda name, noted=noted: noted)
        monkeypatch.setattr(provenance.metadata, "distribution", lambda name, found=installed: found)
        assert provenance.code.__wrapped__()["commit"] == commit
        assert provenance.code.__wrapped__()["dirty"] is None


def test_a_wheel_notes_the_commit_it_is_built_from(tmp_path, monkeypatch):
    """setup.py in a checkout of one module; what it puts beside the modules is read where no checkout is."""
    checkout = tmp_path / "checkout"
    (checkout / "src/laid").mkdir(parents=True)
    (checkout / "src/laid/__init__.py").write_text("")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, checkout)
    words = ["git", "-C", checkout, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for more in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*words, *more], check=True)
    head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "site"]
    subprocess.run(build, cwd=checkout, check=True)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "site/laid")
    found = provenance.code.__wrapped__()
    assert (found["commit"], found["dirty"]) == (head.strip(), False)


def test_the_checkout_is_looked_at_and_left_as_it_is(tmp_path, monkeypatch):
    """`git status` would write its index: in the way of the user's own git, and half-written where there is no room."""
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "src/laid")
    (tmp_path / "a").write_text("a")
    words = ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for more in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*words, *more], check=True)
    os.utime(tmp_path / "a", (1, 1))
    before = (tmp_path / ".git/index").read_bytes()
    assert provenance._git("status", "--porcelain") == "" and provenance._git("rev-parse", "HEAD")
    assert (tmp_path / ".git/index").read_bytes() == before


def test_cost_measures_time_and_memory():
    start = time.perf_counter() - 2.0
    block = bytearray(64 << 20)
    cost = provenance.cost(start)
    assert 2.0 <= cost["wall_seconds"] < 60
    assert len(block) < cost["peak_memory_bytes"] < cost["hardware"]["memory_bytes"]
    assert cost["hardware"]["cores"] >= 1
    assert json.loads(json.dumps(cost)) == cost
