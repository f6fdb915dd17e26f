"""`car-run doctor [PLAN]`: what this machine can run. The facts are found by `car_runtime.doctor`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from car_runtime.cli.options import plan_path, subcommand
from car_runtime.errors import printable_lines

ABOUT = "What this machine can run, what is missing, and how to install it."
EXAMPLES = """examples:
  car-run doctor               the backends of this machine
  car-run doctor d16.plan      also which of the plan's engines it can use, and the command that builds the others

exit code: 0 some backend works, 1 none does, 2 the arguments cannot be used
"""


def run(arguments: Sequence[str]) -> int:
    """The findings go to stdout. Exit code 1 where no backend works."""
    args = subcommand("doctor", ABOUT, EXAMPLES).parse_args(arguments)
    from car_runtime import doctor

    report = doctor.examine(None if args.plan is None else plan_path(args.plan))
    print(json.dumps(report) if args.json else printable_lines(doctor.table(report)), flush=True)
    return 0 if report["works"] else 1
