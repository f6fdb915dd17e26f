"""An opened plan: the package's programming interface.

    with open_plan("d16.plan") as plan:
        first = plan.generate("edges.png", label="cat", seed=0)
        second = plan.generate("edges.png", label="cat", seed=1)   # control and class are not computed again

Shapes: n pictures asked for; B pictures of one batch; R transformer rows; K scales; S side of a scale in tokens; L
tokens per picture; H, W pixels; E side of f̂; Z latent channels; C width.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime import images as image_io
from car_runtime import request as sampling
from car_runtime.backends.base import Backend, Buffer, Mark
from car_runtime.backends.registry import check_name, open_backend
from car_runtime.errors import PlanError, RequestError
from car_runtime.format.manifest import WEIGHTS, Manifest, read_manifest, verify_files
from car_runtime.generate import Condition, State, Step, run_scales
from car_runtime.schedule import Scales, Schedule

CACHED = 8
"""Control images (as they are, and as schedules want them) and classes whose features are kept for the next call, so
many of each; 3 MB and, for a class, 1 to 5 MB each at d16."""
DEFAULT_PLAN = Path(__file__).parent / "plans" / "emoji-canny.plan"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Pictures and how they came about."""

    images: NDArray[np.uint8]
    """uint8 [n, H, W, 3]."""
    tokens: NDArray[np.int64]
    """int64 [n, L], coarse scales first, row by row; −1 at scales that were not drawn."""
    request: sampling.Request
    """The request with every default filled in: label index, seeds, sampling, schedule."""
    timings: dict[str, float]
    """Seconds: `control`, `condition`, `scale_0` …, `decoder`, `total`. What was cached costs next to nothing."""


@dataclass(frozen=True, kw_only=True)
class ScaleResult:
    """A batch of pictures after one more scale. It stays valid when the stream goes on."""

    index: int
    """The scale, 0 … K−1."""
    last: bool
    pictures: range
    """Which of the n pictures these are."""
    tokens: NDArray[np.int64]
    """int64 [B, S, S], this scale's."""
    f_hat: NDArray[np.float32]
    """f32 [B, Z, E, E], the sum of all scales so far."""
    seconds: float
    plan: Plan

    def preview(self) -> NDArray[np.uint8]:
        """The pictures as they are now, uint8 [B, H, W, 3]; after the last scale, the finished ones."""
        return self.plan._preview(self.f_hat)


def default_plan() -> Path:
    """The plan that ships with the package. Raises PlanError where this installation has none."""
    if not DEFAULT_PLAN.is_dir():
        raise PlanError(
            f"no plan was named and none ships with this installation ({str(DEFAULT_PLAN)!r} is absent); "
            "name one, on the command line with --engine DIR"
        )
    return DEFAULT_PLAN


def open_plan(
    path: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    threads: int | None = None,
    verify: bool = True,
) -> Plan:
    """Open a plan directory (by default the one in the package) on a backend: "auto", or a name such as "ort-cpu".

    `threads` limits the engine's CPU threads (None: one per core that this process may use). `verify` checks the
    SHA-256 of every file, about a second for 2.5 GB; without it sizes alone are checked.

    Raises PlanError (missing, truncated, edited, newer format), BackendError (named backend can't open), RequestError
    (threads).
    """
    if threads is not None and not (type(threads) is int and 1 <= threads <= 1024):
        raise RequestError(
            f"threads is {threads!r}, but must be a whole number in 1…1024; leave it out to use all cores"
        )
    check_name(backend)
    root = default_plan() if path is None else Path(path)
    manifest = read_manifest(root)
    # All but the content of the weights, so that engines read no graph that was changed.
    verify_files(root, manifest, hashes=False)
    verify_files(root, manifest, hashes=verify, names=[name for name in manifest.files if name != WEIGHTS])
    with ThreadPoolExecutor(1) as aside:
        # An engine opens on one core for the most part, and hashing wants none of its memory: both take their time
        # at once. What is wrong with the weights comes before what the engine says of them.
        weights = aside.submit(verify_files, root, manifest, hashes=verify, names=[WEIGHTS])
        try:
            opened, why = open_backend(backend, root, manifest, threads)
        except Exception:
            weights.result()
            raise
        try:
            weights.result()
        except BaseException:
            opened.close()
            raise
    return Plan(root, manifest, opened, why)


