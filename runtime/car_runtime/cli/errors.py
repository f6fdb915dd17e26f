"""How a command fails: one line on stderr and an exit code, never a traceback for a user's mistake."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from car_runtime.errors import UserError, error_line, printable_lines


def run_command(prog: str, run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command with its arguments. Returns the exit code.

    What `run` returns; 0 after --help and --version; 2 for a UserError; 1 for what fails inside, which `--debug` lets
    through with its traceback; 130 if it was interrupted, 143 by SIGTERM.
    """
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or class name that the terminal cannot show
    try:
        with warnings.catch_warnings():
            # Decoders warn about damaged metadata; what matters arrives as an error, and stderr is for one line.
            warnings.simplefilter("ignore")
            with terminated_politely():
                return run(arguments)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except UserError as error:
        return _fail(prog, error, 2)
    except KeyboardInterrupt as stop:
        note(f"{prog}: interrupted")
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        # The reader of stdout went away (| head). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        return 1
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _fail(prog, f"{type(error).__name__}: {error}; --debug shows where", 1)


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


def _fail(prog: str, error: object, code: int) -> int:
    note(f"{prog}: error: {error_line(error)}")
    return code


def open_closed_streams() -> None:
    """Put the null device where stdout or stderr was closed before Python started (a daemon, cron, `2>&-`).

    The first files that are opened would get their numbers, and with them what an engine prints; and Python prints
    on stdout what is meant for a stderr that isn't there. A closed stdin stays None.
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


def note(line: str) -> None:
    """Print lines on stderr, control characters escaped. That nobody reads them any more is no reason to stop."""
    try:
        print(printable_lines(line), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
