"""An opened plan: the package's programming interface.

    with open_plan("d16.plan") as plan:
        first = plan.generate("edges.png", label="cat", seed=0)
        second = plan.generate("edges.png", label="cat", seed=1)   # control and class are not computed again

Shapes: n images asked for; B images of one batch; R transformer rows; K scales; S side of a scale in tokens; L tokens
per image; H, W pixels; E side of f̂; Z latent channels; V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, overload
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from car_runtime import images as image_io
from car_runtime.backends.base import Backend, Buffer, Mark
from car_runtime.backends.registry import check_name, open_backend
from car_runtime.batch import Drawing, Rows, batches, rows_of
from car_runtime.buffers import LoopBuffers, Steering
from car_runtime.conditioning import Conditioning
from car_runtime.config import GenerationConfig, config_of
from car_runtime.detection import unexpected_codes
from car_runtime.editing.edit import composite
from car_runtime.editing.masks import known_mask_of
from car_runtime.errors import CarError, ImageError, PlanError, RequestError
from car_runtime.format.folder import PlanFolder, open_folder
from car_runtime.format.hashing import verify_folder
from car_runtime.format.manifest import WEIGHTS, Manifest, manifest_in, open_plan_folder
from car_runtime.format.parameters import stored_arrays
from car_runtime.fusions import Fusions
from car_runtime.generate import ScaleLoop, Step
from car_runtime.hub import located
from car_runtime.request import Request, check_fit, check_threads, resolve, resolve_watermark
from car_runtime.watermark import Detection, Pattern, Watermark

OPENINGS = 5
"""A plan that is replaced while it is opened loses its files; its successor is opened then, so many times in all."""
DEFAULT_PLAN = Path(__file__).parent / "plans" / "emoji.plan"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Images and how they came about."""

    images: NDArray[np.uint8]
    """uint8 [n, H, W, 3]."""
    tokens: NDArray[np.int64]
    """int64 [n, L], coarse scales first, row by row; −1 at scales that were not drawn."""
    request: Request
    """The request with every default filled in: label index, seeds, sampling, schedule."""
    edited: tuple[NDArray[np.uint8], ...] | None = None
    """With an edit: the edited images, of a part at the size of the photo's frame, uint8 [H, W, 3 or 4] each."""
    timings: dict[str, float]
    """Seconds: `control`, `condition`, `scale_0` …, `decoder`, `total`. What was cached costs next to nothing."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What about the control is probably not as meant, a line each: inverted, blank, not square …"""
        return self.request.warnings


