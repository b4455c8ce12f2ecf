"""Every verb: a wrong input is exit status 2 and one clear line, never a traceback, and nothing half-written is left."""

import argparse
import importlib
import inspect
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import synthetic
from laid import __version__, cli, provenance
from laid.errors import LaidError
from laid.evaluation.cells import write_cell
from laid.io import read_json
from laid.results.needed import needed

TOP = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The verbs set torch's threads and determinism for their process; other tests keep theirs."""
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Read from there once, when that was imported: a hub that does not answer is asked for 20 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def places(micro_file, coco_root, haystacks, family, tmp_path):
    """Words in braces that command lines below use."""
    (tmp_path / "broken.yaml").write_text("scale: [micro\n")
    (tmp_path / "unknown.yaml").write_text("scala: micro\n")
    (tmp_path / "broken.json").write_text('[{"id": "1", ')
    (tmp_path / "file").write_text("a file")
    (tmp_path / "large.yaml").write_text("training: {batch_size: 64}\n")
    (tmp_path / "list/seed0").mkdir(parents=True)
    (tmp_path / "list/seed0/run.json").write_text("[]")
    return {
        "micro": micro_file, "coco": coco_root, "questions": haystacks / "train.json", "test": haystacks / "test",
        "teacher": family["teacher"], "small": family["small"], "out": tmp_path / "made/out", "tmp": tmp_path,
    }  # fmt: skip


