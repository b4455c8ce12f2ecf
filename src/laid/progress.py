"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

from tqdm import tqdm


class Progress:
    """Counts `total` units of work; shows rate, metrics and time left on stderr.

    On a terminal this is a tqdm bar; without one it prints a line at most every `every` seconds, so that a log
    file stays readable.
    """

    silent = False  # in processes that help another one

    def __init__(self, total: int, label: str, unit: str = "step", every: float = 15.0):
        self.total, self.label, self.unit, self.every = total, label, unit, every
        self.done = 0
        self.metrics: dict[str, Any] = {}
        self.start = self.said = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and not self.silent:
            self.bar = tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif exc[0] is None:
            self._say(final=True)

    def update(self, n: int = 1, **metrics: Any) -> None:
        """Add `n` finished units; `metrics` (loss=..., accuracy=...) are shown beside the count."""
        self.done += n
        self.metrics.update(metrics)
        if self.bar is not None:
            if metrics:
                self.bar.set_postfix({k: _short(v) for k, v in self.metrics.items()}, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.said >= self.every:
            self._say()

    def _say(self, final: bool = False) -> None:
        if self.silent:
            return
        now = time.monotonic()
        self.said = now
        spent = now - self.start
        rate = self.done / spent if spent > 0 else 0.0
        shown = " ".join(f"{k}={_short(v)}" for k, v in self.metrics.items())
        left = "" if final or rate == 0 else f", {_clock((self.total - self.done) / rate)} left"
        line = (
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {_clock(spent)} spent{left}"
        )
        print(line + (f"  {shown}" if shown else ""), file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, secs = divmod(int(seconds), 60)
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