class ScaleResult:
    """A batch of images after one more scale. It stays valid when the stream goes on.

    Values are fetched from the engine when they are first looked at, or when the stream goes on: a loop that nobody
    watches waits for nothing. Once the plan is closed only what was fetched is there.
    """

    def __init__(self, plan: Plan, step: Step, batch: Sequence[Drawing]) -> None:
        self.plan = plan
        self.index = step.index
        """The scale, 0 … K−1."""
        self.last = step.last
        """Whether it is the last one that is drawn."""
        positions = tuple(drawing.position for drawing in batch)
        neighbours = range(positions[0], positions[-1] + 1)
        self.images: Sequence[int] = neighbours if tuple(neighbours) == positions else positions
        """Which of the n images these are; of `stream_many`, positions among the images of all its configs."""
        self.requests: tuple[int, ...] = tuple(drawing.owner for drawing in batch)
        """The config that each of `images` belongs to: its position among those that were given."""
        self._step: Step | None = step
        self._values: dict[str, Any] = {}
        self._lock = Lock()

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64 [B, S, S], this scale's."""
        tokens: NDArray[np.int64] = self._fetch("tokens")
        return tokens

    @property
    def f_hat(self) -> NDArray[np.float32]:
        """f32 [B, Z, E, E], the sum of all scales so far."""
        f_hat: NDArray[np.float32] = self._fetch("f_hat")
        return f_hat

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """f32 [B, S, S, V], guided, before top-k and top-p; None unless the stream was asked for them."""
        logits: NDArray[np.float32] | None = self._fetch("logits")
        return logits

    @property
    def seconds(self) -> float:
        """Time that this scale took, in seconds."""
        return float(self._fetch("seconds"))

    def preview(self, rows: Sequence[int] | None = None) -> NDArray[np.uint8]:
        """The images as they are now, uint8 [B, H, W, 3]; after the last scale, the finished ones.

        rows: decode only these of the B, by position, in this order; each costs a run of the decoder.
        """
        f_hat = self.f_hat
        return self.plan._preview(f_hat if rows is None else f_hat[list(rows)])

    def _fetch(self, name: str) -> Any:
        """A value by name, from the engine the first time. Another thread that looks holds up `_keep`."""
        with self._lock:
            if name not in self._values:
                assert self._step is not None
                self._values[name] = self.plan._read_step(self._step, name)
            return self._values[name]

    def _keep(self) -> None:
        """Fetch everything: the engine's buffers are about to be used for other things."""
        for name in ("tokens", "f_hat", "logits", "seconds"):
            self._fetch(name)
        self._step = None  # or a result that somebody keeps would keep them too


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
    require_signature: str | os.PathLike[str] | None = None,
    trust_engines: bool = False,
) -> Plan:
    """Open a plan on a backend: "auto", or a name such as "ort-cpu".

    `path`: its directory, by default the one in the package, or "hf:ORG/NAME[@REVISION]" for one on the hub, which is
    fetched unless it is here already (extra `hub`).
    `threads` limits the engine's CPU threads (None: one per core that this process may use). `verify` checks the
    SHA-256 of every file, about a second for 2.5 GB; without it sizes alone are checked. `require_signature`: a
    public key (Ed25519, PEM file) by which the plan must be signed; needs `verify` and the extra `sign`.
    `trust_engines`: load compiled engines and runtime caches that were not built on this machine; they are code.

    Raises PlanError (missing, truncated, edited, newer format, not so signed), BackendError (named backend can't
    open), RequestError (threads, key).
    """
    check_threads(threads)
    check_name(backend)
    for name, value in (("verify", verify), ("trust_engines", trust_engines)):
        if not isinstance(value, (int, np.bool_)):
            raise RequestError(f"{name} is {value!r}, but must be True or False; leave it out for {name == 'verify'}")
    if require_signature is not None and not verify:
        raise RequestError("a signature vouches for hashes, and they are not to be checked; leave out verify=False")
    root = default_plan() if path is None else located(path)
    for left in reversed(range(OPENINGS)):
        folder = open_plan_folder(root)
        try:
            folder.hold()
            manifest = manifest_in(folder, require_signature)
            return _open_checked(root, folder, manifest, backend, threads, verify, trust_engines)
        except BaseException as error:
            replaced = isinstance(error, CarError) and folder.is_replaced
            folder.close()
            if not (left and replaced):
                raise
    raise AssertionError("the last opening returns or raises")


def _open_checked(
    root: Path,
    folder: PlanFolder,
    manifest: Manifest,
    backend: str,
    threads: int | None,
    verify: bool,
    trust_engines: bool,
) -> Plan:
    if manifest.model.branches and manifest.table_problem is not None:
        raise PlanError(manifest.table_problem)  # a step takes the parameters of its branches from the table
    # All but the content of the weights, so that engines read no graph that was changed.
    verify_folder(folder, manifest, hashes=False, names=[WEIGHTS])
    verify_folder(folder, manifest, hashes=verify, names=[name for name in manifest.files if name != WEIGHTS])
    with ThreadPoolExecutor(1) as aside:
        # An engine opens on one core for the most part, and hashing wants none of its memory: both take their time
        # at once. What is wrong with the weights comes before what the engine says of them.
        weights = aside.submit(verify_folder, folder, manifest, hashes=verify, names=[WEIGHTS])
        try:
            opened, why = open_backend(backend, folder.held, manifest, threads, folder, trust_engines)
        except Exception as error:
            weights.result()
            if isinstance(error, CarError) and str(folder.held) in str(error):  # it means the plan's own path
                raise type(error)(str(error).replace(str(folder.held), str(root))) from error
            raise
        why = why.replace(str(folder.held), str(root))  # so do the reasons why others were passed over
        try:
            weights.result()
            if not getattr(opened, "holds_files", False):  # it opened them by name, after they were hashed or before
                folder.check_unchanged()
            _check_phis(folder, manifest)
        except BaseException:
            opened.close()
            raise
    return Plan(root, manifest, opened, why, folder)


