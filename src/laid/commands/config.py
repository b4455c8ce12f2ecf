"""`laid config`: print the configuration as the workflow sees it: merged, validated, defaults filled in."""

from __future__ import annotations

import argparse

from laid.commands.shared import config_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")


def run(args: argparse.Namespace) -> int:
    import yaml

    from laid import config
    from laid.io import dumps

    values = config.load(args.config)
    print(
        dumps(values) if args.json else yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()
    )
    return 0
