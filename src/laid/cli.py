"""The `laid` command: one verb per step of the workflow, each usable by hand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from laid import __version__
from laid.errors import LaidError

# verb -> one-line help. The module laid.commands.<verb> has add_arguments(parser) and run(args); it is imported
# only when its verb is used, so that light verbs start in milliseconds.
VERBS = {
    "data": "make or check the COCO data (rendered, local or downloaded)",
    "haystacks": "build Visual Haystacks questions from COCO labels",
    "plan": "tell what every job would cost before anything runs, and what does not fit",
    "pretrain": "train one member of the small-scale model family from nothing",
    "teacher-cache": "run the teacher once over the training questions and keep what distillation needs",
    "train": "post-train a student (sft, kd, laid and its ablations)",
    "evaluate": "evaluate a model with a method over haystack sizes into cells",
    "pope": "object questions about single images (POPE): build, evaluate, print",
    "tokens": "count tokens and M-RoPE positions over haystack sizes (Table 2), from image sizes alone",
    "analyse": "look into the attention heads of a student: needles, spectra",
    "why": "take distance in positions and dilution by more keys apart",
    "beyond": "draw and tell what lies beyond the paper: why windows shrink, where they end",
    "distill": "distil a student from a teacher on any question file, without the workflow",
    "tables": "build Tables 1, 2 and 3 from cells and print them",
    "sweep": "tell which part of a method does what, on the validation questions",
    "figures": "draw the figures from cells and training logs",
    "report": "write one offline results page: tables, figures, claims, provenance",
    "claims": "hold the paper's claims against its tables and against the cells",
    "verify": "check every cell against its inputs; rebuild one and compare bytes",
    "explain": "print the chain from image files to one cell",
    "config": "print the resolved, validated configuration",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="laid", description=__doc__)
    parser.add_argument("--version", action="version", version=f"laid {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    wanted = next((word for word in argv if word in VERBS), None)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        if verb == wanted:
            module = importlib.import_module(f"laid.commands.{verb.replace('-', '_')}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if getattr(args, "config", ()) is None:
        from laid.commands.shared import configuration

        args.config = configuration()
    try:
        return args.run(args) or 0
    except LaidError as error:
        print(f"laid {args.verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"laid {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # a folder that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"laid {args.verb}: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
