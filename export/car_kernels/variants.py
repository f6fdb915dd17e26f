"""Which kernels are built, with which tiles: the list behind every target's cubins.

A variant is a kernel with its constants. Sizes of a model are run-time arguments, but for the width of a head (32 or
64), the side of f̂ and the vocabulary, which round up to the next tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from car_kernels import attention, images, products, rows, sampling

TARGETS = (80, 86, 89, 90, 120)
"""Compute capabilities with cubins: A100, RTX 30, RTX 40 and L40, H100 and H200, RTX 50."""
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes of shared memory that one block may have."""
EPS = 1e-6
PIXELS, GROUP = 128, 32
"""Of a group norm: pixels whose moments are taken together, and the most channels of a group."""

_F16, _F32, _I64, _I32, _FLAG, _PIXELS = "*fp16", "*fp32", "*i64", "*i32", "*i8", "*u8"
_POINTERS = {
    _F16: "a w q k v q_bias v_bias log_scale k_slot v_slot h gain embedding latent",
    _F32: "x scale shift gamma mix keep control pos c logits cfg control_cfg cfg_ratio extra top_p uniforms guided "
    "codes up down f_hat border noise smoothed moments affine rest",
    _I64: "twin plain top_k known tokens image phi label grid",
    _I32: "maps",
    _FLAG: "known_mask smooth",
    _PIXELS: "pixels",
}
TYPES = {name: kind for kind, names in _POINTERS.items() for name in names.split()}
"""Argument → type, where it is the same in all kernels; what is in no list is an int32."""
OWN_TYPES: dict[str, dict[str, str]] = {
    "ln_qkv": {},
    "qkv": {},
    "ln_gelu": {"bias": _F16, "out": _F16},
    "gelu": {"bias": _F16, "out": _F16},
    "gate": {"bias": _F16, "out": _F32},
    "head": {"bias": _F16, "out": _F32},
    "fuse": {"bias": _F16},
    "inject": {"bias": _F16, "out": _F32},
    "embed": {"bias": _F16, "out": _F32},
    "ln_mod": {"out": _F16},
    "fusion_norm": {"weight": _F32, "bias": _F32, "out": _F16, "c_stride": "i64"},
    "fusion_round": {"out": _F16, "c_stride": "i64"},
    "cross_norm": {"c_stride": "i64"},
    "add_position": {"out": _F32, "tokens": "i32"},
    "attention": {"out": _F16, "tokens": "i32"},
    "draw": {},
    "upsample": {"out": _F32},
    "accumulate": {"w": _F32, "bias": _F32, "h": _F32, "out": _F32},
    "downsample": {"out": _F16},
    "smooth": {"out": _F32},
    "condition": {"bias": _F16, "offset": _F16, "out": _F32},
    "start": {"out": _F32, "first": _F16},
    "residual": {"out": _F32},
    "nearest": {},
    "conv": {"bias": _F16, "x": _F16, "out": _F16},
    "conv_wide": {"bias": _F16, "out": _F32},
    "group_moments": {"out": _F32},
    "group_affine": {"weight": _F32, "bias": _F32, "out": _F32},
    "group_norm": {"out": _F16},
    "pixel_attention": {"out": _F16},
    "from_pixels": {"out": _F16},
    "to_pixels": {},
    "channels_last": {"out": _F16},
}
MULTIPLES = frozenset({"C", "K", "N", "mod_stride", "c_stride", "out_stride"})
"""Numbers that the launch plan keeps at multiples of 16, as it does every address; so loads are of 16 bytes."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel and its constants: one cubin a target."""

    name: str
    kernel: Any
    """Triton's JITFunction."""
    constants: dict[str, Any]
    warps: int
    stages: int
    product: bool = False
    """Whether it multiplies matrices of half precision, and so must be on the tensor cores."""
    half: str = "fp16"
    """What is in half precision: fp16, or bf16."""

    @property
    def kernel_name(self) -> str:
        """The function's name."""
        return self.name.partition(".")[0]

    @property
    def arguments(self) -> dict[str, str]:
        """Run-time arguments in their order: name → type, as Triton writes it."""
        own = OWN_TYPES[self.kernel_name]
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        types = {name: own.get(name) or TYPES.get(name, "i32") for name in names}
        return {name: f"*{self.half}" if kind == _F16 else kind for name, kind in types.items()}

    @property
    def multiples(self) -> list[str]:
        """Arguments that are multiples of 16: all addresses but those of pixels, of which images have any number."""
        addresses = [n for n, kind in self.arguments.items() if kind.startswith("*") and kind != _PIXELS]
        return [n for n in self.arguments if n in addresses or n in MULTIPLES]


def variants() -> dict[str, Variant]:
    """All of them by name: KERNEL.TILES, and KERNEL.TILES.bf16 of those that have anything in half precision."""
    found = {variant.name: variant for variant in _variants()}
    twins = [replace(v, name=f"{v.name}.bf16", half="bf16") for v in found.values() if _F16 in v.arguments.values()]
    found |= {twin.name: twin for twin in twins}
    assert set(OWN_TYPES) == {variant.kernel_name for variant in found.values()}
    return found


TILES = {
    "s": ({"BM": 16, "BN": 32, "BK": 128}, 4, 5),
    "m": ({"BM": 64, "BN": 64, "BK": 64}, 4, 3),
    "l": ({"BM": 128, "BN": 128, "BK": 32}, 8, 3),
}
"""Of products: tile of rows × outputs × inner, warps, stages. `s` is for a few rows, which read each weight once."""


