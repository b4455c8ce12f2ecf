"""A real headless Chromium over its debugging pipe, without any driver; for tests of the results page only."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)


class Browser:
    """One browser with one tab of a chosen width; `messages` keeps everything it reported."""

    def __init__(self, profile: Path, deadline: float = 120):
        assert PROGRAM is not None
        self.until = time.monotonic() + deadline
        self.number, self.rest = 0, b""
        self.messages: list[dict[str, Any]] = []
        self.session: str | None = None
        # Chromium reads commands from its descriptor 3 and writes answers to 4, each ended by a zero byte.
        read, self.out = os.pipe()
        self.back, write = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ]
        flags += ["--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        # The shell moves the pipes to 3 and 4 before Chromium starts, whatever numbers they have here.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "-", PROGRAM, *flags],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command of the DevTools protocol and wait for its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self.number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def wait(self, method: str) -> None:
        """Wait for an event."""
        while self._receive().get("method") != method:
            pass

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            left = self.until - time.monotonic()
            assert left > 0 and select.select([self.back], [], [], left)[0], "Chromium did not answer in time"
            piece = os.read(self.back, 1 << 20)
            assert piece, "Chromium ended"
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\0")
        self.messages.append(json.loads(line))
        return self.messages[-1]

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a file at a screen width, as a telephone does below 600 pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[Any]:
        """Errors and warnings of the console, and exceptions."""
        wrong = []
        for message in self.messages:
            told = message.get("params", {})
            if message.get("method") == "Runtime.exceptionThrown":
                wrong.append(told["exceptionDetails"])
            elif message.get("method") == "Runtime.consoleAPICalled" and told["type"] in (
                "error",
                "warning",
                "assert",
            ):
                wrong.append(told["args"])
            elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                wrong.append(told["entry"])
        return wrong

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [
            m["params"]["request"]["url"]
            for m in self.messages
            if m.get("method") == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.out)
        os.close(self.back)