class Plan:
    """A model ready to run. Made by `open_plan`; close it, or use it in a `with` statement.

    May be used from several threads at once: each call has its own buffers, and gives exactly what it would give
    alone.
    """

    def __init__(self, path: Path, manifest: Manifest, backend: Backend, why: str) -> None:
        self.path = path
        self.manifest = manifest
        self.why = why
        """Why this backend was taken."""
        self._backend = backend
        self._constants = _load_constants(path, manifest, backend)
        self._features: _Recent[Buffer] = _Recent(CACHED)
        self._scheduled: _Recent[Buffer] = _Recent(CACHED)
        self._conditions: _Recent[Condition] = _Recent(CACHED)
        self._idle: list[State] = []
        self._lock = Lock()
        self._closed = False

    @property
    def backend_name(self) -> str:
        """The backend in use, for example "ort-cpu"."""
        return self._backend.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their indices, or None where the plan has none."""
        return self.manifest.model.class_names

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine and all buffers. Closing twice does nothing."""
        self._closed = True
        self._features.clear()
        self._scheduled.clear()
        self._conditions.clear()
        with self._lock:
            self._idle.clear()
        self._backend.close()

    def generate(
        self,
        control: image_io.Source | None = None,
        label: int | str | None = None,
        seed: int = 0,
        n: int = 1,
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_scales: Scales | None = None,
        control_scales: Scales | None = None,
        control_strength: float | None = None,
        stop_after: int | None = None,
        known_tokens: Any = None,
        known_mask: Any = None,
        on_scale: Callable[[ScaleResult], None] | None = None,
    ) -> Result:
        """Make n pictures from a class and, with CAR, a control image; picture i depends on seed + i only.

        control: path, PIL image or uint8 array [H, W] or [H, W, 3]; exactly what the plan wants: none for a VAR plan.
        label: class index, class name, or None for "no class".
        cfg: guidance, 0…1000, 0 = off, which halves the work. top_k: 0…vocab, 0 = off. top_p: 0…1, 0 = off. None: the
        plan's own.
        cfg_scales, control_scales: guidance, or the control, at these scales only: "2-5", "2-", "-5", 3, or a range;
        None: at all. control_strength: 0…2, by what the control's features are multiplied. stop_after: the last scale
        to draw; the picture is what the scales so far come to. docs/schedules.md says what these cost.
        known_tokens, known_mask: [L] or [n, L], tokens to keep where the mask is true (see `encode` and
        `known_mask`).
        on_scale: called after each scale of each batch (up to 4 pictures on a CPU).

        Raises RequestError, ImageError, and RunError when the engine fails.
        """
        began = perf_counter()
        request = sampling.resolve(
            self.manifest,
            label=label,
            seed=seed,
            n=n,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            cfg_scales=cfg_scales,
            control_scales=control_scales,
            control_strength=control_strength,
            stop_after=stop_after,
            known_tokens=known_tokens,
            known_mask=known_mask,
        )
        picture = self._control_image(control)
        clock = _Clock(self._backend)
        pictures, tokens = [], []
        for step, pictures_of_batch, state in self._run(picture, request, clock):
            if on_scale is not None:
                on_scale(self._scale_result(step, pictures_of_batch))
            if step.last:
                with clock.stage("decoder"):
                    self._decode(step.f_hat, state.image)
                tokens.append(state.all_tokens())
                pictures.append(self._backend.read(state.image))
        timings = clock.timings() | {"total": perf_counter() - began}
        return Result(
            images=np.concatenate(pictures), tokens=np.concatenate(tokens), request=request, timings=timings
        )

    def stream(
        self,
        control: image_io.Source | None = None,
        label: int | str | None = None,
        seed: int = 0,
        n: int = 1,
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_scales: Scales | None = None,
        control_scales: Scales | None = None,
        control_strength: float | None = None,
        stop_after: int | None = None,
        known_tokens: Any = None,
        known_mask: Any = None,
    ) -> Iterator[ScaleResult]:
        """Like `generate`, one scale at a time: batch after batch, each coarse to fine.

        A bad request raises here, not at the first scale. The last scale's `preview()` is the finished picture; with
        `stop_after` that scale is the last one.
        """
        request = sampling.resolve(
            self.manifest,
            label=label,
            seed=seed,
            n=n,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            cfg_scales=cfg_scales,
            control_scales=control_scales,
            control_strength=control_strength,
            stop_after=stop_after,
            known_tokens=known_tokens,
            known_mask=known_mask,
        )
        picture = self._control_image(control)
        return (self._scale_result(step, of) for step, of, _ in self._run(picture, request, _Clock(self._backend)))

    def encode(self, pictures: image_io.Source | Sequence[image_io.Source]) -> NDArray[np.int64]:
        """Multi-scale tokens of pictures (VAR algorithm 1), int64 [n, L].

        pictures: one, or a sequence, of paths, PIL images or uint8 arrays [H, W, 3]; or one array uint8 [n, H, W, 3].
        Other sizes are stretched to the model's image_size. Transparent parts count as white.
        """
        self._check_open()
        if "encoder" not in self.manifest.graphs:
            raise RequestError(f"the plan {self.manifest.name!r} has no encoder; export it again with one")
        many = isinstance(pictures, (list, tuple)) or (isinstance(pictures, np.ndarray) and pictures.ndim == 4)
        sources: list[Any] = list(pictures) if many else [pictures]  # type: ignore[arg-type]
        if not sources:
            raise RequestError("there are no pictures to encode; give at least one")
        return np.concatenate([self._encode_one(source) for source in sources])

    def known_mask(self, repaint: Any) -> NDArray[np.bool_]:
        """The tokens to keep, bool [L], when the pixels where `repaint` (bool [H, W]) is true are to be made anew."""
        return sampling.known_mask_of(repaint, self.manifest.scales)

    def _encode_one(self, source: image_io.Source) -> NDArray[np.int64]:
        size = self.manifest.model.image_size
        picture = image_io.square(image_io.load_image(source, background=image_io.WHITE), size)
        image = self._backend.allocate((1, size, size, 3), "uint8")
        self._backend.write(image, picture[None])
        tokens = self._backend.allocate((1, self.manifest.tokens), "int64")
        self._backend.run("encoder", {"image": image}, {"tokens": tokens})
        return self._backend.read(tokens)

    def _control_image(self, control: image_io.Source | None) -> Image.Image | None:
        self._check_open()
        check_control(self.manifest, control is not None)
        return None if control is None else image_io.load_image(control)

    def _run(
        self, picture: Image.Image | None, request: sampling.Request, clock: _Clock
    ) -> Iterator[tuple[Step, range, State]]:
        """All scales of all batches. The step's buffers and the state are the caller's until it asks for the next."""
        features = None
        with clock.stage("control"):
            if picture is not None:
                features = self._scheduled_features(picture, request.schedule)
        for of in _batches(len(request.seeds), self._backend.batches):
            part = request.part(slice(of.start, of.stop))
            R = len(of) * (2 if request.guided or self._backend.guided_only else 1)
            with clock.stage("condition"):
                condition = self._condition(part.label, len(of), R)
            with self._state(len(of), R) as state:
                state.load(part, condition, features)
                for step in run_scales(self._backend, self.manifest.scales, self._constants, state):
                    clock.add(f"scale_{step.index}", step.began, step.ended)
                    yield step, of, state

    def _scheduled_features(self, picture: Image.Image, schedule: Schedule) -> Buffer:
        """The control's features as a schedule wants them, f32 [L, C]: as they are, or a copy of their own."""
        features = self._control_features(picture)
        if schedule.plain_control:
            return features
        key = (_digest(picture), schedule.control_scales, schedule.control_strength)
        return self._scheduled.get(key, lambda: self._compute_scheduled(features, schedule))

    def _compute_scheduled(self, features: Buffer, schedule: Schedule) -> Buffer:
        """Zeros, but at the scales of the schedule the features times its strength."""
        first, last = (self.manifest.scales[schedule.control_scales[end]] for end in (0, -1))
        wanted = slice(first.start, last.stop)
        features_LC = self._backend.read(features)
        changed_LC = np.zeros_like(features_LC)
        changed_LC[wanted] = features_LC[wanted] * np.float32(schedule.control_strength)
        changed = self._backend.allocate(changed_LC.shape, "float32")
        self._backend.write(changed, changed_LC)
        return changed

    def _control_features(self, picture: Image.Image) -> Buffer:
        """CAR's control features, f32 [L, C]: the same for every seed, class and guidance row."""
        return self._features.get(_digest(picture), lambda: self._compute_features(picture))

    def _compute_features(self, picture: Image.Image) -> Buffer:
        inputs = {}
        for k, pixels in enumerate(image_io.control_pyramid(picture, self.manifest.scales)):
            inputs[f"control_{k}"] = self._backend.allocate(pixels.shape, "uint8")
            self._backend.write(inputs[f"control_{k}"], pixels)
        features = self._backend.allocate((self.manifest.tokens, self.manifest.model.width), "float32")
        self._backend.run("control", inputs, {"features": features})
        return features

    def _condition(self, label: int, B: int, R: int) -> Condition:
        """Start tokens and modulation: B rows of the class, then "no class" rows for guidance."""
        labels = [label] * B + [self.manifest.model.classes] * (R - B)
        return self._conditions.get(tuple(labels), lambda: self._compute_condition(labels))

    def _compute_condition(self, labels: list[int]) -> Condition:
        R, C = len(labels), self.manifest.model.width
        M = int(self.manifest.graphs["condition"].output("modulation").shape[1])
        label = self._backend.allocate((R,), "int64")
        self._backend.write(label, np.array(labels, np.int64))
        condition = Condition(
            start=self._backend.allocate((R, 1, 1, C), "float32"),
            modulation=self._backend.allocate((R, M, C), "float32"),
        )
        outputs = {"start": condition.start, "modulation": condition.modulation}
        self._backend.run("condition", {"label": label}, outputs)
        return condition

    def _decode(self, f_hat: Buffer, image: Buffer) -> None:
        """f̂ to pictures, one at a time: a batch would take a multiple of the memory and be no faster on a CPU."""
        self._check_open()
        for i in range(f_hat.shape[0]):
            self._backend.run("decoder", {"f_hat": f_hat[i : i + 1]}, {"image": image[i : i + 1]})

    def _preview(self, f_hat_BZEE: NDArray[np.float32]) -> NDArray[np.uint8]:
        self._check_open()
        size = self.manifest.model.image_size
        f_hat = self._backend.allocate(f_hat_BZEE.shape, "float32")
        image = self._backend.allocate((len(f_hat_BZEE), size, size, 3), "uint8")
        self._backend.write(f_hat, f_hat_BZEE)
        self._decode(f_hat, image)
        return self._backend.read(image)

    @contextmanager
    def _state(self, B: int, R: int) -> Iterator[State]:
        """Buffers of the loop for a batch. The latest set is kept: allocating 270 MB anew costs page faults."""
        with self._lock:
            state = self._idle.pop() if self._idle else None
        if state is None or (state.batch, state.row_count) != (B, R):
            state = None
            state = State(self._backend, self.manifest, B, R)
        try:
            yield state
        finally:
            with self._lock:
                if not self._closed:
                    self._idle[:] = [state]

    def _scale_result(self, step: Step, pictures: range) -> ScaleResult:
        return ScaleResult(
            index=step.index,
            last=step.last,
            pictures=pictures,
            tokens=self._backend.read(step.tokens),
            f_hat=self._backend.read(step.f_hat),
            seconds=self._backend.seconds(step.began, step.ended),
            plan=self,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(f"the plan {self.manifest.name!r} is closed; open it again with open_plan")


def check_control(manifest: Manifest, given: bool) -> None:
    """Raise RequestError when a control image is missing, or given to a plan that has no control branch."""
    kind = manifest.model.control_type
    if kind is not None and not given:
        raise RequestError(
            f"the plan {manifest.name!r} follows a control image of type {kind!r} and none was given; "
            "give control=…, on the command line --control FILE or --photo FILE"
        )
    if kind is None and given:
        raise RequestError(
            f"the plan {manifest.name!r} has no control branch (plain VAR); leave the control image out"
        )


def _digest(picture: Image.Image) -> bytes:
    """What tells control images apart: their bytes and their shape."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()


def _load_constants(root: Path, manifest: Manifest, backend: Backend) -> list[dict[str, Buffer]]:
    """Each scale's constants as buffers, step input name → buffer. All of them together are a few MB."""
    names = {name for scale in manifest.scales for name in scale.constants.values()}
    buffers: dict[str, Buffer] = {}
    if names:
        weights = np.memmap(root / WEIGHTS, np.uint8, "r")
    for name in names:
        tensor = manifest.tensors[name]
        raw = weights[tensor.offset : tensor.offset + tensor.bytes]
        buffers[name] = backend.allocate(tensor.shape, tensor.dtype)
        backend.write(buffers[name], raw.view(np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape))
    return [{port: buffers[name] for port, name in scale.constants.items()} for scale in manifest.scales]


class _Recent(Generic[T]):
    """The most recently used results, by key. Threads that want the same new one at once each compute it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[object, T] = OrderedDict()
        self._lock = Lock()

    def get(self, key: object, compute: Callable[[], T]) -> T:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = compute()
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


class _Clock:
    """Seconds of each stage, summed over the batches. Read at the end: until then nothing waits for a GPU."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._marks: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = self._backend.mark()
        yield
        self.add(name, began, self._backend.mark())

    def add(self, name: str, began: Mark, ended: Mark) -> None:
        self._marks.append((name, began, ended))

    def timings(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for name, began, ended in self._marks:
            seconds[name] = seconds.get(name, 0.0) + self._backend.seconds(began, ended)
        return seconds


def _batches(n: int, sizes: Sequence[int]) -> Iterator[range]:
    """0 … n − 1 cut into batches of these sizes, large ones first."""
    first = 0
    while first < n:
        size = max(size for size in sizes if size <= n - first)
        yield range(first, first + size)
        first += size
