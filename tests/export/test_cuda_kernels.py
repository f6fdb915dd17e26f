"""The `cuda` backend's kernels against float64 numpy: in Triton's interpreter on the fake GPU, and on a real one.

On the fake one every access is checked (fixtures/kernel_device.py). The interpreter computes a kernel's own
arithmetic: factors in half precision, float32 sums, the rounding where a result is stored. What differs on a GPU is
the order inside a tile. `make test-gpu` runs the compiled kernels there, against the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from car_kernels.variants import EPS, variants
from car_runtime.backends.cuda.buffers import DeviceArray, Memory
from car_runtime.backends.cuda.driver import CudaDevice
from car_runtime.backends.cuda.kernels import read_cubins
from car_runtime.errors import BackendError
from car_train.model.sample import draw_kept, keep_top, smooth_codes
from fixtures.fake_device import DeviceFault
from fixtures.kernel_device import KernelDevice, from_bf16, to_bf16

VARIANTS = variants()
ROUNDING = 2e-3
"""Largest error as a share of the largest value: fp16 keeps 11 bits (4.9e-4), twice in a chain of two products."""
SUMS = 2e-6
"""The same where inputs are exact and the result is float32."""
CUT_OFF = 2e-5
"""The least that is tolerated on a GPU: its tensor cores cut off each of a row's hundreds of sums, all downwards."""


@cache
def real_device() -> CudaDevice:
    """The GPU with the compiled kernels; skips where there is none."""
    try:
        device = CudaDevice()
    except BackendError as error:
        pytest.skip(f"there is no GPU to test on: {error}")
    device.load_kernels(read_cubins(device.gpu.target))
    return device


