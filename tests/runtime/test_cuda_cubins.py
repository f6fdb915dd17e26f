"""The compiled kernels that come with the package: what their files say, and what is said of them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from car_kernels.build import waits
from car_kernels.variants import SHARED_LIMITS, TARGETS, variants
from car_runtime.backends.cuda import kernels as cuda
from car_runtime.backends.cuda.kernels import kernels, launch, markdown_table, read_cubins
from car_runtime.errors import BackendError, RunError

ROOT = Path(__file__).resolve().parents[2]
TARGET_NAMES = [f"sm{number}" for number in TARGETS]
SPILLS = {("draw.v16384", "sm120"): 22, ("smooth.v16384", "sm90"): 26, ("smooth.v16384", "sm80"): 10}
SPILLS |= {("smooth.v16384", "sm86"): 2, ("smooth.v16384", "sm89"): 2}
"""Instructions that spill: of the largest vocabulary, where a thread has 64 or 128 registers."""
NO_WHOLE_LOADS = ("draw.v512", "smooth", "upsample", "downsample", "accumulate", "residual", "nearest")
NO_WHOLE_LOADS += ("channels_last", "from_pixels", "to_pixels", "group_affine")
"""Kernels of small or scattered data: channels last, any vocabulary, f̂'s sides."""


def sections(cubin: bytes) -> dict[str, bytes]:
    """An ELF file's sections by name."""
    at, count, names = struct.unpack_from("<Q", cubin, 40)[0], *struct.unpack_from("<HH", cubin, 60)
    heads = [struct.unpack_from("<IIQQQQIIQQ", cubin, at + 64 * i) for i in range(count)]
    text, found = heads[names][4], {}
    for head in heads:
        name = text + head[0]
        found[cubin[name : cubin.index(b"\0", name)].decode()] = cubin[head[4] : head[4] + head[5]]
    return found


def attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes with values of a section `.nv.info`: number, value."""
    at = 0
    while at < len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        if form == 4:
            yield attribute, info[at + 4 : at + 4 + length]
        at += 4 + (length if form == 4 else 0)


REGCOUNT, PARAMETER, PARAMETER_2 = 0x2F, 0x17, 0x45


def test_kernels_are_described_as_they_are_written() -> None:
    assert {name: (k.arguments, k.constants, k.multiples, k.product) for name, k in kernels().items()} == {
        name: (v.arguments, v.constants, frozenset(v.multiples), v.product) for name, v in variants().items()
    }


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_every_cubin_is_for_its_target_and_uses_what_is_stated(target: str) -> None:
    code = read_cubins(target)
    assert (cuda.FOLDER / f"{target}.xz").stat().st_size < 2 * 2**20
    for name, cubin in code.items():
        binary = kernels()[name].targets[target]
        assert cubin[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", cubin, 18) == (190,)  # EM_CUDA
        (flags,) = struct.unpack_from("<I", cubin, 48)
        assert (flags >> 8 if cubin[8] > 7 else flags) & 0xFF == int(target[2:])
        assert binary.symbol == kernels()[name].kernel
        parts = sections(cubin)
        assert parts[f".text.{binary.symbol}"]
        (used,) = [value for number, value in attributes(parts[".nv.info"]) if number == REGCOUNT]
        assert struct.unpack("<II", used)[1] == binary.registers, name
        taken = attributes(parts[f".nv.info.{binary.symbol}"])
        found = sorted(struct.unpack("<IHHI", v)[1:] for n, v in taken if n in (PARAMETER, PARAMETER_2))
        sizes = [packed >> 18 for _, _, packed in found]
        # Two addresses of scratch memory follow, which the runtime gives as 0.
        assert sizes == [*(4 if kind == "i32" else 8 for kind in kernels()[name].arguments.values()), 8, 8], name


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_no_kernel_spills_and_products_are_on_the_tensor_cores(target: str) -> None:
    for name, kernel in kernels().items():
        binary = kernel.targets[target]
        assert binary.shared <= SHARED_LIMITS[int(target[2:])], name
        assert binary.threads * binary.registers <= 65536, name  # what a multiprocessor has
        assert binary.spills == SPILLS.get((name, target), 0), name
        assert (binary.stack == 0) == (binary.spills == 0), name
        assert (binary.tensor > 0) == kernel.product, name
        assert binary.waits == (target in ("sm90", "sm120")), name
        if not name.startswith(NO_WHOLE_LOADS):
            assert binary.loads_16 > 0, name
        if kernel.product and kernel.kernel != "embed":
            assert binary.loads_16 > binary.loads / 3, name  # the others: biases, a number for a row


@pytest.mark.parametrize(
    ("code", "good"),
    [
        ("ULDC S2R PREEXIT ACQBULK LDG.E.128 STG.E", True),
        ("ULDC LDG.E.128 ACQBULK STG.E", False),
        ("ULDC LDGSTS.E ACQBULK", False),
        ("ULDC BRA ACQBULK LDG.E", False),
        ("ULDC LDG.E", False),
    ],
)
def test_a_kernel_that_starts_early_waits_before_it_touches_memory(code: str, good: bool) -> None:
    assert waits(code.split()) == good


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "backends" / "cuda.md").read_text(encoding="utf-8")
    assert markdown_table() in page, "run: python -m car_runtime.backends.cuda.kernels"


def test_an_unknown_target_and_a_damaged_file_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no kernels for sm75 \(only for sm80, .*sm120\); use --backend ort-cuda"):
        read_cubins("sm75")
    for file in cuda.FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "sm89.xz").write_bytes((tmp_path / "sm90.xz").read_bytes())
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    with pytest.raises(BackendError, match="is damaged; install car-deploy again"):
        read_cubins("sm89")
    (tmp_path / "sm89.xz").write_bytes((tmp_path / "sm90.xz").read_bytes()[:1000])
    with pytest.raises(BackendError, match=r"for sm89 cannot be read \(.*\); install car-deploy again"):
        read_cubins("sm89")
    (tmp_path / "sm89.xz").unlink()
    with pytest.raises(BackendError, match=r"for sm89 cannot be read \(.*\); install car-deploy again"):
        read_cubins("sm89")


def test_a_launch_keeps_what_the_compiler_was_promised() -> None:
    good = dict.fromkeys(kernels()["ln_mod.row"].arguments, 32)
    assert launch("ln_mod.row", (3,), **good).grid == (3, 1, 1)
    for broken in ({"x": 8}, {"C": 40}, {"R": 2**31}):
        with pytest.raises(AssertionError):
            launch("ln_mod.row", (3,), **good | broken)
    assert launch("ln_mod.row", (2**20, 65535), **good).grid == (2**20, 65535, 1)
    for grid in ((1, 65536), (1, 1, 65536)):
        with pytest.raises(RunError, match="ln_mod on 65536 tiles is too large for a GPU; give fewer or smaller"):
            launch("ln_mod.row", grid, **good)


def check_build(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "export")}
    command = [sys.executable, "-m", "car_kernels.build", "--check", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kernel_compiles_to_the_same_bytes_again() -> None:
    assert check_build("--only", "fusion_round", "--targets", "80,120") == "4 of 4 cubins are the ones in the tree\n"


@pytest.mark.slow
def test_all_kernels_compile_to_the_same_bytes_again() -> None:
    assert check_build() == f"{len(kernels()) * 5} of {len(kernels()) * 5} cubins are the ones in the tree\n"
