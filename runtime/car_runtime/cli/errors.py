"""How a command fails: one line on stderr and an exit code, never a traceback for a user's mistake."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from car_runtime.errors import UserError, error_line


def run_command(prog: str, run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command with its arguments. Returns the exit code.

    What `run` returns; 0 after --help and --version; 2 for a UserError; 1 for what fails inside, which `--debug` lets
    through with its traceback; 130 if it was interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or class name that the terminal cannot show
    try:
        with warnings.catch_warnings():
            # Decoders warn about damaged metadata; what matters arrives as an error, and stderr is for one line.
            warnings.simplefilter("ignore")
            return run(arguments)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except UserError as error:
        return _fail(prog, error, 2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout went away (| head). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _fail(prog, f"{type(error).__name__}: {error}; --debug shows where", 1)


def _fail(prog: str, error: object, code: int) -> int:
    print(f"{prog}: error: {error_line(error)}", file=sys.stderr)
    return code
