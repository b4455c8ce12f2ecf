"""`laid serve`: a checkpoint behind OpenAI's chat-completions protocol."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from laid.commands.shared import config_argument, count, device_arguments

    config_argument(parser)
    parser.add_argument("model", help="checkpoint: a folder or a hub id")
    parser.add_argument("--name", help="what clients call the model (default: the checkpoint's name)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: this machine alone; no key is asked for)",
    )
    parser.add_argument(
        "--port", type=lambda text: count(text, 0), default=8000, help="default 8000; 0: any that is free"
    )
    device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import signal
    import tempfile

    from laid import provenance
    from laid.commands.shared import checkpoint_argument, deterministic, pick_device
    from laid.evaluation.server import Completions, Server
    from laid.methods.registry import load_with_method
    from laid.models.loading import name_of, source_of
    from laid.settings import load

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no folder of images stays behind
    settings = load(args.config)
    checkpoint_argument(args.model)
    deterministic(args.threads)
    device = pick_device(args.device)
    with Server(args.host, args.port) as server, tempfile.TemporaryDirectory(prefix="laid-serve-") as folder:
        loaded = load_with_method(settings, "base", args.model, None, device)
        version = provenance.fingerprint(source_of(args.model), kept=True)
        name = args.name or name_of(args.model)
        server.completions = Completions(loaded, name, settings.evaluation, folder, version)
        print(f"{name} at {server.url} (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    return 0
