"""Start the processes of one run on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence


def launch(command: Sequence[str], processes: int) -> int:
    """Run `command` in `processes` processes that know of one another; returns their exit code.

    SIGTERM is passed on and waited out, however long the processes' checkpoint takes (torchrun kills after 30
    seconds). When one process fails the others are killed, as they would wait for it. The first process writes to this
    one's output; of the others only an error is shown.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    errors = [tempfile.TemporaryFile() for _ in range(processes - 1)]  # noqa: SIM115 (closed with this process)
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else None,
            stderr=errors[rank - 1] if rank else None,
        )
        for rank in range(processes)
    ]
    before = signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    try:
        while any(child.poll() is None for child in children):
            time.sleep(0.1)
            failed = [r for r, child in enumerate(children) if child.poll() not in (None, 0, 143)]
            if failed:
                if failed[0]:
                    errors[failed[0] - 1].seek(0)
                    sys.stderr.write(errors[failed[0] - 1].read().decode(errors="replace"))
                code = children[failed[0]].returncode
                return 128 - code if code < 0 else code
    finally:
        for child in children:
            child.kill()
        signal.signal(signal.SIGTERM, before)
    return max(child.returncode for child in children)
