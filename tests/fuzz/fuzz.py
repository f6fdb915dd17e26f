"""Readers of strangers' files under changed bytes: each input is taken, or refused by the reader's own error.

    python tests/fuzz/fuzz.py manifest --seconds 60

Coverage-guided by atheris (extra `fuzz`); the corpus is made from the shipped plan's files and a config.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_instrumented: AbstractContextManager[Any] = nullcontext()
if __name__ == "__main__":  # as a test it needs no atheris
    import atheris

    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("", "runtime")]
    _instrumented = atheris.instrument_imports(include=["car_runtime.format", "car_train.config"])

with _instrumented:
    from car_runtime.errors import PlanError
    from car_runtime.format.graph_check import Checked, check_graph
    from car_runtime.format.manifest import MANIFEST, WEIGHTS, parse_manifest, read_manifest
    from car_runtime.plan import DEFAULT_PLAN
    from car_train.config import ConfigError, ModelConfig, VARConfig, VQVAEConfig

LONGEST = 2000
"""Characters of an error's message."""
_PLAN = read_manifest(DEFAULT_PLAN)


@dataclass(frozen=True)
class Target:
    """One reader: real inputs, and what reads one; anything that it raises is a fault."""

    corpus: Callable[[], list[bytes]]
    read: Callable[[bytes], object]


def _refused(error: Exception) -> None:
    if len(str(error)) > LONGEST:
        raise ValueError("a message of any length") from error


def _manifest(data: bytes) -> None:
    try:
        parse_manifest(data)
    except PlanError as error:
        _refused(error)


def _config(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:  # the caller's to refuse
        return
    try:
        ModelConfig.from_json(text)
    except ConfigError as error:
        _refused(error)


def _graph(data: bytes) -> None:
    try:
        check_graph(data, _PLAN.graphs["condition"], _PLAN.files[WEIGHTS].bytes, Checked())
    except PlanError as error:
        _refused(error)


def _configs() -> list[bytes]:
    vqvae = VQVAEConfig(sides=(1, 2, 3, 4), vocab=64, channels=8, multipliers=(1, 2))
    return [ModelConfig(vqvae=vqvae, var=VARConfig(depth=2, classes=3)).to_json().encode()]


TARGETS = {
    "manifest": Target(lambda: [(DEFAULT_PLAN / MANIFEST).read_bytes()], _manifest),
    "config": Target(_configs, _config),
    "graph": Target(lambda: [(DEFAULT_PLAN / _PLAN.graphs["condition"].file).read_bytes()], _graph),
}
_PIECES = (b"\xff" * 9, b"\0", b"9" * 5000, b"-1", b"1e999", b"null", b"[[[[", b'"', b"A" * 5000)


def changed(data: bytes, rng: random.Random) -> bytes:
    """The same with one to eight places overwritten, cut, lengthened or flipped, by what hurts."""
    now = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, piece, kind = rng.randrange(len(now) + 1), rng.choice(_PIECES), rng.randrange(4)
        if kind == 0:
            now[at : at + len(piece)] = piece
        elif kind == 1:
            now[at:at] = piece
        elif kind == 2:
            del now[at : at + rng.randrange(1, 40)]
        elif at < len(now):
            now[at] ^= 1 << rng.randrange(8)
    return bytes(now)


def main() -> None:
    """Fuzz one reader for some seconds; libFuzzer ends with an exit code of its own where it finds a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(target.corpus()):
            (Path(folder) / str(i)).write_bytes(data)
        options = [f"-max_total_time={arguments.seconds}", "-max_len=400000", "-timeout=10", "-rss_limit_mb=2000"]
        atheris.Setup([sys.argv[0], *options, folder], target.read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
