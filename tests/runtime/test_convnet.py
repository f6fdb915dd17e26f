"""Networks of convolutions in machine code of our own: what PyTorch computes, whatever the sizes and the threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from car_runtime.backends.amx import build
from car_runtime.backends.amx.convnet import Convnet, ConvnetBuffers, packing_order
from car_runtime.backends.amx.description import Attend, Convolution, Convolve, Network, Norm, UnsupportedGraphError
from fixtures.amx_machine import needs_kernels
from fixtures.convolutions import reference

Floats = NDArray[np.float32]
pytestmark = pytest.mark.usefixtures("kernels")
SIZES = ((33, 50), (7, 5), (1, 1))
"""Rows that end within a tile, more tiles than a block has, and fewer positions than a tile."""
CHANNELS = (40, 160, 160, 160, 144, 48, 160, 72, 32)
RNG = np.random.default_rng(5)


def random(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def convolution(inputs: int, outputs: int, taps: int, **places: int) -> Convolution:
    kernel = random(outputs, inputs, taps, taps) / np.float32(taps * inputs**0.5)
    return Convolution(kernel=kernel, bias=random(outputs), **{"top": 1 - taps // 2, "left": 1 - taps // 2, **places})


def norm(channels: int, groups: int) -> Norm:
    return Norm(weight=1 + 0.1 * random(channels), bias=0.1 * random(channels), groups=groups, eps=1e-6)


def convolve(source: int, *convolutions: Convolution, **given: object) -> Convolve:
    options: dict[str, object] = {"target": source + 1, "norm": None, "silu": False, "residual": None, **given}
    return Convolve(source=source, convolutions=convolutions, **options)  # type: ignore[arg-type]


NETWORK = Network(
    steps=(
        convolve(0, convolution(40, 160, 3)),
        convolve(1, convolution(160, 160, 3), norm=norm(160, 32), silu=True),
        convolve(2, convolution(160, 160, 3), norm=norm(160, 8), silu=True, residual=1),
        convolve(3, convolution(160, 144, 1), norm=norm(160, 32)),
        Attend(source=4, target=5, scale=0.3),
        convolve(5, convolution(48, 160, 1), residual=3),
        convolve(6, convolution(160, 72, 3, stride=2), silu=True),
        convolve(
            7,
            *(
                convolution(72, 32, 2, top=i, left=j, out_stride=2, row=i, column=j)
                for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
            ),
        ),
    ),
    channels=CHANNELS,
)


def run(network: Network, inputs: list[Floats], terms: int, threads: int) -> list[Floats]:
    """What comes out, [C, H, W] each, twice through the same memory."""
    convnet = Convnet(build.load(terms), network, threads)
    buffers = ConvnetBuffers(convnet, tuple((x.shape[1], x.shape[2]) for x in inputs))
    for _ in range(2):
        for i, x in enumerate(inputs):
            padded = np.zeros((32 * len(buffers.input(i)), *x.shape[1:]), np.float32)
            padded[: len(x)] = x
            buffers.input(i)[:] = padded.reshape(-1, 32, *x.shape[1:]).transpose(0, 2, 3, 1)
        buffers.run()
    blocks = [buffers.output(i).transpose(0, 3, 1, 2) for i in range(len(inputs))]
    return [b.reshape(-1, *b.shape[2:])[: network.channels[-1]].copy() for b in blocks]


@pytest.fixture(scope="module")
def inputs() -> list[Floats]:
    return [random(40, *size) for size in SIZES]


@needs_kernels
@pytest.mark.parametrize(("terms", "limit"), [(1, 0.02), (2, 3e-5)])
@pytest.mark.parametrize("length", range(1, len(NETWORK.steps) + 1))
def test_every_step_is_pytorchs(inputs: list[Floats], terms: int, limit: float, length: int) -> None:
    if length == 4:  # queries, keys and values lie by themselves only where attention reads them
        return
    network = Network(steps=NETWORK.steps[:length], channels=CHANNELS[: length + 1])
    for x, got in zip(inputs, run(network, inputs, terms, 2), strict=True):
        wanted = reference(network, x)[-1].numpy()
        assert got.shape == wanted.shape
        assert np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()) < limit


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("terms", [1, 2])
def test_threads_change_no_bit(inputs: list[Floats], threads: int, terms: int) -> None:
    for a, b in zip(run(NETWORK, inputs, terms, 2), run(NETWORK, inputs, terms, threads), strict=True):
        assert (a == b).all()


@needs_kernels
def test_a_map_is_the_same_among_others(inputs: list[Floats]) -> None:
    together = run(NETWORK, inputs, 1, 2)
    for x, got in zip(inputs, together, strict=True):
        assert (run(NETWORK, [x], 1, 2)[0] == got).all()


def test_weights_are_packed_in_the_order_of_the_product() -> None:
    kernel = random(6, 70, 3, 2)
    packed = packing_order(kernel, 2, 2).reshape(2, 32, -1)
    assert not packed[:, 3:].any()
    for section in range(2):
        for output in range(3):
            row = packed[section, output]
            # two blocks of channels, then the third, which has 6 of 32
            first, second = row[: 3 * 2 * 2 * 32].reshape(3, 2, 2, 32), row[3 * 2 * 2 * 32 :].reshape(3, 1, 2, 32)
            both = np.concatenate([first, second], axis=1).transpose(1, 3, 0, 2).reshape(96, 3, 2)
            assert (both[:70] == kernel[3 * section + output]).all()
            assert not both[70:].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda steps: [
            *steps[:5],
            convolve(5, convolution(48, 160, 1), residual=None),
            convolve(4, convolution(144, 9, 1)),
        ],
        lambda steps: [convolve(0, convolution(40, 160, 3), norm=norm(40, 8)), *steps[1:]],
    ],
    ids=["queries-read-twice", "norm-of-the-input"],
)
@needs_kernels
def test_what_cannot_be_laid_out_is_refused(change: Callable[[list[object]], list[Convolve]]) -> None:
    steps = change(list(NETWORK.steps))
    with pytest.raises(UnsupportedGraphError):
        ConvnetBuffers(
            Convnet(build.load(), Network(steps=tuple(steps), channels=CHANNELS[: len(steps) + 1]), 1), SIZES
        )


@needs_kernels
def test_attention_over_too_much_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match="4096 positions"):
        ConvnetBuffers(Convnet(build.load(), NETWORK, 1), ((65, 64),))


@needs_kernels
def test_pixels_have_to_fit() -> None:
    network = Network(steps=(convolve(0, convolution(8, 3, 3)),), channels=(8, 3))
    buffers = ConvnetBuffers(Convnet(build.load(), network, 1), ((6, 20),))
    buffers.input(0)[:] = 0
    image = np.zeros((1, 6, 20, 3), np.uint8)
    buffers.run(image)
    bias = network.steps[0].convolutions[0].bias  # type: ignore[union-attr]
    assert (image == np.round((np.clip(bias, -1, 1) + 1) * 127.5)).all()
    for wrong in (image[:, :5], image.astype(np.int16), np.zeros((2, 6, 20, 3), np.uint8)):
        with pytest.raises(ValueError, match="come out"):
            buffers.run(wrong)
