"""Readers of strangers' files under changed bytes: each input is taken, or refused by the reader's own error.

    python tests/fuzz/fuzz.py manifest --seconds 60

Coverage-guided by atheris (extra `fuzz`); the corpus is made from the shipped plan's files, a config and a model's
table of parameters. `parameters` is what the backend `amx` reads before its kernels see a plan.
"""

from __future__ import annotations

import argparse
import atexit
import json
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_instrumented: AbstractContextManager[Any] = nullcontext()
if __name__ == "__main__":  # as a test it needs no atheris
    import atheris

    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("", "runtime", "tests")]
    _instrumented = atheris.instrument_imports(
        include=["car_runtime.format", "car_runtime.backends.amx", "car_train.config"]
    )

with _instrumented:
    from car_runtime.backends.amx.description import UnsupportedGraphError
    from car_runtime.backends.amx.parameters import named_base, named_branch, named_decoder, named_encoder
    from car_runtime.errors import PlanError
    from car_runtime.format.goldens import GOLDENS, read_goldens
    from car_runtime.format.graph_check import Checked, check_graph
    from car_runtime.format.manifest import MANIFEST, REMEDY, WEIGHTS, parse_manifest, read_manifest
    from car_runtime.format.parameters import Parameters
    from car_runtime.format.schema import Parameter
    from car_runtime.format.typed_json import parse_json
    from car_runtime.plan import DEFAULT_PLAN
    from car_train.config import CARConfig, ConfigError, ModelConfig, VARConfig, VQVAEConfig

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


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _goldens(data: bytes) -> None:
    (_scratch() / GOLDENS).write_bytes(data)
    try:
        read_goldens(_scratch(), _PLAN)
    except PlanError as error:
        _refused(error)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a plan says of its parameters, and the sizes that the kernels are asked for."""

    depth: int
    width: int
    heads: int
    blocks: int
    fused: int
    latent_channels: int
    patch: int
    parameters: dict[str, Parameter]


@cache
def _weights() -> tuple[Path, bytes]:
    """A small model's weights, and its table as JSON."""
    from car_train.model import Model
    from fixtures.parameter_table import parameter_table

    vqvae = VQVAEConfig(sides=(1, 2), vocab=64, latent_channels=8, channels=8, multipliers=(1, 2), res_blocks=1)
    car = CARConfig(control_type="canny", encoder_widths=(8, 16), encoder_strides=(2,))
    model = Model(ModelConfig(vqvae=vqvae, var=VARConfig(depth=2, width=64, heads=2, classes=2), car=car))
    file = _scratch() / WEIGHTS
    entries = {name: asdict(entry) for name, entry in parameter_table(model, file).items()}
    sizes = {"depth": 2, "width": 64, "heads": 2, "blocks": 1, "fused": 1, "latent_channels": 8, "patch": 2}
    return file, json.dumps({**sizes, "parameters": entries}).encode()


def _parameters(data: bytes) -> None:
    try:
        table = parse_json(data, MANIFEST, REMEDY).read(Table)
    except (PlanError, ValueError):
        return
    whole = Parameters(table.parameters, _weights()[0])
    branch = whole.under("branches.a.")
    sizes = {"width": table.width, "heads": table.heads}
    _taken_or_refused(lambda: named_base(whole.under("base."), depth=table.depth, fused=table.fused, **sizes))
    _taken_or_refused(lambda: named_branch(branch, blocks=table.blocks, **sizes))
    _taken_or_refused(lambda: named_decoder(whole.under("vqvae."), table.latent_channels))
    _taken_or_refused(lambda: named_encoder(branch, table.width, table.patch))


def _taken_or_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except UnsupportedGraphError as error:
        _refused(error)


def _configs() -> list[bytes]:
    vqvae = VQVAEConfig(sides=(1, 2, 3, 4), vocab=64, channels=8, multipliers=(1, 2))
    return [ModelConfig(vqvae=vqvae, var=VARConfig(depth=2, classes=3)).to_json().encode()]


TARGETS = {
    "manifest": Target(lambda: [(DEFAULT_PLAN / MANIFEST).read_bytes()], _manifest),
    "config": Target(_configs, _config),
    "graph": Target(lambda: [(DEFAULT_PLAN / _PLAN.graphs["condition"].file).read_bytes()], _graph),
    "goldens": Target(lambda: [(DEFAULT_PLAN / GOLDENS).read_bytes()], _goldens),
    "parameters": Target(lambda: [_weights()[1]], _parameters),
}
_PIECES = (b"\xff" * 9, b"\0", b"9" * 5000, b"-1", b"1e999", b"null", b"[[[[", b'"', b"A" * 5000)


_VALUES = (0, -1, 1, 2, 3, 64, 2**31, 2**62, 10**30, 1.5, 1e308, "", "x", "A" * 5000, None, True, [], [0], [-1], {})


def changed(data: bytes, rng: random.Random) -> bytes:
    """The same with one to eight places overwritten, cut, lengthened or flipped; of JSON also values replaced."""
    if data[:1] == b"{" and rng.random() < 0.7:
        return _other_values(data, rng)
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


def _other_values(data: bytes, rng: random.Random) -> bytes:
    """JSON with one to three values replaced, taken away or swapped with a neighbour's."""
    whole = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder: Any = whole
        while True:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            inner = isinstance(holder[key], dict | list) and holder[key]
            if not inner or rng.random() < 0.1:
                break
            holder = holder[key]
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key], holder[other] = holder[other], holder[key]
        elif kind == 2 and type(holder[key]) is int:
            holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key]))
        else:
            holder[key] = rng.choice(_VALUES)
        if not whole:
            break
    return json.dumps(whole).encode()


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
