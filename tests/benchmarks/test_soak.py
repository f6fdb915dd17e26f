"""Many images on one opened plan: memory stays where it is, a request keeps giving its image, closing leaves nothing.

The short forms run on a toy; what takes minutes (500 images, 100 openings of the shipped plan) is marked slow.

Memory is what is held: resident pages of the process's own (RssAnon) after garbage is collected and free memory is
given back. Pages of files, such as libraries and mapped weights, are the page cache's. The first third of the samples
is warm-up, in which allocators and engines grow to what they need; of the rest, the median of the second half may
exceed the first's by 1 %.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.measure import in_subprocess
from benchmarks.harness.workload import draw_control
from car_runtime.conditioning import CACHED
from car_runtime.plan import Plan, default_plan, open_plan
from fixtures.toy_plan import toy

PROC = Path("/proc/self")
CONTROLS = CACHED + 4
"""More control images than the plan keeps features of, so that some are forgotten."""
THREADS = 4
TOLERANCE = 0.01
M_ARENA_MAX = -8
"""Of mallopt(3)."""

pytestmark = pytest.mark.skipif(not PROC.is_dir(), reason="memory is reported in Linux's /proc")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of `Plan.generate`."""

    control: int
    label: int | None
    seed: int
    n: int
    cfg: float | None


def calls(classes: int, images: int) -> list[Call]:
    """Ever different calls, until they ask for so many images; the same ones each time."""
    generator, found = np.random.default_rng(0), list[Call]()
    while sum(call.n for call in found) < images:
        found.append(
            Call(
                control=int(generator.integers(CONTROLS)),
                label=None if generator.random() < 0.1 else int(generator.integers(classes)),
                seed=int(generator.integers(1 << 31)),
                n=int(generator.integers(1, 5)),
                cfg=0.0 if generator.random() < 1 / 3 else None,
            )
        )
    return found


