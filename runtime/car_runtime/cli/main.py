"""`car-run`: generates, or runs the command of `COMMANDS` that its first argument names.

Results (paths, or one JSON object) go to stdout, everything else to stderr. Exit codes: 0 done; 2 something given
cannot be used, one line says what and how to repair it, nothing is written; 1 failure inside; 130 interrupted, 143 by
SIGTERM. numpy and the engine are imported only once the arguments are known to be good, so that `--help` and mistakes
answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from car_runtime.cli import again, batch, blend, control, detect, doctor, edit, plan, run, serve, sheet, verify
from car_runtime.cli.errors import run_command

COMMANDS = {
    "paint": edit.paint,
    "extend": edit.extend,
    "restyle": edit.restyle,
    "vary": edit.vary,
    "again": again.run,
    "blend": blend.run,
    "batch": batch.run,
    "sheet": sheet.run,
    "control": control.run,
    "detect": detect.run,
    "doctor": doctor.run,
    "plan": plan.run,
    "serve": serve.run,
    "verify": verify.run,
}
"""First argument → what runs with the others; without one of these, all arguments are `run`'s."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    return run_command("car-run", dispatch, sys.argv[1:] if argv is None else list(argv))


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names."""
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    return run.run(arguments)
