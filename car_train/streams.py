"""Standard streams that are closed, or that nobody reads any more, warnings, and the ends of processes; the exporter
shares it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from car_train.errors import printable_lines


class Terminated(KeyboardInterrupt):
    """SIGTERM: the process is to end, and may clear up first."""


@contextmanager
def terminated_politely() -> Iterator[None]:
    """Within, SIGTERM raises Terminated instead of ending the process where it stands.

    Python drops what is raised in a destructor or a callback, and a signal may arrive in one: it is then sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            number = signal.SIGTERM if issubclass(what.exc_type, Terminated) else signal.SIGINT
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        else:
            hook(what)

    before, hook = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


_BOUND = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: kept by the program that takes this one's place
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def ending_with_this_process(command: Sequence[str]) -> list[str]:
    """The command, by its full path, so started that it dies with the process that starts it (Linux; else as it is).

    A process that is killed can't end its own, which would go on for hours with what nobody waits for.
    """
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-c", _BOUND, str(os.getpid()), *command]


def open_closed_streams() -> None:
    """Put the null device where stdout or stderr was closed before Python started (a daemon, cron, `2>&-`).

    The first files that are opened would get their numbers, and with them what a library prints; and Python prints on
    stdout what is meant for a stderr that isn't there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for stderr as errors are printed there, without Python's file, line and source."""
    return f"car_train: warning: {printable_lines(str(message))}\n"


def after_broken_pipe() -> int:
    """The exit code when the reader of stdout or stderr went away (`| head`), which is no error to print.

    Python would complain again when it flushes them at the end, so that both go nowhere from here on.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # noqa: PERF203
            os.dup2(nowhere, stream.fileno())
    return 1
