"""`laid plan`: what every job of a configuration would cost, before anything runs; refuses what cannot fit."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument

    config_argument(parser)
    parser.add_argument(
        "--configs", type=Path, metavar="DIR",
        help="take shapes from DIR/<member>/config.json or DIR/<checkpoint's name>/config.json",
    )  # fmt: skip
    parser.add_argument("--gpu", help="the GPU that jobs run on (default plan.gpu), e.g. H200-141GB")
    parser.add_argument(
        "--utilisation", type=float, help="share of peak FLOP/s reached (default plan.utilisation)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write plan.md and plan.json here")


def run(args: argparse.Namespace) -> int:
    import sys
    import warnings

    from laid.errors import LaidError
    from laid.io import alone, dumps, write_text
    from laid.plan import table
    from laid.plan.estimate import Estimator
    from laid.plan.fit import refusal
    from laid.plan.gpus import gpu_named
    from laid.plan.jobs import jobs_of
    from laid.results.render import markdown, show
    from laid.settings import load

    settings = load(args.config)
    given = settings.plan
    utilisation = given.utilisation if args.utilisation is None else args.utilisation
    if utilisation is not None and not 0 < utilisation <= 1:
        raise LaidError(f"--utilisation {utilisation:g}: a share of peak, above 0 and at most 1")
    gpu = gpu_named(args.gpu or given.gpu)
    others = [gpu_named(name) for name in given.compare]
    gpus = [gpu, *(other for other in others if other != gpu)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = Estimator(settings, args.configs)
        jobs = list(jobs_of(estimator, gpu))
        refused = [refusal(estimator, job) for job in table.together(jobs) if not job.fits]
    tables = table.job_tables(jobs, gpu, utilisation, estimator)
    if any(job.gpu for job in jobs):
        tables.append(table.gpu_table(jobs, gpus, utilisation))
        beside = table.paper_table(jobs, gpu, utilisation, settings.models.labels)
        tables += [beside] if beside else []
    show(tables)
    if args.out:
        text = "\n".join(markdown(t) for t in tables)
        if refused:
            text += "\n## What does not fit\n\n" + "".join(f"- {line}\n" for line in refused)
        with alone(args.out / "plan"):
            write_text(args.out / "plan.md", text)
            write_text(args.out / "plan.json", dumps(table.record(jobs, gpus, utilisation, refused)) + "\n")
    for line in refused:
        print(f"laid plan: does not fit: {line}", file=sys.stderr)
    return 1 if refused else 0