RIGHT = {
    "data": "data --config {micro} --out {out}",
    "haystacks": "haystacks --config {micro} --coco {coco} --out {out}",
    "pretrain": "pretrain --config {micro} --member small --coco {coco} --out {out}",
    "teacher-cache": "teacher-cache --config {micro} --teacher {teacher} --coco {coco} --questions {questions} --out {out}",
    "train": "train --config {micro} --method sft --student-name small --student {small} --coco {coco}"
    " --questions {questions} --out {out} --device cpu",
    "evaluate": "evaluate --config {micro} --student-name small --method base --model {small} --coco {coco}"
    " --questions {test} --sizes 1 2 --out {out} --device cpu",
    "tokens": "tokens --config {micro} --model {small} --coco {coco} --out {out}",
    "analyse": "analyse --config {micro} --student-name small --model {small} --coco {coco} --questions {test} --out {out}",
    "alignability": "alignability --config {micro} --teacher {teacher} --student {small} --coco {coco} --questions {questions}"
    " --out {out}",
    "tables": "tables --config {micro} --cells {tmp}/cells --out {out}",
    "tune": "tune --config {micro} --cells {tmp}/cells --out {out}",
    "sweep": "sweep --config {micro} --cells {tmp}/cells --out {out}",
    "claims": f"claims --config {{micro}} --cells {{tmp}}/cells --out {{out}} --ledger {TOP}/claims.yaml",
    "figures": "figures --config {micro} --cells {tmp}/cells --out {out}",
    "report": "report --config {micro} --cells {tmp}/cells --out {out}",
    "verify": "verify --config {micro}",
    "explain": "explain {tmp}/cells/test/small/base/1.json --config {micro}",
    "config": "config --config {micro}",
}
# (verb, what replaces what in its command line, what the one line says)
WRONG = [
    ("haystacks", ("{coco}", "{tmp}"), "instances_train2017.json"),
    ("pretrain", ("small", "large"), "family.members has no 'large'; it has teacher, small"),
    ("pretrain", ("{coco}", "{tmp}/none"), "none: no such folder (expected COCO's layout"),
    ("pretrain", ("{out}", "{tmp}/file/out"), "file"),
    ("teacher-cache", ("{teacher}", "{tmp}/none"), "none"),
    ("teacher-cache", ("{teacher}", "{tmp}"), "no config.json in this folder"),
    ("teacher-cache", ("{questions}", "{tmp}/none.json"), "none.json"),
    ("teacher-cache", ("{questions}", "{tmp}/broken.json"), "broken.json: not valid JSON, line 1"),
    ("teacher-cache", ("{micro}", "{micro} {tmp}/large.yaml"), "24 questions do not fill one batch of 64"),
    ("teacher-cache", ("{coco}", "{tmp}"), "no such image"),
    ("train", ("sft", "base"), "'base' is not a trained method; trained methods: sft, kd, laid"),
    ("train", ("sft", "kd"), "give --teacher-cache"),
    ("train", ("sft", "kd --teacher-device cpu"), "give --teacher as well"),
    ("train", ("sft", "kd --teacher-cache {tmp}/none"), "none/index.json: no such file"),
    ("train", ("sft", "kd --teacher-cache {test}"), "index.json: no such file"),
    ("train", ("{small}", "{tmp}/file"), "is a file, expected a checkpoint folder or a hub id"),
    ("train", ("{small}", "nobody/nothing"), "nobody/nothing: cannot be loaded"),
    ("train", ("{questions}", "{tmp}/broken.json"), "broken.json: not valid JSON"),
    ("train", ("{coco}", "{tmp}"), "no such image"),
    ("train", ("--device cpu", "--device gpu"), "--device gpu: expected auto, cpu, cuda or cuda:<number>"),
    ("train", ("--device cpu", "--device cuda:99"), "--device cuda:99: this machine has"),
    ("evaluate", ("base", "bass"), "no method 'bass'; methods: "),
    ("evaluate", ("base", "sft"), "method sft is trained: give its run folders with --runs"),
    ("evaluate", ("base", "base --runs {tmp}/seed0"), "method base takes no --runs"),
    ("evaluate", ("base", "sft --runs {tmp}/seed0"), "this run did not finish"),
    ("evaluate", ("base", "sft --runs {tmp}/list/seed0"), "run.json: expected an object, found list"),
    ("evaluate", ("{small}", "{tmp}/none"), "no such checkpoint folder"),
    ("evaluate", ("{test}", "{tmp}"), "visual_haystack_1.json: no such file"),
    ("evaluate", ("--sizes 1 2", "--sizes 3"), "visual_haystack_3.json: no such file"),
    ("evaluate", ("{coco}", "{tmp}"), "no such image"),
    ("evaluate", ("{test}", "{tmp}/coco_pope_random.json"), "coco_pope_random.json: no such file"),
    ("evaluate", ("--sizes 1 2", ""), "give the sizes with --sizes"),
    ("evaluate", ("{test}", "{questions} {questions}"), "has "),
    ("tokens", ("{small}", "{tmp}/none"), "no such checkpoint folder"),
    ("tokens", ("{coco}", "{tmp}"), "instances_val2017.json: no such file"),
    ("alignability", ("{teacher}", "{tmp}/none"), "none: no such checkpoint folder"),
    ("alignability", ("{questions}", "{tmp}/broken.json"), "broken.json: not valid JSON"),
    ("alignability", ("{coco}", "{tmp}"), "no such image"),
    ("alignability", ("{out}", "{out} --student-name ../x"), "--student-name ../x: has a /"),
    (
        "evaluate",
        ("--device cpu", "--endpoint http://x/v1 --concurrent 9999"),
        "--concurrent 9999: at most 512",
    ),
    ("tables", None, "no such folder of cells"),
    ("tune", None, "`snakemake --cores all tune --configfile configs/tune.yaml` makes it"),
    ("sweep", None, "`snakemake --cores all sweep --configfile configs/sweep.yaml` makes it"),
    ("tables", ("{out}", "{tmp}/file"), "file: is a file, expected a folder"),
    ("alignability", ("{out}", "{tmp}/file"), "file: is a file, expected a folder"),
    ("report", ("{out}", "{tmp}"), "is a folder, expected a file"),
    ("config", ("{micro}", "{micro} --out {tmp}"), "is a folder, expected a file"),
]


def command(places, verb, swap=None):
    text = RIGHT[verb]
    if swap:
        assert swap[0] in text
        text = text.replace(*swap)
    return [word.format(**places) for word in text.split()]


def left_behind(tmp_path):
    """Files and folders below made/; the hidden lock of a verb that makes something alone is no result."""
    return [
        p for p in (tmp_path / "made").rglob("*") if not (p.name.startswith(".") and p.name.endswith(".lock"))
    ]


def one_line(capsys, verb, says):
    """The error, after whatever progress was shown before it."""
    captured = capsys.readouterr()
    lines = [
        line
        for line in captured.err.splitlines()
        if not line.startswith(("teacher cache: images", "images:"))
    ]
    assert "Traceback" not in captured.err + captured.out
    assert len(lines) == 1 and lines[0].startswith(f"laid {verb}: error: "), captured.err
    assert says in lines[0] and len(lines[0]) < 900