class Plan:
    """A model ready to run. Made by `open_plan`; close it, or use it in a `with` statement.

    May be used from several threads at once: each call has its own buffers, and gives exactly what it would give
    alone.
    """

    def __init__(
        self, path: Path, manifest: Manifest, backend: Backend, why: str, folder: PlanFolder | None = None
    ) -> None:
        """`folder`: the plan's files as they were checked; the plan closes it in the end. By default `path`'s."""
        self.path = path
        self._folder = open_folder(path) if folder is None else folder
        self.manifest = manifest
        self.why = why
        """Why this backend was taken."""
        self._backend = backend
        self._constants = _load_constants(self._folder, manifest, backend)
        self._conditioning = Conditioning(backend, manifest)
        self._fusions = Fusions(backend, manifest, self._folder)
        self._watermarks: dict[bytes, Watermark] = {}
        self._encoder_checked = False
        self._idle: list[LoopBuffers] = []
        self._lock = Lock()
        self._closed = False
        self._opened_in = os.getpid()
        _OPEN.add(self)

    @property
    def backend_name(self) -> str:
        """The backend in use, for example "ort-cpu"."""
        return self._backend.name

    @property
    def shared_batch(self) -> int:
        """How many images of different requests a step makes at once: 1 where `generate_many` takes them in turn."""
        return max(self._backend.batches) if self.manifest.format > 1 else 1

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their indices, or None where the plan has none.

        Of 1,000 classes without names: ImageNet's.
        """
        return self.manifest.model.names

    def backend_report(self) -> dict[str, Any]:
        """What the backend says of itself: engine and version, memory in bytes, precision, captured graphs …"""
        return self._backend.report()

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine and all buffers. Closing twice does nothing, as does closing in a forked process."""
        if self._is_forked:
            return
        self._closed = True
        self.forget()
        with self._lock:
            self._idle.clear()
        self._backend.close()
        self._folder.close()

    def forget(self) -> None:
        """Drop what is kept of control images and classes: the next call computes them anew, as the first one did."""
        if not self._is_forked:
            self._conditioning.forget()

    @overload
    def generate(
        self,
        config: GenerationConfig | Request,
        *,
        on_scale: Callable[[ScaleResult], None] | None = None,
        **changes: Any,
    ) -> Result: ...

    @overload
    def generate(
        self,
        control: image_io.Source | None = None,
        label: int | str | None = None,
        seed: int = 0,
        n: int = 1,
        *,
        on_scale: Callable[[ScaleResult], None] | None = None,
        **settings: Any,
    ) -> Result: ...

    def generate(self, *given: Any, on_scale: Callable[[ScaleResult], None] | None = None, **settings: Any) -> Result:
        """Make n images from a class and, with CAR, a control image; image i depends on seed + i only.

        Takes a `GenerationConfig`, whose fields are all the settings there are, or the settings themselves:
        `generate(control, label, seed, n, cfg=…, top_k=…, …)`. Settings after a config replace its own. A `Request`
        of `car_runtime.request.resolve` for this plan is taken as it is.
        on_scale: called after each scale of each batch (up to 4 images on a CPU).

        Raises RequestError, ImageError, and RunError when the engine fails.
        """
        request = self._request(given, settings)
        return self._draw([request], on_scale)[0]

    def generate_many(
        self,
        configs: Sequence[GenerationConfig | Request],
        *,
        on_scale: Callable[[ScaleResult], None] | None = None,
    ) -> list[Result]:
        """Make the images of several configs, with controls, classes, seeds and settings of their own.

        Configs that follow the same branches and draw as many scales share steps, with a plan of format 2; with one
        of format 1 they take turns. Each image is the one that `generate` makes of its config alone. A result's
        `timings` are those of the whole call. on_scale: called after each scale of each batch, whose `images` and
        `requests` say whose it is.

        Raises as `generate`, with the position of the config.
        """
        return self._draw(self._requests(configs), on_scale)

    def _draw(self, requests: Sequence[Request], on_scale: Callable[[ScaleResult], None] | None) -> list[Result]:
        """The results of all requests."""
        _check_function("on_scale", on_scale)
        began, clock = perf_counter(), _Clock(self._backend)
        requests = [self._harmonised(r) if r.edit is not None and r.edit.harmonise else r for r in requests]
        images: list[dict[int, NDArray[np.uint8]]] = [{} for _ in requests]
        tokens: list[dict[int, NDArray[np.int64]]] = [{} for _ in requests]
        for scale, loop in self._scales(requests, clock, watched=on_scale is not None):
            if on_scale is not None:
                on_scale(scale)
            if scale.last:
                buffers = loop.buffers
                if loop.decoding is not None:
                    clock.add("decoder", *loop.decoding)
                else:
                    with clock.stage("decoder"):
                        self._decode(buffers.final_f_hat, buffers.image)
                tokens_BL, images_B = buffers.all_tokens(), self._backend.read(buffers.image)
                clock.settle()  # before somebody else has the buffers, and replays what was recorded on them
                for i, drawing in enumerate(loop.batch):
                    tokens[drawing.owner][drawing.index] = tokens_BL[i]
                    images[drawing.owner][drawing.index] = images_B[i]
        timings = clock.timings() | {"total": perf_counter() - began}
        results = []
        for request, drawn, own in zip(requests, images, tokens, strict=True):
            stacked = np.stack([drawn[i] for i in range(len(request.seeds))])
            results.append(
                Result(
                    images=stacked,
                    tokens=np.stack([own[i] for i in range(len(request.seeds))]),
                    request=request,
                    timings=dict(timings),
                    edited=None if request.edit is None else tuple(map(request.edit.finished, stacked)),
                )
            )
        return results

    def _harmonised(self, request: Request) -> Request:
        """The second request of an edit: coarse scales from the images with their first results put in."""
        edit = request.edit
        assert edit is not None
        plain = replace(request, edit=replace(edit, harmonise=0))
        first, size = self.generate(plain), self.manifest.model.image_size
        known = np.concatenate([self.encode(composite(edit, drawn, size)) for drawn in first.images])
        mask = np.broadcast_to(edit.known_mask, known.shape).copy()
        mask[:, : self.manifest.scales[edit.harmonise - 1].stop] = True
        return replace(plain, known=np.where(mask, known, 0), known_mask=mask)

    def _edited(self, request: Request) -> Request:
        """The request, which the backend can draw, with the tokens of the image that it changes, if it does."""
        self._check_backend(request)
        edit = request.edit
        if edit is None or request.encoded:
            return request
        tokens_L = edit.edit.tokens
        if tokens_L is None:
            tokens_L = self.encode(edit.frame.view(self.manifest.model.image_size))[0]
        mask_L = edit.known_mask & (tokens_L >= 0)
        known_L, shape = np.where(mask_L, tokens_L, 0), request.known.shape
        known, mask = np.broadcast_to(known_L, shape).copy(), np.broadcast_to(mask_L, shape).copy()
        return replace(request, known=known, known_mask=mask, encoded=True)

    @overload
    def stream(
        self, config: GenerationConfig | Request, *, logits: bool = False, **changes: Any
    ) -> Iterator[ScaleResult]: ...

    @overload
    def stream(
        self,
        control: image_io.Source | None = None,
        label: int | str | None = None,
        seed: int = 0,
        n: int = 1,
        *,
        logits: bool = False,
        **settings: Any,
    ) -> Iterator[ScaleResult]: ...

    def stream(self, *given: Any, logits: bool = False, **settings: Any) -> Iterator[ScaleResult]:
        """Like `generate`, one scale at a time: batch after batch, each coarse to fine.

        logits: whether every scale also gives its logits. With all tokens known, this is teacher forcing.
        A bad request raises here, not at the first scale. The last scale's `preview()` is the finished images; with
        `stop_after` that scale is the last one.
        """
        request = self._request(given, settings)
        if logits:
            self._check_logits()
        scales = self._scales([request], _Clock(self._backend), watched=True, logits=logits)
        return (scale for scale, _ in scales)

    def stream_many(
        self,
        configs: Sequence[GenerationConfig | Request],
        *,
        cancelled: Callable[[int], bool] | None = None,
        logits: bool = False,
    ) -> Iterator[ScaleResult]:
        """Like `generate_many`, one scale at a time; `images` and `requests` of a scale say whose it is.

        cancelled: asked before each scale with the position of a config, whose remaining scales are left out from
            the first True on: the others go on without its rows, where the backend has steps for so many images as
            are left. It is called from this thread alone.
        logits: as `stream` has it.

        A bad config raises here, not at the first scale.
        """
        requests = self._requests(configs)
        _check_function("cancelled", cancelled)
        if logits:
            self._check_logits()
        clock = _Clock(self._backend)
        return (scale for scale, _ in self._scales(requests, clock, watched=True, logits=logits, cancelled=cancelled))

    def _requests(self, configs: Sequence[GenerationConfig | Request]) -> list[Request]:
        """All configs, checked against this plan. Raises as `_request`, with the position of the config."""
        requests = []
        if not isinstance(configs, Iterable):
            raise RequestError(f"configs is {configs!r}; give a list of GenerationConfig")
        for position, config in enumerate(configs):
            if not isinstance(config, (GenerationConfig, Request)):
                raise RequestError(f"config {position} is {config!r}; give a GenerationConfig or a Request")
            try:
                requests.append(self._request((config,), {}))
            except (RequestError, ImageError) as error:
                raise type(error)(f"config {position}: {error}") from error
        return requests

    def encode(self, images: image_io.Source | Sequence[image_io.Source], *, fit: str = "crop") -> NDArray[np.int64]:
        """Multi-scale tokens of images (VAR algorithm 1), int64 [n, L].

        images: one, or a sequence, of paths, PIL images or uint8 arrays [H, W, 3]; or one array uint8 [n, H, W, 3].
        fit: of those that aren't square, the middle ("crop"), all on white margins ("pad"), or distorted ("stretch").
        Transparent parts count as white.
        """
        self._check_open()
        check_fit(fit)
        if "encoder" not in self.manifest.graphs:
            raise RequestError(f"the plan {self.manifest.name!r} has no encoder; export it again with one")
        many = isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4)
        sources: list[Any] = list(images) if many else [images]  # type: ignore[arg-type]
        if not sources:
            raise RequestError("there are no images to encode; give at least one")
        return np.concatenate([self._encode_one(source, fit) for source in sources])

    def detect(self, image: image_io.Source, key: str | bytes, *, fit: str = "crop") -> Detection:
        """Whether an image has the watermark of a key (`GenerationConfig.watermark`): encoded, and tested.

        Raises RequestError: a plan of format 1, without encoder or logits, an empty key. ImageError.
        """
        self._check_open()
        digest = resolve_watermark(self.manifest, key)
        assert digest is not None
        pattern = Pattern(self.manifest, self._folder)
        return pattern.detect(unexpected_codes(self, image, pattern.codes, fit), digest)

    def known_mask(self, repaint: Any, rule: Literal["published", "strict"] = "published") -> NDArray[np.bool_]:
        """The tokens to keep, bool [L], when the pixels where `repaint` (bool [H, W]) is true are to be made anew.

        rule: "published", as VAR's zero-shot editing does it, or "strict", by the area of every token; see
        `car_runtime.editing.masks.known_mask_of`. Raises RequestError.
        """
        return known_mask_of(repaint, self.manifest.scales, rule)

    def _encode_one(self, source: image_io.Source, fit: str) -> NDArray[np.int64]:
        size = self.manifest.model.image_size
        image = image_io.load_image(source, background=image_io.WHITE)
        pixels = np.array(image_io.fitted(image, size, fit, image_io.WHITE), np.uint8)
        buffer = self._backend.allocate((1, size, size, 3), "uint8")
        self._backend.write(buffer, pixels[None])
        tokens = self._backend.allocate((1, self.manifest.tokens), "int64")
        self._backend.run("encoder", {"image": buffer}, {"tokens": tokens})
        if not self._encoder_checked:  # engines may open it only now, by name
            if not getattr(self._backend, "holds_files", False):
                self._folder.check_unchanged()
            self._encoder_checked = True
        return self._backend.read(tokens)

    def _request(self, given: tuple[Any, ...], settings: dict[str, Any]) -> Request:
        """What a call's arguments come to for this plan."""
        self._check_open()
        if "config" in settings:
            given = (settings.pop("config"), *given)
        if not (given and isinstance(given[0], Request)):
            return self._edited(resolve(self.manifest, config_of(*given, **settings)))
        request = given[0]
        if given[1:] or settings:
            raise RequestError("a request stands alone; give a GenerationConfig to change settings of it")
        if request.manifest is not self.manifest and request.manifest != self.manifest:
            raise RequestError(
                f"the request is not for the plan {self.manifest.name!r}; resolve it against this plan"
            )
        return self._edited(request)

    def _scales(
        self,
        requests: Sequence[Request],
        clock: _Clock,
        *,
        watched: bool,
        logits: bool = False,
        cancelled: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[ScaleResult, ScaleLoop]]:
        """All scales of all batches: the one way through the loop. Its buffers are the caller's until it goes on.

        watched: whether somebody may look at a scale later on, so that its values are fetched before it goes on. Else
            all scales are made in one go, where they can be, and the images with them.
        """
        gone: set[int] = set()

        def waited_for(batch: Sequence[Drawing]) -> list[int]:
            """Places in the batch of the images that somebody still wants."""
            if cancelled is not None:
                gone.update(owner for owner in {d.owner for d in batch} - gone if cancelled(owner))
            return [i for i, drawing in enumerate(batch) if drawing.owner not in gone]

        for whole in batches(requests, self._backend.batches, shared=self.manifest.format > 1):
            batch = tuple(whole[i] for i in waited_for(whole))
            if not batch:
                continue
            rows = rows_of(batch, 0, self._backend.guided_only)
            steering = self._steering(batch, rows, clock)
            branches = tuple(control.branch for control in batch[0].request.controls)
            with self._buffers(len(batch), len(rows.image), logits, branches) as buffers:
                buffers.load(batch, rows, steering)
                loop = ScaleLoop(self._backend, self.manifest, self._constants, batch, buffers)
                for step in self._steps(loop, in_one=not watched):
                    clock.add(f"scale_{step.index}", step.began, step.ended)
                    scale = ScaleResult(self, step, loop.batch)
                    try:
                        yield scale, loop
                    finally:
                        if watched and not self._closed:
                            scale._keep()
                    self._check_process()
                    kept = waited_for(loop.batch)
                    if not kept:
                        break
                    if len(kept) < len(loop.batch) and len(kept) in self._backend.batches and not loop.done:
                        self._keep(loop, kept, logits, clock)

    def _steps(self, loop: ScaleLoop, *, in_one: bool) -> Iterator[Step]:
        """The steps of a loop."""
        if in_one and loop.unbroken:
            yield from loop.finish(self._decode)
        while not loop.done:
            yield loop.step()

    def _keep(self, loop: ScaleLoop, images: Sequence[int], logits: bool, clock: _Clock) -> None:
        """Let a loop go on with some of its images alone."""
        batch = tuple(loop.batch[i] for i in images)
        rows = rows_of(batch, 0, self._backend.guided_only)
        buffers = LoopBuffers(
            self._backend, self.manifest, len(batch), len(rows.image), logits, loop.buffers.branches
        )
        buffers.load(batch, rows, self._steering(batch, rows, clock))
        loop.keep(images, buffers)

    def _steering(self, batch: Sequence[Drawing], rows: Rows, clock: _Clock) -> Steering:
        """What steers a batch: of its controls and of its classes."""
        labels = rows.labels(batch, self.manifest.model.classes)
        apart = self.manifest.format > 1
        with clock.stage("control"):
            features, images = {}, batch if apart else batch[:1]
            requests = {drawing.owner: drawing.request for drawing in images}
            for n, control in enumerate(batch[0].request.controls):
                made = {
                    owner: self._conditioning.control(control.branch, request.controls[n].image, request.schedule)
                    for owner, request in requests.items()
                }
                features[control.branch] = [made[drawing.owner] for drawing in images]
        with clock.stage("condition"):
            modulations = {name: self._conditioning.modulation(name, labels) for name in features} if apart else {}
            return Steering(
                condition=self._conditioning.condition(labels),
                modulations=modulations,
                features=features,
                fusions=self._fusions.of(tuple(features)),
                watermarks=self._watermarks_of(batch),
            )

    def _watermarks_of(self, batch: Sequence[Drawing]) -> Sequence[Watermark | None]:
        """Of each image; empty where none has one. The latest key's is kept."""
        keys = [drawing.request.watermark for drawing in batch]
        made = self._watermarks
        for key in set(keys) - {None} - made.keys():
            assert key is not None
            made = {**made, key: Pattern(self.manifest, self._folder).watermark(key)}
        self._watermarks = {key: made[key] for key in keys if key is not None} or made
        return [None if key is None else made[key] for key in keys] if any(keys) else ()

    @contextmanager
    def _buffers(self, B: int, R: int, logits: bool, branches: tuple[str, ...]) -> Iterator[LoopBuffers]:
        """Buffers of the loop for a batch. The latest set is kept: allocating 270 MB anew costs page faults."""
        with self._lock:
            buffers = self._idle.pop() if self._idle else None
        wanted = (B, R, logits, branches)
        if buffers is None or wanted != (
            *(buffers.batch, buffers.row_count),
            *(buffers.logits is not None, buffers.branches),
        ):
            buffers = None  # before the new ones are allocated
            buffers = LoopBuffers(self._backend, self.manifest, B, R, logits, branches)
        try:
            yield buffers
        finally:
            with self._lock:
                if not self._closed:
                    self._idle[:] = [buffers]

    def _decode(self, f_hat: Buffer, image: Buffer) -> None:
        """f̂ to images, one at a time: a batch would take a multiple of the memory and be no faster on a CPU."""
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

    def _read_step(self, step: Step, name: str) -> Any:
        """One of the values of a `ScaleResult`, from the loop's buffers."""
        self._check_open()
        if name == "seconds":
            return self._backend.seconds(step.began, step.ended)
        buffer: Buffer | None = getattr(step, name)
        return None if buffer is None else self._backend.read(buffer)

    @property
    def _is_forked(self) -> bool:
        """Whether this is a copy, made by a fork, of a plan that another process opened."""
        return self._opened_in != os.getpid()

    def _check_backend(self, request: Request) -> None:
        """Raise RequestError for what the engines of this backend have no shapes for."""
        backend, mixed = self._backend, len(request.controls)
        if backend.max_mixed is not None and mixed > backend.max_mixed:
            raise RequestError(
                f"the backend {backend.name!r} mixes {backend.max_mixed} control branch into a step, not {mixed}; "
                "give one control, or use another backend, e.g. ort-cuda or ort-cpu"
            )
        if backend.guided_only and request.control_cfg > 0:
            raise RequestError(
                f"the backend {backend.name!r} has no rows without control, which control_cfg "
                f"{request.control_cfg:g} needs; leave it at 0, or use another backend, e.g. ort-cuda or ort-cpu"
            )

    def _check_logits(self) -> None:
        if not any(port.name == "logits" for port in self.manifest.graphs["step"].outputs):
            raise RequestError(f"the plan {self.manifest.name!r} gives no logits; export it again with this version")

    def _check_process(self) -> None:
        if self._is_forked:
            raise RequestError(
                f"the plan {self.manifest.name!r} was opened in another process, whose engine does not work here; "
                "open it again here with open_plan"
            )

    def _check_open(self) -> None:
        self._check_process()
        if self._closed:
            raise RequestError(f"the plan {self.manifest.name!r} is closed; open it again with open_plan")


