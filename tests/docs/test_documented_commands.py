"""Every command in a fenced block of the documents parses: by the real parsers of laid, Snakemake and DVC."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from guides import ROOT, blocks, split
from laid.cli import VERBS
from laid.layout import Layout
from laid.settings import load

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "bench").glob("*.md")),
]
OWN = {"mine.yaml"}  # files that a reader writes


def commands(program: str) -> list:
    """(document, words) of each command that starts with `program`, comments off and continued lines joined."""
    found = []
    for document in DOCUMENTS:
        for part in (part for _, text in blocks(document) for part in split(text)):
            words = shlex.split(part)
            printed = any(word.endswith(":") for word in words[:2])  # a message, not a command
            if words[:1] == [program] and not printed:
                found.append(pytest.param(words[1:], id=f"{document.relative_to(ROOT)}: {part}"[:100]))
    return found


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb of `laid`; what it refuses is a ValueError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ValueError(message)

    parser = Parser(prog=f"laid {verb}")
    importlib.import_module(f"laid.commands.{verb.replace('-', '_')}").add_arguments(parser)
    return parser


def files_exist(words: list[str], flag: str) -> None:
    """The YAML files behind `flag` are in the repository, unless the reader is to write them."""
    for name in words[words.index(flag) + 1 :] if flag in words else []:
        if name.startswith("-"):
            break
        if name.endswith(".yaml") and Path(name).name not in OWN:
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("words", commands("laid"))
def test_laid(words):
    verb, *rest = words
    assert verb in VERBS
    parser = parser_of(verb)
    if "..." in rest:  # what the document leaves out may be required: the flags it names must be there
        flags = {word for word in rest if word.startswith("--")}
        assert flags <= parser._option_string_actions.keys()
    else:
        parser.parse_args(rest)
    files_exist(rest, "--config")


@pytest.mark.parametrize("words", commands("accelerate"))
def test_accelerate(words):
    launcher, laid = words[: words.index("-m")], words[words.index("-m") + 1 :]
    parser = pytest.importorskip("accelerate.commands.launch").launch_command_parser()
    args = parser.parse_args([*launcher[1:], "laid"])
    assert launcher[0] == "launch" and (ROOT / args.config_file).is_file()
    test_laid(laid[1:])


@pytest.mark.parametrize("words", commands("snakemake"))
def test_snakemake(words):
    cli = pytest.importorskip("snakemake.cli")
    if "..." in words:
        words = [word for word in words if word != "..."]
    args = cli.get_argument_parser(profiles=None).parse_args(words)
    files_exist(words, "--configfile")
    sources = [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]
    rules = {name for s in sources for name in re.findall(r"^rule (\w+):", s.read_text(), re.MULTILINE)}
    for target in args.targets:
        assert target in rules or target.startswith("results/"), target


@pytest.mark.parametrize("words", commands("dvc"))
def test_dvc(words):
    parser = pytest.importorskip("dvc.cli.parser")
    parser.get_main_parser().parse_args(words)


@pytest.mark.parametrize("words", commands("make"))
def test_make(words):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


@pytest.mark.parametrize("program", ["python", "bash", "tools/slurm/start.sh", "tools/slurm/stop.sh"])
def test_scripts(program):
    for words in commands(program):
        script = program if program.startswith("tools/") else words.values[0][0]
        assert script.startswith("-") or (ROOT / script).is_file(), script


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_cells_lie_where_the_layout_says(document):
    layout = Layout(load([ROOT / "config.yaml"]))
    for path in re.findall(r"(results/small/cells/[\w/]+\.json)", document.read_text(encoding="utf-8")):
        suite, student, method, size = path.removesuffix(".json").split("/")[3:]
        assert suite in layout.suites and student in layout.members and method in layout.settings.methods, (
            path
        )
        assert int(size) in layout.suites[suite].sizes, path


def test_commands_were_found():
    assert (
        len(commands("laid")) > 10
        and len(commands("snakemake")) > 10
        and commands("dvc")
        and commands("make")
    )