@pytest.mark.parametrize("verb, swap, says", WRONG)
def test_wrong_inputs(places, capsys, tmp_path, verb, swap, says):
    assert cli.main(command(places, verb, swap)) == 2
    one_line(capsys, verb, says)
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("verb", RIGHT)
@pytest.mark.parametrize(
    "file, says",
    [
        ("none.yaml", "none.yaml: no such configuration file"),
        ("broken.yaml", "broken.yaml: not valid YAML, line "),
        ("unknown.yaml", "scala: unknown key; did you mean 'scale'?"),
    ],
)
def test_wrong_configurations(places, capsys, tmp_path, verb, file, says):
    assert cli.main(command(places, verb, ("{micro}", "{tmp}/" + file))) == 2
    one_line(capsys, verb, says)
    assert not left_behind(tmp_path)


@pytest.mark.parametrize(
    "verb, swap, says",
    [
        ("evaluate", ("--sizes 1 2", "--sizes 0"), "'0' is not a whole number from 1 on"),
        ("evaluate", ("--sizes 1 2", "--sizes two"), "'two' is not a whole number"),
        ("evaluate", ("--device cpu", "--threads -1"), "not a whole number|expected one argument"),
        ("train", ("sft", "sft --seed -1"), "not a whole number from 0 on|expected one argument"),
        ("train", ("sft", "sft --seed 99999999999999"), "'99999999999999' is more than 2147483647"),
        ("train", ("--device cpu", "--threads 2147483648"), "is more than 2147483647"),
        ("train", ("--out {out}", ""), "the following arguments are required: --out"),
        ("train", ("--device cpu", "--epochs 3"), "unrecognized arguments: --epochs 3"),
    ],
)
def test_wrong_words(places, capsys, tmp_path, verb, swap, says):
    import re

    with pytest.raises(SystemExit) as caught:
        cli.main(command(places, verb, swap))
    assert caught.value.code == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1])
    assert not left_behind(tmp_path)


