"""How far long work has come, on stderr: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from time import monotonic

from car_runtime.cli.errors import note

WIDTH = 24
"""Characters of the bar."""
EVERY = 0.2
"""Seconds between two drawings of it."""
LINE_EVERY = 30.0
"""Seconds between two lines where stderr is no terminal."""


class Bar:
    """Counts what is done of `total`. `end` leaves the last state standing."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what
        self._done = self._failed = 0
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = monotonic()

    def advance(self, failed: bool = False) -> None:
        """One more is done."""
        self._done += 1
        self._failed += failed
        now = monotonic()
        if now - self._shown >= (EVERY if self._terminal else LINE_EVERY):
            self._shown = now
            self._show(self.line(now - self._began))

    def line(self, seconds: float) -> str:
        """The state after that time: bar, count, rate and the time left."""
        filled = WIDTH * self._done // max(self._total, 1)
        rate = self._done / seconds if seconds > 0 else 0.0
        left = duration((self._total - self._done) / rate) if rate else "?"
        failed = f", {self._failed} failed" if self._failed else ""
        bar = "█" * filled + "░" * (WIDTH - filled)
        return f"{bar} {self._done}/{self._total} {self._what}{failed}, {rate:.2f}/s, {left} left"

    def end(self) -> None:
        """Leave the last line as it is; what is printed next starts on a new one."""
        if self._terminal and self._done:
            self._show(self.line(monotonic() - self._began))
            note("")

    def _show(self, line: str) -> None:
        if not self._terminal:
            note(f"car-run: {line}")
            return
        try:
            sys.stderr.write(f"\r{line}\x1b[K")
            sys.stderr.flush()
        except (OSError, UnicodeError):
            self._terminal = False


def duration(seconds: float) -> str:
    """Seconds as people read them: "42 s", "3:05", "2:00:09"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
