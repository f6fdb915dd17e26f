"""`car-run verify [PLAN]`: does a plan do here what it did when it was exported, and how fast?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from car_runtime.cli.errors import note
from car_runtime.cli.options import add_backend_flag, add_threads_flag, add_trust_flags, plan_path, subcommand
from car_runtime.cli.outputs import check_distinct

ABOUT = "Compare a plan on this machine with what PyTorch computed when it was exported, and measure it."
EXAMPLES = """examples:
  car-run verify                                          the plan that ships with the package
  car-run verify d16.plan --backend rtx -o report.json    a GPU's acceptance test (docs/verification.md)
  car-run verify d16.plan --batch 1,4 --runs 20 --json

exit code: 0 everything agrees, 1 something differs or fails, 2 the plan or the arguments cannot be used
"""


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = subcommand("verify", ABOUT, EXAMPLES)
    add_backend_flag(parser)
    parser.add_argument("--runs", type=int, metavar="N", help="measured images (default: 10 on a CPU, 100 on a GPU)")
    parser.add_argument("--warmup", type=int, metavar="N", help="images before (default: 3 on a CPU, 10 on a GPU)")
    parser.add_argument(
        "--batch", type=_integers, default=(1,), metavar="N,…", help="images at once to measure (default: 1)"
    )
    add_threads_flag(parser)
    add_trust_flags(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="JSON", help="write the report there")
    args = parser.parse_args(arguments)
    if args.output is not None and args.output.suffix.lower() != ".json":
        parser.error(f"the report is {str(args.output)!r}, but it is written as JSON; name it *.json")
    return args


def _integers(text: str) -> tuple[int, ...]:
    """`1,4` is (1, 4)."""
    return tuple(int(part) for part in text.split(","))


def run(arguments: Sequence[str]) -> int:
    """Table and progress go to stderr, the report to stdout as JSON. Exit code 1 where something differs."""
    args = parse_args(arguments)
    from car_runtime.format.manifest import MANIFEST
    from car_runtime.images import check_writable, write_files
    from car_runtime.verify import table, verify

    root = plan_path(args.plan)
    if args.output is not None:
        check_distinct([("-o", args.output)], [root / MANIFEST])
        check_writable(args.output)
    settings = {"threads": args.threads, "warmup": args.warmup, "runs": args.runs, "batches": args.batch}
    settings |= {"require_signature": args.require_signature, "trust_engines": args.trust_engines}
    report = verify(root, args.backend, **settings, log=_log)
    if args.output is not None:
        write_files({args.output: f"{json.dumps(report, allow_nan=False, ensure_ascii=False)}\n".encode()})
    note(table(report))
    text = json.dumps(report, allow_nan=False)
    print(text if args.json else args.output or ("passed" if report["passed"] else "failed"), flush=True)
    return 0 if report["passed"] else 1


def _log(line: str) -> None:
    note(f"car-run: {line}")