def test_unknown_verbs_version_and_help(capsys):
    for words, code in ((["trane"], 2), ([], 2), (["--version"], 0), (["--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == code
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    commit = provenance.code()["commit"]
    assert f"laid {__version__}" + (f" ({commit[:12]}" if commit else "\n") in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert cli.VERBS[verb].split()[0] in out and ("--config" in out or verb == "push")


@pytest.mark.parametrize("verb", ["haystacks", "pretrain", "teacher-cache", "train", "evaluate", "analyse"])
def test_a_limit_on_the_size_of_files_is_one_line_and_leaves_nothing(places, capsys, tmp_path, verb):
    """`ulimit -f`, which a full disk and a quota are told as, too (tests/test_io.py)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        assert cli.main(command(places, verb)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"laid {verb}: error: {tmp_path}/made/") and ".tmp-" not in line, line
    assert "File too large: " in line and "give the same command again" in line
    assert not [p for p in (tmp_path / "made").rglob("[!.]*") if p.is_file()]


@pytest.mark.parametrize(
    "verb",
    ["data", "haystacks", "pretrain", "teacher-cache", "train", "evaluate", "tokens", "tables", "claims"],
)  # fmt: skip
def test_two_of_a_verb_on_one_output_wait_for_each_other(places, capsys, monkeypatch, micro, verb):
    def held(target):
        raise LaidError(f"waits for {target}")

    for student, method, size in needed(micro):
        made = synthetic.cell(student, method, size, [[1, 0]], scale=micro.scale)
        write_cell(places["tmp"] / f"cells/test/{student}/{method}/{size}.json", made)
    monkeypatch.setattr("laid.io.alone", held)
    assert cli.main(command(places, verb)) == 2
    one_line(capsys, verb, f"waits for {places['out']}")


def test_every_verb_that_writes_keeps_others_of_it_away():
    """But for those that write one file, which is renamed into its place."""
    found = {}
    for verb in cli.VERBS:
        parser = argparse.ArgumentParser()
        module = importlib.import_module(f"laid.commands.{verb.replace('-', '_')}")
        module.add_arguments(parser)
        text = inspect.getsource(module)
        if "--out" in parser._option_string_actions or "--out" in text:
            found[verb] = "alone(" in text or "output(" in text
    assert len(found) > 20 and {verb for verb, waits in found.items() if not waits} == {"features", "config"}


def test_home_is_meant_by_a_tilde_wherever_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text(
        "results: ~/r\ndata: {source: local, root: ~/coco}\nmodels: {checkpoints: {small: ~/small}}\n"
    )
    assert cli.main(["config", "--json", "--config", "~/x.yaml", "--out=~/whole.json"]) == 0
    full = json.loads((tmp_path / "whole.json").read_text())
    found = [full["results"], full["data"]["root"], full["models"]["checkpoints"]["small"]]
    assert found == [f"{tmp_path}/{name}" for name in ("r", "coco", "small")]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_no_verb_ends_because_a_character_cannot_be_printed(tmp_path, monkeypatch, encoding):
    (tmp_path / "x.yaml").write_text("results: π\n", encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["config", "--config", str(tmp_path / "x.yaml")]) == 0
    out.flush()
    assert b"results: \\u03c0" in out.buffer.getvalue()


def test_a_name_that_the_locale_cannot_write_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("laid.commands.config.run", lambda _: "π/coco".encode("latin-1"))
    assert cli.main(["config", "--config", "x.yaml"]) == 2
    assert "π/coco: no name in this locale (latin-1): set LC_ALL=C.UTF-8" in capsys.readouterr().err


def test_a_line_is_a_line_whatever_it_names(tmp_path, capsys):
    """A path may hold what no terminal shows, and be longer than anyone reads."""
    for name in ("a\nb.yaml", "\x1b[31m.yaml", "\u202e.yaml", "x" * 5000):
        assert cli.main(["config", "--config", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said[:-1].isprintable() and len(said) < 1000


@pytest.mark.parametrize(
    "where", ["laid.evaluation.evaluate.evaluate_cells", "laid.cli.importlib.import_module"]
)
def test_interrupted_by_hand(places, capsys, monkeypatch, where):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    assert cli.main(command(places, "evaluate")) == 130
    assert capsys.readouterr().err == "laid evaluate: interrupted\n"


def test_the_whole_way_by_hand(places, capsys, tmp_path):
    """pretrain, teacher-cache, train and evaluate one after the other, each on what the one before it made."""
    out = tmp_path / "made"

    def laid(verb, *swaps):
        text = RIGHT[verb]
        for swap in swaps:
            assert swap[0] in text
            text = text.replace(*swap)
        assert cli.main([word.format(**places) for word in text.split()]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    said = laid("pretrain", ("{out}", str(out / "models/small")))
    assert said.startswith("small: ") and "window 4" in said
    laid("pretrain", ("{out}", str(out / "models/teacher")), ("small", "teacher"))
    places |= {"small": out / "models/small", "teacher": out / "models/teacher"}
    said = laid("teacher-cache", ("{out}", str(out / "teacher_cache")))
    assert said == "teacher cache: 24 questions in 1 shards, layers [2]"
    run = out / "runs/small/laid/seed3"
    said = laid(
        "train", ("{out}", str(run)), ("sft", f"laid --seed 3 --teacher-cache {out / 'teacher_cache'}")
    )
    assert said.startswith("small laid seed 3: 6 steps, loss ")
    cells = out / "cells/small/laid"
    said = laid("evaluate", ("{out}", str(cells)), ("base", f"laid --runs {run}"))
    assert said.startswith("small laid: 2 images: ") and ", 10 answers, " in said
    cell = read_json(cells / "2.json")
    assert cell["seeds"] == [3] and {p.name for p in cells.iterdir()} == {"1.json", "2.json", "cost.json"}
    assert not [p for p in out.rglob(".*") if p.is_file()]


def test_as_a_process(tmp_path):
    """The installed way in: `python -m laid`, its exit status, nothing but one line on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(TOP / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "laid", "config", "--config", "none.yaml"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "laid config: error: none.yaml: no such configuration file\n"


def test_without_a_configuration_the_papers_methods_hold(tmp_path, monkeypatch, capsys):
    """default.yaml inside the package is what configs/paper.yaml says of the methods that it trains."""
    from laid.settings import load, validate

    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("no config.yaml here: ")
    ours, papers = validate(json.loads(captured.out)).methods, load([TOP / "configs/paper.yaml"]).methods
    assert {"base", "yarn", "self_extend", "sft", "kd", "laid", "laid_plus"} == set(ours)
    assert all(ours[name] == papers[name] for name in ("sft", "kd", "laid", "laid_plus"))