def make(plan: Plan, call: Call) -> str:
    """A digest of the images and tokens of a call."""
    size = plan.manifest.model.image_size
    control = np.roll(draw_control(size), call.control * max(1, size // CONTROLS), axis=1)
    result = plan.generate(control, call.label, call.seed, call.n, cfg=call.cfg)
    return hashlib.sha256(result.images.tobytes() + result.tokens.tobytes()).hexdigest()


def resident() -> int:
    """Bytes of memory of its own that this process holds, without garbage and, with glibc, without what is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    status = (PROC / "status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def handles() -> tuple[int, int]:
    """Open file descriptors and threads of this process."""
    return len(os.listdir(PROC / "fd")), len(os.listdir(PROC / "task"))


def growth(samples: Sequence[int]) -> float:
    """By what share memory grew from the first half after the warm-up to the second."""
    settled = samples[len(samples) // 3 :]
    first, last = np.median(settled[: len(settled) // 2]), np.median(settled[len(settled) // 2 :])
    return float(last / first - 1)


def slope(closed: Sequence[int]) -> float:
    """Bytes that an opening leaves: the median slope between any two closings after the first third.

    Allocators go up and down by a quarter of what an open plan holds; a median slope sees a leak of 1 % through that.
    """
    settled = np.array(closed[len(closed) // 3 :], np.float64)
    i, j = np.triu_indices(len(settled), 1)
    return float(np.median((settled[j] - settled[i]) / (j - i)))


# ---- What is run; in a process of its own, where memory is that of the plan alone ----


def soak(path: str, backend: str, images: int) -> dict[str, Any]:
    """The calls by one thread, then by several at once: memory after each, and how many gave another image."""
    gc.collect()
    gc.freeze()  # what was there before isn't looked through again at every sample
    with open_plan(path, backend) as plan:
        asked = calls(plan.manifest.model.classes, images)
        known, alone = [], []
        for call in asked:
            known.append(make(plan, call))
            alone.append(resident())
        different, together = several_threads(plan, asked, known)
        different += sum(make(plan, call) != digest for call, digest in zip(asked[::5], known[::5], strict=True))
    return {"alone": alone, "together": together, "different": different}


def several_threads(
    plan: Plan, asked: Sequence[Call], known: Sequence[str], rounds: int = 24
) -> tuple[int, list[int]]:
    """How many of the calls, by several threads at once, gave another image than alone; memory after each round."""
    different, memory = 0, []
    each = max(1, len(asked) // 60)

    def run(first: int) -> int:
        chosen = [(first * each + i) % len(asked) for i in range(each)]
        return sum(make(plan, asked[i]) != known[i] for i in chosen)

    with ThreadPoolExecutor(THREADS) as pool:
        # All ask for equally many images at once, so that engines grow to what that takes before memory counts.
        for n, turn in itertools.product(range(1, 5), range(3)):
            equal = Call(control=turn, label=0, seed=turn, n=n, cfg=0.0 if turn % 2 else None)
            found = list(pool.map(lambda call: make(plan, call), [equal] * THREADS))
            different += sum(digest != make(plan, equal) for digest in found)
        for turn in range(rounds):
            different += sum(pool.map(run, range(turn, turn + THREADS)))
            make(plan, asked[0])  # the plan keeps the buffers of its last call: always of this one
            memory.append(resident())
    return different, memory


def openings(path: str, backend: str, opens: int) -> dict[str, list[Any]]:
    """Of each opening: a digest, bytes when open and when closed, and handles that are left."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)  # one heap: with several, small blocks keep large ones' pages
    gc.collect()
    gc.freeze()
    seen: dict[str, list[Any]] = {"digests": [], "opened": [], "closed": [], "left": []}
    for _ in range(opens):
        with open_plan(path, backend, verify=False) as plan:
            seen["digests"].append(make(plan, Call(control=0, label=0, seed=1234, n=2, cfg=None)))
            seen["opened"].append(resident())
        del plan
        seen["closed"].append(resident())
        seen["left"].append(list(handles()))
    return seen


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a function of this module in a process of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return lambda name, *args: in_subprocess(f"test_soak:{name}", *args)["result"]


# ---- Tests ----


def test_equal_requests_give_equal_images_also_from_several_threads() -> None:
    with open_plan(toy().plan, "ort-cpu", threads=1) as plan:
        asked = calls(plan.manifest.model.classes, 30)
        known = [make(plan, call) for call in asked]
        assert several_threads(plan, asked, known, rounds=8)[0] == 0
        assert [make(plan, call) for call in asked] == known
    assert len(set(known)) == len(known)


def test_closing_a_plan_leaves_nothing_open(alone: Callable[..., dict[str, Any]]) -> None:
    seen = alone("openings", str(toy().plan), "ort-cpu", 5)
    assert len(set(seen["digests"])) == 1
    assert seen["left"][-1] == seen["left"][0]
    assert min(seen["opened"]) > min(seen["closed"])


def test_growth_and_leaks_are_seen_through_an_allocators_noise() -> None:
    assert growth([50, 70, 90, *[100] * 6]) == 0
    assert growth([50, 70, 90, *[100] * 3, *[102] * 3]) == pytest.approx(0.02)
    assert growth([0, 0, 0, 100, 100, 300, 100, 100, 100]) == 0  # a single peak is none
    generator, held = np.random.default_rng(0), 1000
    noise = np.convolve(generator.normal(0, 0.25 * held, 209), np.ones(10) / 10**0.5, "valid").astype(int)
    leaks = [slope([10_000 + int(n) + leak * i for i, n in enumerate(noise)]) for leak in (0, 5, 15, 20)]
    assert [leak <= TOLERANCE * held for leak in leaks] == [True, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_five_hundred_images_leave_memory_where_it_was(backend: str, alone: Callable[..., dict[str, Any]]) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    seen = alone("soak", str(default_plan()), backend, 500)
    assert seen["different"] == 0
    assert growth(seen["alone"]) <= TOLERANCE
    assert growth(seen["together"]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_a_hundred_openings_leave_no_memory_and_nothing_open(
    backend: str, alone: Callable[..., dict[str, Any]]
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    seen = alone("openings", str(default_plan()), backend, 100)
    held = float(np.median(np.array(seen["opened"]) - np.array(seen["closed"])))
    assert slope(seen["closed"]) <= TOLERANCE * held
    assert len(set(seen["digests"])) == 1
    (descriptors, threads), (descriptors_last, threads_last) = seen["left"][0], seen["left"][-1]
    assert descriptors_last <= descriptors
    assert threads_last <= threads