_OPEN: WeakSet[Plan] = WeakSet()


def _abandon_open_plans() -> None:
    """In a forked child: plans of the parent are marked closed, and kept for good.

    An engine that is freed waits for its threads, or speaks to its GPU, and the child has neither: it would hang,
    even if it just ended. A reference that nobody gives back keeps all that a plan holds.
    """
    for plan in _OPEN:
        plan._closed, plan._lock = True, Lock()  # which a thread may hold that is not here
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(plan))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_open_plans)


def _load_constants(folder: PlanFolder, manifest: Manifest, backend: Backend) -> list[dict[str, Buffer]]:
    """Each scale's constants as buffers, step input name → buffer. All of them together are a few MB."""
    names = {name for scale in manifest.scales for name in scale.constants.values()}
    stored = stored_arrays(folder, {name: manifest.tensors[name] for name in names})
    buffers = {name: backend.constant(values, manifest.tensors[name].dtype) for name, values in stored.items()}
    return [{port: buffers[name] for port, name in scale.constants.items()} for scale in manifest.scales]


def _check_phis(folder: PlanFolder, manifest: Manifest) -> None:
    """Each scale's φ is among those of the table: a backend's own kernels add its number to an address.

    Raises PlanError.
    """
    table = manifest.parameters.get("vqvae.quantizer.phi_weight")
    if table is None:
        return
    phis = (table.shape or (0,))[0] // manifest.model.latent_channels
    names = [scale.constants["phi"] for scale in manifest.scales]
    stored = stored_arrays(folder, {name: manifest.tensors[name] for name in names})
    for k, name in enumerate(names):
        phi = stored[name]
        if phi.dtype != np.int64 or phi.size != 1 or not 0 <= phi.item() < phis:
            raise PlanError(f"the φ of scale {k} is none of the plan's {phis}; export the plan again")


def _check_function(name: str, given: object) -> None:
    """Raise RequestError for what can't be called, or None."""
    if given is not None and not callable(given):
        raise RequestError(f"{name} is {given!r}; give a function, or leave it out")


class _Clock:
    """Seconds of each stage, summed over the batches. Read at the end: until then nothing waits for a GPU."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._marks: list[tuple[str, Mark, Mark]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = self._backend.mark()
        yield
        self.add(name, began, self._backend.mark())

    def add(self, name: str, began: Mark, ended: Mark) -> None:
        self._marks.append((name, began, ended))

    def settle(self) -> None:
        """Take the times of all stages so far."""
        for name, began, ended in self._marks:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._backend.seconds(began, ended)
        self._marks.clear()

    def timings(self) -> dict[str, float]:
        self.settle()
        return self._seconds