def _variants() -> Iterator[Variant]:
    for size, (tile, warps, stages) in TILES.items():
        options = {"warps": warps, "stages": stages, "product": True}
        for kernel in (products.gelu, products.gate, products.head, products.fuse):
            if kernel is products.fuse and size == "l":
                continue  # two sums of a tile at a time: they take too many registers
            yield Variant(name=f"{_name(kernel)}.{size}", kernel=kernel, constants=tile, **options)
        for D in (32, 64):
            heads = {"D": D, "BM": tile["BM"], "BK": tile["BK"]}
            four = options | {"warps": 4}
            yield Variant(name=f"qkv.{size}.d{D}", kernel=products.qkv, constants=heads, **four)
    few = {"EPS": EPS, "BM": 16, "BK": 64}
    for D in (32, 64):
        yield Variant(
            name=f"ln_qkv.s.d{D}", kernel=products.ln_qkv, constants=few | {"D": D}, warps=4, stages=3, product=True
        )
        for size, BM, warps in (("s", 16, 4), ("m", 64, 4)):
            tile = {"D": D, "BM": BM, "BT": 64}
            yield Variant(
                name=f"attention.{size}.d{D}",
                kernel=attention.attention,
                constants=tile,
                warps=warps,
                stages=3,
                product=True,
            )
    yield Variant(
        name="ln_gelu.s", kernel=products.ln_gelu, constants=few | {"BN": 32}, warps=4, stages=3, product=True
    )
    for size, BM in (("s", 16), ("m", 64)):
        tile = {"BM": BM, "BN": 64, "BK": 64}
        yield Variant(name=f"inject.{size}", kernel=products.inject, constants=tile, warps=4, stages=3, product=True)
    tile = {"BM": 16, "BN": 64, "BK": 32}
    yield Variant(name="embed.s", kernel=products.embed, constants=tile, warps=4, stages=2, product=True)
    normed = {"EPS": EPS, "BC": 1024}
    yield Variant(name="ln_mod.row", kernel=rows.ln_mod, constants=normed, warps=4, stages=1)
    yield Variant(name="fusion_norm.row", kernel=rows.fusion_norm, constants=normed, warps=4, stages=1)
    yield Variant(name="cross_norm.row", kernel=rows.cross_norm, constants=normed, warps=4, stages=1)
    for kernel in (rows.fusion_round, rows.add_position):
        yield Variant(name=f"{_name(kernel)}.row", kernel=kernel, constants={"BC": 1024}, warps=4, stages=1)
    for VP, warps in ((512, 4), (4096, 16), (16384, 32)):
        for kernel in (sampling.draw, sampling.smooth):
            threads = {"warps": min(warps, 16) if kernel is sampling.smooth else warps, "stages": 1}
            yield Variant(name=f"{_name(kernel)}.v{VP}", kernel=kernel, constants={"VP": VP}, **threads)
    for EP in (16, 32, 64):
        warps = 4 if EP < 64 else 16
        for SP in (16, 32, 64):
            if SP <= EP:
                small = {"SP": SP, "EP": EP}
                yield Variant(
                    name=f"upsample.s{SP}.e{EP}", kernel=sampling.upsample, constants=small, warps=warps, stages=1
                )
                small = {"TP": SP, "EP": EP}
                yield Variant(
                    name=f"downsample.t{SP}.e{EP}", kernel=sampling.downsample, constants=small, warps=warps, stages=1
                )
    for EP in (16, 32, 64):
        warps = 4 if EP < 64 else 16
        yield Variant(name=f"residual.e{EP}", kernel=sampling.residual, constants={"EP": EP}, warps=warps, stages=1)
    yield Variant(name="nearest.z32", kernel=sampling.nearest, constants={"BV": 128, "BZ": 32}, warps=4, stages=1)
    yield Variant(
        name="accumulate.z32", kernel=sampling.accumulate, constants={"BP": 32, "BZ": 32}, warps=4, stages=2
    )
    yield from _image_variants()


def _image_variants() -> Iterator[Variant]:
    """Of the condition, the control encoder and the decoder."""
    tile = {"BM": 16, "BN": 64, "BK": 64}
    yield Variant(name="condition.s", kernel=products.condition, constants=tile, warps=4, stages=3, product=True)
    yield Variant(name="start.row", kernel=rows.start, constants={"BC": 1024}, warps=4, stages=1)
    for size, tile, warps in (
        ("s", {"BM": 32, "BN": 32, "BK": 64}, 4),
        ("m", {"BM": 64, "BN": 64, "BK": 64}, 4),
        ("l", {"BM": 128, "BN": 128, "BK": 32}, 8),
    ):
        options = {"constants": tile, "warps": warps, "stages": 3, "product": True}
        yield Variant(name=f"conv.{size}", kernel=images.conv, **options)
        if size != "l":
            yield Variant(name=f"conv_wide.{size}", kernel=images.conv_wide, **options)
    for kernel, tile in (
        (images.group_moments, {"BP": PIXELS, "BN": 32}),
        (images.group_affine, {"EPS": EPS, "BP": PIXELS, "BC": 32, "GP": GROUP}),
        (images.group_norm, {"BP": 32, "BN": 64}),
        (images.from_pixels, {"BP": 128}),
        (images.to_pixels, {"BP": 512}),
        (images.channels_last, {"BP": 32, "BN": 16}),
    ):
        yield Variant(name=f"{_name(kernel)}.all", kernel=kernel, constants=tile, warps=4, stages=1)
    tile = {"BM": 32, "BN": 64, "BT": 32, "BK": 64}
    yield Variant(
        name="pixel_attention.all", kernel=images.pixel_attention, constants=tile, warps=4, stages=2, product=True
    )


def _name(kernel: Any) -> str:
    return str(getattr(kernel, "__name__", None) or kernel.fn.__name__)