class Gpu:
    """A GPU with kernels, and arrays on it. What tests have in float16 is bf16 for those of that."""

    def __init__(self, bf16: bool = False, real: bool = False) -> None:
        self.bf16, self.real = bf16, real
        self.device: Any = real_device() if real else KernelDevice()
        self.memory = Memory(self.device)
        self.rng = np.random.default_rng(0)
        self._kept: list[DeviceArray] = []

    def up(self, values: np.ndarray) -> DeviceArray:
        dtype = values.dtype.name
        if dtype == "float16" and self.bf16:
            values, dtype = to_bf16(values.astype(np.float32)), "bfloat16"
        array = self.memory.allocate(values.shape, dtype)
        self.memory.write(array, np.ascontiguousarray(values))
        return array

    def half(self, x: np.ndarray) -> np.ndarray:
        """Rounded to half precision, as float64."""
        if not self.bf16:
            return x.astype(np.float16).astype(np.float64)
        rounded = from_bf16(to_bf16(x.astype(np.float32))).astype(np.float64)
        return np.where(np.abs(rounded) < 2.0**-14, 0.0, rounded)  # what is exact in fp16 too

    def check(self, got: np.ndarray, want: np.ndarray, tolerance: float = ROUNDING) -> None:
        assert got.shape == want.shape
        tolerance = max(tolerance, CUT_OFF) if self.real else tolerance
        tolerance *= 8 if self.bf16 and tolerance == ROUNDING else 1  # 8 bits, not 11
        error = np.abs(got.astype(np.float64) - want).max()
        assert error <= tolerance * np.abs(want).max(), f"{error:.2e} of {np.abs(want).max():.3g}"

    def normal(self, *shape: int, size: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
        values = self.rng.normal(size=shape) * size
        return (self.half(values) if dtype == np.float16 else values).astype(dtype)

    def empty(self, *shape: int, dtype: str = "float32") -> DeviceArray:
        return self.memory.allocate(shape, "bfloat16" if self.bf16 and dtype == "float16" else dtype)

    def run(self, name: str, grid: tuple[int, ...], /, **arguments: Any) -> None:
        name = f"{name}.bf16" if self.bf16 and f"{name}.bf16" in VARIANTS else name
        variant = VARIANTS[name]
        values = []
        for argument in variant.arguments:
            value = arguments.pop(argument)
            value = self.up(value) if isinstance(value, np.ndarray) else value
            self._kept.append(value)
            values.append(value.address if isinstance(value, DeviceArray) else value)
        assert not arguments, f"{name} has no argument {list(arguments)}"
        self.device.put_kernel(name, (*grid, 1, 1)[:3], values)

    def tiles(self, name: str, M: int, N: int) -> tuple[int, int]:
        constants = VARIANTS[name].constants
        return -(-N // constants["BN"]), -(-M // constants["BM"])

    def read(self, array: DeviceArray) -> np.ndarray:
        values = self.memory.read(array)
        return from_bf16(values) if array.dtype == "bfloat16" else values

    def read_part(self, array: DeviceArray) -> np.ndarray:
        """float32 of which only a part was written."""
        if self.real:
            return self.memory.read(array)
        self.device.synchronize()
        content = self.device.blocks[array.address].content
        return content[: array.nbytes].view(np.float32).reshape(array.shape)


def _which(bf16: bool, real: bool, *marks: Any) -> Any:
    return pytest.param((bf16, real), marks=marks, id=f"{'bf16' if bf16 else 'fp16'}{'-on a GPU' if real else ''}")


@pytest.fixture(
    params=[
        _which(False, False),
        _which(True, False, pytest.mark.slow),
        _which(False, True, pytest.mark.gpu),
        _which(True, True, pytest.mark.gpu),
    ]
)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    made = Gpu(*request.param)
    yield made
    made.memory.close()


def norm(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)


def gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


# (tokens, rows, width): one row and less than a tile, tiles and a rest, widths that are no multiple of any tile.
FEW = [(1, 2, 96), (7, 3, 160)]
MORE = [(1, 1, 32), (33, 2, 64), (4, 1, 256), (25, 2, 192), (64, 4, 128), (17, 6, 1088)]
SHAPES = [*FEW, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in MORE)]
SIZES = ["s", "m", "l"]


def modulation(gpu: Gpu, R: int, C: int) -> tuple[np.ndarray, DeviceArray]:
    """f32 [R, 6, C], as a block's rows of AdaLN lie."""
    values = gpu.normal(R, 6, C, size=0.4)
    return values, gpu.up(values)


def at_row(array: DeviceArray, row: int) -> int:
    return array.address + 4 * row * array.shape[2]


@pytest.mark.parametrize(("tokens", "R", "C"), SHAPES)
def test_the_norm_is_modulated_per_guidance_row(gpu: Gpu, tokens: int, R: int, C: int) -> None:
    M = tokens * R
    x, (mod, mods) = gpu.normal(M, C, size=3), modulation(gpu, R, C)
    out = gpu.empty(M, C, dtype="float16")
    gpu.run(
        "ln_mod.row", (M,), x=x, scale=at_row(mods, 2), shift=at_row(mods, 4), out=out, C=C, R=R, mod_stride=6 * C
    )
    r = np.arange(M) % R
    gpu.check(gpu.read(out), norm(x) * (1.0 + mod[r, 2]) + mod[r, 4])


@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("kernel", ["ln_qkv.s", "qkv.s", "qkv.m", "qkv.l"])
@pytest.mark.parametrize(("tokens", "R", "C"), SHAPES)
def test_queries_keys_and_values_go_to_their_places(
    gpu: Gpu, tokens: int, R: int, C: int, D: int, kernel: str
) -> None:
    C, name = -(-C // D) * D, f"{kernel}.d{D}"
    M, H, past = tokens * R, C // D, 5
    x, (mod, mods) = gpu.normal(M, C, size=3), modulation(gpu, R, C)
    w = gpu.normal(C, 3 * C, size=C**-0.5, dtype=np.float16)
    q_bias, v_bias = gpu.normal(C, dtype=np.float16), gpu.normal(C, dtype=np.float16)
    log_scale = gpu.half(np.linspace(1, 5, H)).astype(np.float16)  # the last one is above ln 100
    q = gpu.empty(M, C, dtype="float16")
    k, v = (gpu.empty(past + tokens, R, C, dtype="float16") for _ in "kv")
    r = np.arange(M) % R
    h = gpu.half(norm(x) * (1.0 + mod[r, 2]) + mod[r, 4])
    common = {"w": w, "q_bias": q_bias, "v_bias": v_bias, "log_scale": log_scale, "q": q, "M": M, "C": C}
    common |= {"k_slot": k[past:], "v_slot": v[past:]}
    grid = (3 * H, -(-M // VARIANTS[name].constants["BM"]))
    if kernel == "ln_qkv.s":
        rows = {"scale": at_row(mods, 2), "shift": at_row(mods, 4), "R": R, "mod_stride": 6 * C}
        gpu.run(name, grid, x=x, **rows, **common)
    else:
        gpu.run(name, grid, a=h.astype(np.float16), **common)
    y = h @ w.astype(np.float64)
    parts = y[:, :C] + q_bias, y[:, C : 2 * C], y[:, 2 * C :] + v_bias

    def unit(part: np.ndarray) -> np.ndarray:
        heads = part.reshape(M, H, D)
        return heads / np.linalg.norm(heads, axis=-1, keepdims=True)

    temperature = np.exp(np.minimum(log_scale.astype(np.float64), np.log(100)))
    gpu.check(gpu.read(q).reshape(M, H, D), unit(parts[0]) * temperature[:, None])
    gpu.check(gpu.read(k[past:]).reshape(M, H, D), unit(parts[1]))
    gpu.check(gpu.read(v[past:]).reshape(M, C), parts[2])
    if not gpu.real:  # the past is nobody's to write
        with pytest.raises(DeviceFault, match="before all of them were written"):
            gpu.read(k)


@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.parametrize(
    ("tokens", "past", "R", "H"),
    [(1, 0, 1, 1), (4, 1, 2, 3), (25, 30, 2, 2), pytest.param(100, 155, 3, 2, marks=pytest.mark.slow)],
)
def test_attention_sees_the_past_and_the_whole_scale(
    gpu: Gpu, tokens: int, past: int, R: int, H: int, D: int, size: str
) -> None:
    C, T = H * D, past + tokens
    q = gpu.normal(tokens * R, C, size=2, dtype=np.float16)
    k, v = gpu.normal(T, R, C, size=D**-0.5, dtype=np.float16), gpu.normal(T, R, C, dtype=np.float16)
    out = gpu.empty(tokens * R, C, dtype="float16")
    name = f"attention.{size}.d{D}"
    grid = (R * H, -(-tokens // VARIANTS[name].constants["BM"]))
    gpu.run(name, grid, q=q, k=k, v=v, out=out, tokens=tokens, past=past, C=C, R=R)
    heads = (a.astype(np.float64).reshape(-1, R, H, D) for a in (q, k, v))
    queries, keys, values = heads
    scores = np.einsum("nrhd,trhd->rhnt", queries, keys)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    gpu.check(gpu.read(out), np.einsum("rhnt,trhd->nrhd", p, values).reshape(-1, C))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tokens", "R", "C"), SHAPES)
def test_a_gated_product_is_added_to_the_stream(
    gpu: Gpu, tokens: int, R: int, C: int, size: str, in_place: bool
) -> None:
    M, K = tokens * R, 2 * C
    mod, mods = modulation(gpu, R, C)
    a, w = gpu.normal(M, K, dtype=np.float16), gpu.normal(K, C, size=K**-0.5, dtype=np.float16)
    bias, x = gpu.normal(C, dtype=np.float16), gpu.normal(M, C, size=3)
    stream = gpu.up(x)
    out = stream if in_place else gpu.empty(M, C)
    name, sizes = f"gate.{size}", {"M": M, "C": C, "K": K, "R": R, "mod_stride": 6 * C}
    gpu.run(name, gpu.tiles(name, M, C), a=a, w=w, bias=bias, gamma=at_row(mods, 1), x=stream, out=out, **sizes)
    want = x + mod[np.arange(M) % R, 1] * (a.astype(np.float64) @ w.astype(np.float64) + bias)
    gpu.check(gpu.read(out), want, SUMS)


@pytest.mark.parametrize("kernel", ["ln_gelu.s", "gelu.s", "gelu.m", "gelu.l"])
@pytest.mark.parametrize(("tokens", "R", "C"), SHAPES)
def test_the_hidden_layer_is_gelu_of_a_product(gpu: Gpu, tokens: int, R: int, C: int, kernel: str) -> None:
    M, N = tokens * R, 3 * C
    x, (mod, mods) = gpu.normal(M, C, size=3), modulation(gpu, R, C)
    w, bias = gpu.normal(C, N, size=C**-0.5, dtype=np.float16), gpu.normal(N, dtype=np.float16)
    out = gpu.empty(M, N, dtype="float16")
    r = np.arange(M) % R
    h = gpu.half(norm(x) * (1.0 + mod[r, 2]) + mod[r, 4])
    common = {"w": w, "bias": bias, "out": out, "M": M, "N": N}
    if kernel == "ln_gelu.s":
        rows = {"scale": at_row(mods, 2), "shift": at_row(mods, 4), "C": C, "R": R, "mod_stride": 6 * C}
        gpu.run(kernel, gpu.tiles(kernel, M, N), x=x, **rows, **common)
    else:
        gpu.run(kernel, gpu.tiles(kernel, M, N), a=h.astype(np.float16), K=C, **common)
    gpu.check(gpu.read(out), gelu(h @ w.astype(np.float64) + bias))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 16, 32), (34, 48, 96), pytest.param(130, 272, 160, marks=pytest.mark.slow)]
)
def test_logits_are_a_product_in_float32(gpu: Gpu, M: int, N: int, K: int, size: str) -> None:
    a, w = gpu.normal(M, K, dtype=np.float16), gpu.normal(K, N, size=K**-0.5, dtype=np.float16)
    bias, out, name = gpu.normal(N, dtype=np.float16), gpu.empty(M, N), f"head.{size}"
    gpu.run(name, gpu.tiles(name, M, N), a=a, w=w, bias=bias, out=out, M=M, N=N, K=K)
    gpu.check(gpu.read(out), a.astype(np.float64) @ w.astype(np.float64) + bias, SUMS)


class Fusion:
    """x, and c of some branches: each branch's lies further on than the M rows of one fused block."""

    def __init__(self, gpu: Gpu, tokens: int, R: int, C: int, branches: int) -> None:
        M, fused = tokens * R, 2
        x, c = gpu.normal(M, C, size=3), gpu.normal(branches, fused, M, C, size=2)
        mix, keep = gpu.normal(branches, R), gpu.normal(R)
        self.x, self.c = x.astype(np.float64), c[:, 1].astype(np.float64)
        self.stream, self._every = gpu.up(x), gpu.up(c)
        self.address = self._every.address + 4 * M * C  # the second fused block's
        self.shares = {"mix": mix, "keep": keep}
        self.strided = {"C": C, "c_stride": fused * M * C}
        r = np.arange(M) % R
        self.mix, self.keep = mix[:, r, None], keep[r, None]


@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.parametrize("kind", ["concat", "zero"])
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize(("tokens", "R", "C"), FEW)
def test_branches_are_mixed_where_they_are_fused(
    gpu: Gpu, tokens: int, R: int, C: int, branches: int, kind: str, size: str
) -> None:
    """x ← keep·x + Σ mixᵢ·𝓖ᵢ(x, cᵢ)."""
    M, K, fusion = tokens * R, 2 * C if kind == "concat" else C, Fusion(gpu, tokens, R, C, branches)
    weight, beta = gpu.normal(branches, 2 * C), gpu.normal(branches, 2 * C)
    w, bias = gpu.normal(branches, K, C, size=K**-0.5, dtype=np.float16), gpu.normal(branches, C, dtype=np.float16)
    h = gpu.empty(branches, M, K, dtype="float16")
    strided = {"c": fusion.address, "out": h, "M": M, **fusion.strided}
    if kind == "concat":
        gpu.run("fusion_norm.row", (M, branches), x=fusion.stream, weight=weight, bias=beta, **strided)
    else:
        gpu.run("fusion_round.row", (M, branches), **strided)
    name, sizes = f"fuse.{size}", {"M": M, "C": C, "K": K, "R": R, "branches": branches, "adds": int(kind == "zero")}
    arrays = {"h": h, "w": w, "bias": bias, "x": fusion.stream, **fusion.shares}
    gpu.run(name, gpu.tiles(name, M, C), **arrays, **sizes)
    want = fusion.keep * fusion.x
    for i, c in enumerate(fusion.c):
        hidden = (
            gpu.half(norm(np.concatenate([fusion.x, c], -1)) * weight[i] + beta[i])
            if kind == "concat"
            else gpu.half(c)
        )
        gpu.check(gpu.read(h)[i], hidden)
        added = fusion.x if kind == "zero" else 0
        want += fusion.mix[i] * (added + hidden @ w[i].astype(np.float64) + bias[i])
    gpu.check(gpu.read(fusion.stream), want)


@pytest.mark.parametrize(("tokens", "R", "C", "branches"), [(3, 2, 96, 1), (4, 1, 1120, 3)])
def test_cross_normalisation_takes_the_streams_moments(gpu: Gpu, tokens: int, R: int, C: int, branches: int) -> None:
    fusion, M = Fusion(gpu, tokens, R, C, branches), tokens * R
    gain = gpu.normal(branches, C, dtype=np.float16)
    arrays = {"x": fusion.stream, "c": fusion.address, "gain": gain, **fusion.shares}
    gpu.run("cross_norm.row", (M,), **arrays, R=R, branches=branches, **fusion.strided)
    mean = fusion.x.mean(-1, keepdims=True)
    deviation = np.sqrt(((fusion.x - mean) ** 2).mean(-1, keepdims=True) + EPS)
    every = fusion.x + gain[:, None].astype(np.float64) * (norm(fusion.c) * deviation + mean)
    gpu.check(gpu.read(fusion.stream), fusion.keep * fusion.x + (fusion.mix * every).sum(0), 5 * SUMS)


@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.parametrize(("S", "R", "C"), [(1, 1, 32), (3, 4, 96), pytest.param(7, 2, 160, marks=pytest.mark.slow)])
def test_a_branch_takes_in_neighbours_control_and_position(gpu: Gpu, S: int, R: int, C: int, size: str) -> None:
    B = max(R // 2, 1)
    x, control, pos = gpu.normal(R, S, S, C), gpu.normal(B, S * S, C), gpu.normal(S * S, C)
    kernel = gpu.normal(3, 3, C, C, size=(9 * C) ** -0.5, dtype=np.float16)  # tap, tap, in, out
    bias, image, out = gpu.normal(C, dtype=np.float16), np.arange(R) % B, gpu.empty(S * S * R, C)
    name = f"inject.{size}"
    w = kernel.reshape(9 * C, C)
    arrays = {"x": x, "w": w, "bias": bias, "control": control, "image": image, "pos": pos, "out": out}
    gpu.run(name, gpu.tiles(name, S * S * R, C), **arrays, S=S, C=C, R=R)
    padded = np.pad(gpu.half(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(padded[:, i : i + S, j : j + S], kernel[i, j].astype(np.float64)) for i in range(3) for j in range(3)]
    conv = sum(part @ matrix for part, matrix in taps) + bias
    want = conv.reshape(R, S * S, C) + control[image] + pos
    gpu.check(gpu.read(out), want.transpose(1, 0, 2).reshape(-1, C), SUMS)


def test_positions_are_added_and_tokens_come_first(gpu: Gpu) -> None:
    tokens, R, C = 7, 3, 1056
    x, pos, out = gpu.normal(R, tokens, C), gpu.normal(tokens, C), gpu.empty(tokens * R, C)
    gpu.run("add_position.row", (tokens * R,), x=x, pos=pos, out=out, tokens=tokens, C=C, R=R)
    np.testing.assert_array_equal(gpu.read(out), (x + pos).transpose(1, 0, 2).reshape(-1, C))


@pytest.mark.parametrize(("T", "R", "Z", "C"), [(1, 1, 8, 32), (3, 4, 32, 96), (5, 2, 40, 160)])
def test_the_next_tokens_are_embedded_for_each_row(gpu: Gpu, T: int, R: int, Z: int, C: int) -> None:
    B = max(R // 2, 1)
    a, w = gpu.normal(B, T * T, Z, dtype=np.float16), gpu.normal(Z, C, dtype=np.float16)
    bias, image, out = gpu.normal(C, dtype=np.float16), np.arange(R) % B, gpu.empty(R * T * T, C)
    name, M = "embed.s", R * T * T
    gpu.run(name, gpu.tiles(name, M, C), a=a, w=w, bias=bias, image=image, out=out, M=M, T=T, C=C, Z=Z)
    want = a[image].astype(np.float64) @ w.astype(np.float64) + bias
    gpu.check(gpu.read(out), want.reshape(M, C), SUMS)


# -- the class, and feature maps ----------------------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(
    ("R", "C", "N"), [(1, 32, 64), (5, 96, 192), pytest.param(18, 160, 320, marks=pytest.mark.slow)]
)
def test_modulation_is_a_product_with_the_class(gpu: Gpu, R: int, C: int, N: int, offsets: bool) -> None:
    embedding, label = gpu.normal(9, C, dtype=np.float16), gpu.rng.integers(0, 9, R)
    w, bias = gpu.normal(C, N, size=C**-0.5, dtype=np.float16), gpu.normal(N, dtype=np.float16)
    offset, out = gpu.normal(N, dtype=np.float16), gpu.empty(R, 3, N)
    sizes = {"R": R, "N": N, "K": C, "out_stride": 3 * N, "offsets": int(offsets)}
    arrays = {"label": label, "embedding": embedding, "w": w, "bias": bias, "offset": offset if offsets else 0}
    gpu.run("condition.s", gpu.tiles("condition.s", R, N), out=out.address + 4 * N, **arrays, **sizes)
    want = (
        gpu.half(silu(embedding[label].astype(np.float64))) @ w.astype(np.float64) + bias + (offset if offsets else 0)
    )
    gpu.check(gpu.read_part(out)[:, 1], want)


def test_start_tokens_are_the_class_and_where_it_stands(gpu: Gpu) -> None:
    embedding, first, out = (
        gpu.normal(4, 1056, dtype=np.float16),
        gpu.normal(1056, dtype=np.float16),
        gpu.empty(3, 1056),
    )
    gpu.run("start.row", (3,), label=np.array([3, 0, 3]), embedding=embedding, first=first, out=out, C=1056)
    total = embedding[[3, 0, 3]].astype(np.float32) + first.astype(np.float32)
    np.testing.assert_array_equal(gpu.read(out), gpu.half(total))


def stored(channels: int) -> int:
    return -(-channels // 16) * 16


def as_rows(maps: list[np.ndarray]) -> np.ndarray:
    """Maps [side, side, C] row after row, with zeros in the channels that are stored but do not count."""
    flat = np.concatenate([m.reshape(-1, m.shape[-1]) for m in maps])
    return np.pad(flat, ((0, 0), (0, stored(flat.shape[1]) - flat.shape[1])))


def convolved(x: np.ndarray, w: np.ndarray, stride: int = 1, lead: int = 1, doubled: bool = False) -> np.ndarray:
    """[side, side, K] by w [reach, reach, K, N] in float64."""
    x = x.astype(np.float64)
    x = x.repeat(2, 0).repeat(2, 1) if doubled else x
    side, reach = (len(x) - 1) // stride + 1, len(w)
    padded = np.pad(x, ((lead, reach), (lead, reach), (0, 0)))
    last = stride * (side - 1) + 1
    taps = ((i, j) for i in range(reach) for j in range(reach))
    return sum(padded[i : i + last : stride, j : j + last : stride] @ w[i, j].astype(np.float64) for i, j in taps)


CONVOLUTIONS = [
    ({}, (3, 5), 8, 40),
    ({"reach": 1}, (4,), 40, 8),
    ({"stride": 2, "silu": True}, (4, 7), 3, 16),
    ({"stride": 2, "lead": 0}, (6, 6), 16, 16),
    ({"doubled": True, "adds": True}, (3, 3), 24, 20),
    pytest.param({"adds": True, "silu": True}, (17, 2), 72, 136, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("size", [*SIZES, "wide.s", "wide.m"])
@pytest.mark.parametrize(("how", "sides", "K", "N"), CONVOLUTIONS)
def test_convolutions_of_several_maps(
    gpu: Gpu, how: dict[str, Any], sides: tuple[int, ...], K: int, N: int, size: str
) -> None:
    wide = size.startswith("wide")
    if wide and {"silu", "adds", "doubled"} & how.keys():
        pytest.skip("the last layer of a control encoder has none of these")
    reach, stride = how.get("reach", 3), how.get("stride", 1)
    lead, doubled = how.get("lead", reach // 2), how.get("doubled", False)
    maps = [gpu.normal(side, side, K, dtype=np.float16) for side in sides]
    w = gpu.normal(reach, reach, K, N, size=(reach * reach * K) ** -0.5, dtype=np.float16)
    bias = np.pad(gpu.normal(N, dtype=np.float16), (0, stored(N) - N))
    wants = [convolved(m, w, stride, lead, doubled) + bias[:N] for m in maps]
    outs = [len(want) for want in wants]
    firsts = [np.cumsum([0, *(s * s for s in each)])[:-1] for each in (outs, sides)]
    places = np.stack([firsts[0], outs, firsts[1], sides], 1).astype(np.int32)
    matrix = np.pad(w, ((0, 0), (0, 0), (0, stored(K) - K), (0, stored(N) - N))).reshape(-1, stored(N))
    rows = sum(side * side for side in outs)
    out = gpu.empty(rows, stored(N), dtype="float32" if wide else "float16")
    name = f"conv_{size}" if wide else f"conv.{size}"
    tile = VARIANTS[name].constants
    grid = (-(-stored(N) // tile["BN"]), -(-(max(outs) ** 2) // tile["BM"]), len(sides))
    arrays = {"a": as_rows(maps), "w": matrix, "bias": bias, "out": out, "maps": places}
    sizes = {"K": stored(K), "N": stored(N), "reach": reach, "lead": lead, "stride": stride}
    x = gpu.normal(rows, stored(N), dtype=np.float16)
    if not wide:
        arrays["x"] = x if "adds" in how else 0
        sizes |= {name: int(how.get(name, False)) for name in ("doubled", "silu", "adds")}
    gpu.run(name, grid, **arrays, **sizes)
    want = np.concatenate([each.reshape(-1, N) for each in wants])
    want = silu(want) if how.get("silu") else want
    got = gpu.read(out)
    gpu.check(got[:, :N], want + x[:, :N] if "adds" in how else want, SUMS if wide else ROUNDING)


@pytest.mark.parametrize(
    ("side", "channels"), [(1, 40), (3, 8), (17, 96), pytest.param(33, 640, marks=pytest.mark.slow)]
)
def test_group_norms(gpu: Gpu, side: int, channels: int) -> None:
    B, P, N, groups = 2, side * side, stored(channels), int(np.gcd(32, channels))
    x = gpu.half(gpu.normal(B, P, channels) + gpu.normal(channels, size=4)).astype(np.float16)
    weight, bias = gpu.normal(channels), gpu.normal(channels)
    tile = VARIANTS["group_moments.all"].constants
    chunks = -(-P // tile["BP"])
    a = gpu.up(as_rows([x.reshape(B * P, 1, channels)]))
    moments, affine, out = gpu.empty(B, chunks, 2, N), gpu.empty(B, 2, N), gpu.empty(B * P, N, dtype="float16")
    grid = (chunks, -(-N // tile["BN"]), B)
    gpu.run("group_moments.all", grid, a=a, out=moments, P=P, N=N, chunks=chunks)
    sizes = {"P": P, "channels": channels, "N": N, "groups": groups, "chunks": chunks}
    gpu.run("group_affine.all", (groups, B), moments=moments, weight=weight, bias=bias, out=affine, **sizes)
    last = VARIANTS["group_norm.all"].constants
    grid = (-(-P // last["BP"]), -(-N // last["BN"]), B)
    gpu.run("group_norm.all", grid, a=a, affine=affine, out=out, P=P, N=N, silu=1)
    grouped = x.astype(np.float64).reshape(B, P, groups, -1)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + EPS)
    got = gpu.read(out)
    gpu.check(got[:, :channels], silu(normed.reshape(B * P, channels) * weight + bias))
    assert not got[:, channels:].any()


@pytest.mark.parametrize(("side", "channels"), [(2, 8), (9, 72), pytest.param(16, 160, marks=pytest.mark.slow)])
def test_attention_over_pixels(gpu: Gpu, side: int, channels: int) -> None:
    B, P, N = 2, side * side, stored(channels)
    parts = gpu.normal(B, P, 3, channels, dtype=np.float16)
    a = np.pad(parts, ((0, 0), (0, 0), (0, 0), (0, N - channels)))
    out, tile = gpu.empty(B, P, N, dtype="float16"), VARIANTS["pixel_attention.all"].constants
    grid = (-(-N // tile["BN"]), -(-P // tile["BM"]), B)
    gpu.run("pixel_attention.all", grid, a=a, out=out, P=P, channels=channels, N=N)
    q, k, v = parts.astype(np.float64).transpose(2, 0, 1, 3)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(channels)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    gpu.check(gpu.read(out)[..., :channels], p / p.sum(-1, keepdims=True) @ v)


def test_pixels_go_in_and_come_out(gpu: Gpu) -> None:
    image = np.arange(300 * 3).astype(np.uint8).reshape(300, 3)
    maps, back = gpu.empty(300, 16, dtype="float16"), gpu.empty(300, 3, dtype="uint8")
    gpu.run("from_pixels.all", (3,), pixels=image, out=maps, P=300)
    got = gpu.read(maps)
    # A GPU's quotient may be off by its last bits, and so by one step once it is rounded.
    gpu.check(got[:, :3], gpu.half(image.astype(np.float32) / 255 * 2 - 1), ROUNDING if gpu.real else 0)
    assert not got[:, 3:].any()
    values = np.zeros((300, 16), np.float16)
    values[:, :3] = np.linspace(-1.2, 1.2, 900).reshape(300, 3)
    values[:2, :3] = [[0, 1 / 127.5, np.float16(-1)], [1, -0.5, 0.5]]  # 127.5 is a tie
    values = gpu.half(values).astype(np.float16)
    gpu.run("to_pixels.all", (1,), a=values, pixels=back, P=300)
    want = np.rint((np.clip(values[:, :3].astype(np.float32), -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    np.testing.assert_array_equal(gpu.read(back), want)


@pytest.mark.parametrize(("side", "Z"), [(3, 8), (9, 32)])
def test_latents_come_channels_last(gpu: Gpu, side: int, Z: int) -> None:
    B, P, N = 2, side * side, stored(Z)
    f_hat, out = gpu.normal(B, Z, P), gpu.empty(B, P, N, dtype="float16")
    tile = VARIANTS["channels_last.all"].constants
    gpu.run("channels_last.all", (-(-P // tile["BP"]), -(-N // tile["BN"]), B), f_hat=f_hat, out=out, P=P, Z=Z, N=N)
    want = np.pad(gpu.half(f_hat.transpose(0, 2, 1)), ((0, 0), (0, 0), (0, N - Z)))
    np.testing.assert_array_equal(gpu.read(out), want)


# -- sampling --------------------------------------------------------------------------------------------------------


def drawn(gpu: Gpu, V: int, logits: np.ndarray, given: dict[str, Any], keep: bool = True) -> tuple[np.ndarray, ...]:
    """(tokens [B, cells], guided [B, cells, V], borders [B, cells]) by the kernel; logits f32 [cells, R, N]."""
    cells, R, N = logits.shape
    B = len(given["cfg"])
    tokens, guided = gpu.empty(B, cells, dtype="int64"), gpu.empty(B, cells, V)
    name = next(f"draw.v{size}" for size in (512, 4096, 16384) if size >= V)
    border = gpu.empty(B, cells)
    arrays = {"logits": logits, "tokens": tokens, "guided": guided if keep else 0, "border": border, **given}
    steered = int(bool(given["control_cfg"].any()))
    gpu.run(name, (cells, B), **arrays, cells=cells, R=R, V=V, N=N, steered=steered, store=int(keep), keeps=1)
    return gpu.read(tokens), gpu.read(guided) if keep else np.empty(0), gpu.read(border)


def sampling(gpu: Gpu, B: int, cells: int, R: int, V: int) -> dict[str, Any]:
    """A request's inputs, each image its own settings."""
    image = np.arange(B)
    return {
        "cfg": np.linspace(0.5, 3, B).astype(np.float32),
        "control_cfg": np.zeros(B, np.float32),
        "cfg_ratio": np.array([0.75], np.float32),
        "twin": (R - B + image),
        "plain": image,
        "extra": np.zeros((B, cells, V), np.float32),
        "top_k": np.array([V, 1, 20, 7])[:B],
        "top_p": np.array([0.9, 2.0, 2.0, 0.5], np.float32)[:B],
        "uniforms": gpu.rng.random((B, cells), dtype=np.float32),
        "known": np.zeros((B, cells), np.int64),
        "known_mask": np.zeros((B, cells), bool),
    }


@pytest.mark.parametrize(
    ("V", "cells"), [(48, 20), (500, 4), (4096, 2), pytest.param(16000, 2, marks=pytest.mark.slow)]
)
def test_tokens_are_drawn_as_the_plans_graph_draws(gpu: Gpu, V: int, cells: int) -> None:
    """Guidance, top-k with ties at the border, top-p and the inverse CDF, against the model's own sampling."""
    import torch

    B, R, N = 4, 8, -(-V // 16) * 16
    logits = gpu.normal(cells, R, N, size=2)
    logits[:, :, 3] = logits[:, :, 9]  # ties, at the top of some cells
    logits[: cells // 2, :, [3, 9]] = 9.0
    given = sampling(gpu, B, cells, R, V)
    given["control_cfg"] = np.array([0.0, 0.7, 0.0, 2.0], np.float32)
    given["plain"] = np.array([0, 5, 2, 6])
    given["extra"][2, 1:, :5] = 4.0
    given["uniforms"][:, -1] = 1 - 2**-24  # the largest there is
    given["known"][:, 1], given["known_mask"][:, 1] = 17, True
    tokens, guided, border = drawn(gpu, V, logits, given)
    z = logits.astype(np.float64)[:, :, :V]
    t, g = given["cfg"] * given["cfg_ratio"], given["control_cfg"] * given["cfg_ratio"]
    cond = z[:, :B].transpose(1, 0, 2)
    twin, plain = (z[:, given[n]].transpose(1, 0, 2) for n in ("twin", "plain"))
    want = (1 + t)[:, None, None] * cond - t[:, None, None] * twin + g[:, None, None] * (cond - plain)
    gpu.check(guided, want, SUMS)
    for b in range(B):
        mixed = torch.from_numpy(guided[b] + given["extra"][b])
        kept = keep_top(
            mixed, torch.from_numpy(given["top_k"][b : b + 1]), torch.from_numpy(given["top_p"][b : b + 1])
        )
        expected = draw_kept(kept, torch.from_numpy(given["uniforms"][b])).numpy()
        expected[1] = 17
        np.testing.assert_array_equal(tokens[b], expected)
        np.testing.assert_array_equal(border[b], torch.where(kept.isinf(), torch.inf, kept).amin(-1).numpy())


def test_a_draw_without_guided_logits_writes_none(gpu: Gpu) -> None:
    logits = gpu.normal(3, 1, 48)
    given = sampling(gpu, 1, 3, 1, 48) | {"top_k": np.array([1])}
    tokens, *_ = drawn(gpu, 48, logits, given, keep=False)
    np.testing.assert_array_equal(tokens[0], logits[:, 0].argmax(-1))


@pytest.mark.filterwarnings("ignore:All-NaN")  # of numpy, which computes here
def test_logits_that_are_no_numbers_draw_a_token_of_the_vocabulary(gpu: Gpu) -> None:
    """What a broken plan computes must not become an address."""
    logits = np.full((2, 1, 48), np.nan, np.float32)
    tokens, *_ = drawn(gpu, 40, logits, sampling(gpu, 1, 2, 1, 40))
    assert ((tokens >= 0) & (tokens < 40)).all()


# Sides of a scale, of f̂ and of the next one.
LATENTS = [
    (1, 4, 2, 8),
    (3, 5, 4, 40),
    *(pytest.param(*sides, marks=pytest.mark.slow) for sides in [(16, 16, 1, 32), (20, 32, 32, 32), (40, 40, 36, 8)]),
]


PLAIN = {"smoothed": 0, "smooth": 0, "known_mask": 0, "smooths": 0}


def edge(size: int) -> int:
    return next(e for e in (16, 32, 64) if size <= e)


@pytest.mark.parametrize(("S", "E", "T", "Z"), LATENTS)
def test_codes_are_added_to_f_hat_and_become_the_next_input(gpu: Gpu, S: int, E: int, T: int, Z: int) -> None:
    B, V, phis = 2, 24, 3
    tokens, codes = gpu.rng.integers(0, V, (B, S, S)), gpu.normal(V, Z)
    up, down = gpu.normal(E, S), gpu.normal(T, E)
    h = gpu.empty(B, Z, E, E)
    side = min(edge(S), edge(E))
    sizes = {"E": E, "Z": Z}
    gpu.run(
        f"upsample.s{side}.e{edge(E)}", (Z, B), tokens=tokens, codes=codes, up=up, out=h, S=S, V=V, **PLAIN, **sizes
    )
    want = np.einsum("es,bstz,ft->bzef", up.astype(np.float64), codes.astype(np.float64)[tokens], up)
    gpu.check(gpu.read(h), want, SUMS)
    f_hat, w, bias = gpu.normal(B, Z, E, E), gpu.normal(phis * Z, Z, 3, 3, size=0.1), gpu.normal(phis * Z)
    out, grid = gpu.empty(B, Z, E, E), (-(-E * E // 32), -(-Z // 32), B)
    arrays = {"h": h, "f_hat": f_hat, "w": w, "bias": bias, "phi": np.array([2]), "out": out}
    gpu.run("accumulate.z32", grid, **arrays, **sizes)
    padded = np.pad(gpu.read(h).astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    mine = w[2 * Z :].astype(np.float64)
    taps = [(i, j) for i in range(3) for j in range(3)]
    conv = sum(np.einsum("bzef,oz->boef", padded[:, :, i : i + E, j : j + E], mine[:, :, i, j]) for i, j in taps)
    conv = conv + bias[2 * Z :, None, None]
    total = f_hat + 0.5 * gpu.read(h) + 0.5 * conv
    gpu.check(gpu.read(out), total, SUMS)
    following, side = gpu.empty(B, T * T, Z, dtype="float16"), min(edge(T), edge(E))
    gpu.run(f"downsample.t{side}.e{edge(E)}", (Z, B), f_hat=out, down=down, out=following, T=T, **sizes)
    small = np.einsum("te,bzef,uf->btuz", down.astype(np.float64), gpu.read(out), down).reshape(B, T * T, Z)
    gpu.check(gpu.read(following), small)


@pytest.mark.parametrize(("S", "E", "T", "Z"), LATENTS)
def test_what_is_left_over_is_quantised(gpu: Gpu, S: int, E: int, T: int, Z: int) -> None:
    """The latent less f̂ at a scale's size, and its nearest codes, with ties to the first."""
    B, V, side, before, N = 2, 300, min(T, E), 3, stored(Z)
    L = before + side * side + 1
    latent = np.pad(gpu.normal(B, E * E, Z, dtype=np.float16), ((0, 0), (0, 0), (0, N - Z)))
    f_hat, down, codes = gpu.normal(B, Z, E, E), gpu.normal(side, E, size=E**-0.5), gpu.normal(V, Z)
    codes[200] = codes[7]
    rest, grid = gpu.empty(B, side * side, Z), gpu.empty(B, side * side, dtype="int64")
    sizes = {"T": side, "E": E, "Z": Z, "N": N}
    gpu.run(f"residual.e{edge(E)}", (Z, B), latent=latent, f_hat=f_hat, down=down, out=rest, **sizes)
    left = latent[..., :Z].astype(np.float64).transpose(0, 2, 1).reshape(B, Z, E, E) - f_hat
    want = np.einsum("te,bzef,uf->btuz", down.astype(np.float64), left, down).reshape(B, side * side, Z)
    gpu.check(gpu.read(rest), want, 2 * SUMS)
    z = want.astype(np.float32)
    z[:, 0] = codes[7]
    tokens = gpu.up(np.full((B, L), -1))
    arrays = {"rest": z, "codes": codes, "grid": grid, "tokens": tokens}
    gpu.run("nearest.z32", (side * side, B), cells=side * side, first=before, L=L, V=V, Z=Z, **arrays)
    distance = ((z[:, :, None].astype(np.float64) - codes) ** 2).sum(-1)
    best = distance.argmin(-1)
    np.testing.assert_array_equal(gpu.read(grid), best)
    assert (best[:, 0] == 7).all()
    whole = gpu.read(tokens)
    np.testing.assert_array_equal(whole[:, before : before + side * side], best)
    assert (whole[:, :before] == -1).all()
    assert (whole[:, before + side * side :] == -1).all()


@pytest.mark.parametrize("V", [48, 600, pytest.param(9000, marks=pytest.mark.slow)])
def test_smoothed_codes_are_a_mixture_of_what_is_kept(gpu: Gpu, V: int) -> None:
    """As the model mixes them, and taken where an image asks for it and no token is known."""
    import torch

    B, S, E, Z = 2, 3, 4, 8
    cells, ratio = S * S, np.array([0.6], np.float32)
    guided, noise = gpu.normal(B, cells, V, size=2), gpu.rng.gumbel(size=(B, cells, V)).astype(np.float32)
    extra, codes, up = gpu.normal(B, cells, V), gpu.normal(V, Z), gpu.normal(E, S)
    border = np.quantile(guided + extra, 0.7, axis=2, method="nearest").astype(np.float32)
    out = gpu.empty(B, cells, Z)
    name = next(f"smooth.v{size}" for size in (512, 4096, 16384) if size >= V)
    given = {"guided": guided, "extra": extra, "border": border, "noise": noise, "cfg_ratio": ratio, "codes": codes}
    gpu.run(name, (cells, B), out=out, cells=cells, V=V, Z=Z, **given)
    z = torch.from_numpy(guided + extra)
    kept = z.masked_fill(z < torch.from_numpy(border)[..., None], -torch.inf)
    want = smooth_codes(kept, torch.from_numpy(noise), torch.from_numpy(ratio), torch.from_numpy(codes)).numpy()
    gpu.check(gpu.read(out), want, 2e-5)
    tokens, known = gpu.rng.integers(0, V, (B, S, S)), gpu.rng.random((B, S, S)) < 0.3
    h, smooth = gpu.empty(B, Z, E, E), np.array([True, False])
    arrays = {"tokens": tokens, "codes": codes, "up": up, "smoothed": out, "smooth": smooth, "known_mask": known}
    gpu.run("upsample.s16.e16", (Z, B), out=h, S=S, V=V, E=E, Z=Z, smooths=1, **arrays)
    mixed = np.where((~known & smooth[:, None, None])[..., None], want.reshape(B, S, S, Z), codes[tokens])
    gpu.check(gpu.read(h), np.einsum("es,bstz,ft->bzef", up, mixed.astype(np.float64), up), 2e-5)


def test_tokens_outside_of_the_codebook_read_nothing_else(gpu: Gpu) -> None:
    tokens, codes, up = np.array([[[-5, 99], [0, 23]]]), gpu.normal(24, 8), np.eye(2, dtype=np.float32)
    h = gpu.empty(1, 8, 2, 2)
    gpu.run("upsample.s16.e16", (8, 1), tokens=tokens, codes=codes, up=up, out=h, S=2, V=24, E=2, Z=8, **PLAIN)
    np.testing.assert_array_equal(gpu.read(h)[0], codes[[[0, 23], [0, 23]]].transpose(2, 0, 1))


# -- what the fake GPU finds -----------------------------------------------------------------------------------------


def test_the_checks_find_what_a_gpu_would_not() -> None:
    """Out of bounds, unwritten, misaligned, freed, and two programs on one place: each a fault, not a wrong image."""
    gpu, M, C = Gpu(), 6, 64
    x, mod = gpu.up(gpu.normal(M, C)), gpu.up(gpu.normal(1, 2, C))
    out = gpu.empty(M, C, dtype="float16")
    good = {"x": x, "scale": mod, "shift": at_row(mod, 1), "out": out, "C": C, "R": 1, "mod_stride": 2 * C}

    def launch(grid: tuple[int, ...] = (M,), **changed: Any) -> None:
        gpu.run("ln_mod.row", grid, **good | changed)
        gpu.device.synchronize()

    def fault(match: str, grid: tuple[int, ...] = (M,), **changed: Any) -> None:
        with pytest.raises(DeviceFault, match=match):
            launch(grid, **changed)
        gpu.device.pending.clear()

    launch()
    fault("of 1536 bytes", grid=(M + 1,))
    fault("nobody wrote", x=gpu.empty(M, C))
    fault("compiled for multiples of 16", mod_stride=2 * C + 1)
    fault("compiled for multiples of 16", out=out.address + 8)
    fault("a race", out=x.address)
    fault("a grid of", grid=(0,))
    gpu.memory.close()
    with pytest.raises(DeviceFault, match="freed"):
        gpu.device.put_kernel("ln_mod.row", (M, 1, 1), [x.address, mod.address, mod.address, out.address, C, 1, 0])
