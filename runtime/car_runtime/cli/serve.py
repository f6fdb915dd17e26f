"""`car-run serve`: the studio and the HTTP API, of the package `car_serve`, which the extra `serve` makes run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from car_runtime.cli.options import Parser, add_backend_flag, add_threads_flag, plan_path
from car_runtime.errors import RequestError

ABOUT = "Serve plans over HTTP: the studio in a browser, our own API with every scale, and OpenAI's images API."
EXAMPLES = """examples:
  car-run serve --open                                   the plan that ships with the package, in your browser
  car-run serve d16.plan --port 9000 --max-batch 8
  car-run serve d16.plan --host 0.0.0.0 --token-file token.txt    other machines, with a token
"""


def parse_args(arguments: Sequence[str]) -> Any:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run serve", ABOUT, EXAMPLES)
    parser.add_argument(
        "plans", nargs="*", metavar="PLAN", help="plan directories, or hf:ORG/NAME (default: the plan in the package)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="0 takes a free one (default: 8080)")
    add_backend_flag(parser)
    add_threads_flag(parser)
    parser.add_argument("--max-batch", type=int, default=4, metavar="N", help="images of one batch (default: 4)")
    parser.add_argument(
        "--batch-wait-ms", type=float, default=5.0, metavar="MS", help="wait that long for company (default: 5)"
    )
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    parser.add_argument("--rate", type=int, default=0, metavar="N", help="requests a minute and client; 0 = no limit")
    parser.add_argument("--token-file", metavar="FILE", help="token that requests must carry; needed beyond loopback")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of this host")
    parser.add_argument("--open", action="store_true", dest="browse", help="open the studio in a browser")
    parser.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    for name, low, high in (("port", 0, 65535), ("max_batch", 1, 1024), ("queue", 1, 100_000), ("rate", 0, 10**6)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be in {low}…{high}")
    if not 0 <= args.batch_wait_ms <= 10_000:
        parser.error(f"--batch-wait-ms is {args.batch_wait_ms}, but must be in 0…10000")
    return args


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it. Returns the exit code."""
    args = parse_args(arguments)
    try:
        server, limits = import_module("car_serve.server"), import_module("car_serve.limits")
    except ModuleNotFoundError as error:
        raise RequestError(
            f"serving needs {error.name!r}, which is not installed; pip install 'car-deploy[cpu,serve]'"
        ) from error
    server.serve(
        [str(plan_path(plan)) for plan in args.plans],
        host=args.host,
        port=args.port,
        backend=args.backend,
        threads=args.threads,
        limits=limits.Limits(
            queue=args.queue,
            max_batch=args.max_batch,
            batch_wait_ms=args.batch_wait_ms,
            rate_per_minute=args.rate,
        ),
        token=None if args.token_file is None else server.read_token(args.token_file),
        allow_hosts=args.allow_host,
        browse=args.browse,
    )
    return 0
