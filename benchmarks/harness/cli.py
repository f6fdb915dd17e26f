"""How a benchmark's command runs: what it measured goes to stdout and into a file, all else to stderr.

def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.latency", parse_args(argv), measure, tables)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.harness.machine import BenchmarkError, emit
from car_runtime.errors import CarError

Log = Callable[[str], None]
"""Tells what is being done, with the time since the start."""
Record = dict[str, Any]


def run_command(
    name: str,
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Log], Record],
    tables: Callable[[Record], Iterable[str]],
    failures: Callable[[Record], Sequence[str]] | None = None,
) -> int:
    """Measure, print the tables and the record's line of JSON, append that to `args.output` if it is given.

    name: in messages. failures: of a record, what did not pass, a line each. The exit code: 0, 1 if anything did not
    pass, 2 for what `measure` raises on purpose and for what can't be written, 130 if it was interrupted.
    """
    began = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        with ExitStack() as stack:
            # Opened first: nobody wants to learn after the measurement that it can't be written.
            file = stack.enter_context(args.output.open("a", encoding="utf-8")) if args.output else None
            found = measure(args, log)
            for text in tables(found):
                print(f"\n{text}")
            print()
            emit(found)
            if file is not None:
                emit(found, file)
    except (BenchmarkError, CarError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was written", file=sys.stderr)
        return 130
    failed = failures(found) if failures is not None else ()
    for line in failed:
        print(f"{name}: failed: {line}", file=sys.stderr)
    return 1 if failed else 0
