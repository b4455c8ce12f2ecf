"""Long-window distillation for vision-language models: one verb per step of the workflow."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from laid import __version__
from laid.errors import LaidError
from laid.io import require_place

# verb -> one-line help. The module laid.commands.<verb> has add_arguments(parser) and run(args); it is imported
# only when its verb is used, so that light verbs start in milliseconds.
VERBS = {
    "data": "make or check the COCO data (rendered, local or downloaded)",
    "haystacks": "build Visual Haystacks questions from COCO labels",
    "plan": "tell what every job would cost, and which cannot fit, before anything runs",
    "features": "compute the visual features of all images once, for the jobs that follow",
    "rehearse": "run every kind of job for a few steps, on random weights: does it run here, does it fit, how long",
    "pretrain": "train one member of the small-scale model family from nothing",
    "teacher-cache": "run the teacher once over the training questions and store what distillation needs",
    "train": "post-train a student (sft, kd, laid and its ablations)",
    "evaluate": "ask a model the questions of each haystack size, and write one cell per size",
    "serve": "serve a checkpoint to clients of OpenAI's chat-completions protocol, on this machine",
    "pope": "POPE's object questions about single images: build them, print their table",
    "tokens": "count prompt tokens and M-RoPE positions per haystack size (Table 2), without weights",
    "analyse": "measure a student's attention heads: which find the needle, and their spectra",
    "alignability": "measure how much of a student's queries and keys equation 7 can reach, for any two checkpoints",
    "why": "separate what distance in positions costs from what dilution by more keys costs",
    "beyond": "report what goes beyond the paper: why windows shrink, where they end",
    "distill": "distil a student from a teacher on your own conversations with images, without the workflow",
    "push": "send a distilled student to the Hugging Face hub: files, card and records; shown first",
    "ask": "ask a checkpoint about the images of a folder, and show where it looks",
    "tables": "build Tables 1, 2 and 3 from cells and print them",
    "sweep": "compare the parts of a method on the validation questions",
    "tune": "choose each method's settings on the validation questions",
    "figures": "draw the figures from cells and training logs",
    "report": "write one results page that opens offline: tables, figures, claims, provenance",
    "claims": "test the paper's claims on its own tables and on the cells",
    "verify": "check every cell against its inputs, or rebuild one and compare the bytes",
    "explain": "print the chain from the image files to one cell",
    "config": "print the resolved, validated configuration",
}
ONE_FILE = (
    "analyse",
    "why",
    "features",
    "report",
    "config",
)  # what --out is of these; of all others, a folder


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from laid import provenance

        found = provenance.code()
        commit = found["commit"] and f" ({found['commit'][:12]}{', changed' if found['dirty'] else ''})"
        print(f"laid {__version__}{commit or ''}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    if hasattr(sys.stdout, "reconfigure"):  # no verb ends because the locale cannot print a character
        sys.stdout.reconfigure(errors="backslashreplace")
    argv = [_expanded(word) for word in (sys.argv[1:] if argv is None else argv)]
    verb = next((word for word in argv if word in VERBS), "")

    def run() -> int:
        args = _parsed(argv, verb)
        args.words = argv
        if getattr(args, "config", ()) is None:
            from laid.commands.shared import configuration

            args.config = configuration()
        if getattr(args, "out", None) is not None:  # before any work: what is made may have taken hours
            require_place(args.out, file=verb in ONE_FILE)
            if verb not in ONE_FILE and args.out.is_file():
                raise LaidError(f"{args.out}: is a file, expected a folder: choose another place")
        return args.run(args) or 0

    return ended(f"laid {verb}", run)


def ended(program: str, work: Callable[[], int]) -> int:
    """The exit status of `work`. What is wrong, and who interrupted it, is one line."""
    try:
        return work()
    except LaidError as error:
        return _refused(program, str(error))
    except UnicodeEncodeError as error:  # the name of a file, in a locale without its characters
        return _refused(
            program,
            f"{error.object[:200]}: no name in this locale ({error.encoding}): set LC_ALL=C.UTF-8",
        )
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # a folder that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        return _refused(program, f"{where}{error.strerror or error}")


def _parsed(argv: Sequence[str], verb: str) -> argparse.Namespace:
    """The words as `verb` takes them; its module, and with it torch, is imported here."""
    parser = argparse.ArgumentParser(prog="laid", description=__doc__)
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="version, and the commit of the checkout or of what was installed",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text)
        if name == verb:
            module = importlib.import_module(f"laid.commands.{verb.replace('-', '_')}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser.parse_args(argv)


def _expanded(word: str) -> str:
    """~ as the shell expands it, also behind `--out=`, where the shell leaves it."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + os.path.expanduser(value)


def _refused(program: str, reason: str) -> int:
    """Say, in one line that any terminal shows, what is wrong; returns the exit status."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in reason)
    line = line if len(line) < 900 else f"{line[:600]} ... {line[-200:]}"
    print(f"{program}: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
