"""`laid config`: print the configuration as the workflow sees it, or write base and overlays as one file."""

from __future__ import annotations

import argparse
from pathlib import Path

from laid.commands.shared import config_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser)
    parser.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON schema of configuration files, for editors",
    )
    parser.add_argument(
        "--docs", action="store_true", help="print every key as Markdown (docs/reference/settings.md)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write base and overlays as one file, merged, validated and with the defaults",
    )


def run(args: argparse.Namespace) -> int:
    import yaml

    from laid.errors import LaidError
    from laid.io import dumps, write_text
    from laid.settings import json_schema, load, merged
    from laid.settings.reference import reference

    if args.schema or args.docs:
        print(dumps(json_schema()) if args.schema else reference(), end="\n" if args.schema else "")
        return 0
    base = args.config[0]
    # The shell empties the file behind `> config.yaml` before it is read.
    if base.is_file() and not base.stat().st_size:
        raise LaidError(f"{base}: is empty; to write over what is read, restore it and use --out {base}")
    values = load(args.config).model_dump()
    if args.out:  # methods as written, so that one that extends another still follows it
        values["methods"] = merged(args.config).get("methods", {})
    text = dumps(values) + "\n" if args.json else yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if args.out:
        write_text(args.out, text)
    else:
        print(text, end="")
    return 0
