"""What steers the transformer, computed once and kept for the next call: the control's features and the class's rows.

Shapes: B images of one batch; R transformer rows; K scales; L tokens per image; C width; M modulation rows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from car_runtime.backends.base import Backend, Buffer
from car_runtime.format.manifest import Manifest
from car_runtime.images import control_pyramid
from car_runtime.schedule import Schedule

CACHED = 8
"""Control images (as they are, and as schedules want them) and classes whose features are kept for the next call, so
many of each; 3 MB and, for a class, 1 to 5 MB each at d16."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Between:
    """A class on its way to another one."""

    one: int
    """Class index."""
    other: int
    share: float
    """0…1: of the other one."""


Label = int | Between
"""What a row is conditioned on: a class index (`classes` itself is "no class"), or two."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the class contributes to R rows."""

    start: Buffer
    """f32 [R, 1, 1, C], the start tokens."""
    modulation: Buffer
    """f32 [R, M, C], scales, shifts and gates of AdaLN, the same at every step."""


class Conditioning:
    """Runs the plan's graphs of controls and classes, and keeps the latest results. For any number of threads."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._backend = backend
        self._manifest = manifest
        self.features: Recent[Buffer] = Recent(CACHED)
        self.scheduled: Recent[Buffer] = Recent(CACHED)
        self.conditions: Recent[Condition] = Recent(CACHED)
        self.modulations: Recent[Buffer] = Recent(CACHED)

    def forget(self) -> None:
        """Drop all that is kept."""
        for kept in (self.features, self.scheduled, self.conditions, self.modulations):
            kept.clear()

    def control(self, branch: str, image: Image.Image, schedule: Schedule) -> Buffer:
        """A branch's control features as a schedule wants them, f32 [L, C]: the same for every seed, class and row.

        image: 8-bit RGB of the model's size.
        """
        digest = (branch, _digest(image))
        features = self.features.get(digest, lambda: self.compute_features(image, branch))
        if schedule.plain_control:
            return features
        key = (*digest, schedule.control_scales, schedule.control_strength)
        return self.scheduled.get(key, lambda: self.compute_scheduled(features, schedule))

    def condition(self, labels: tuple[Label, ...]) -> Condition:
        """Start tokens and the base's modulation, a row per label."""
        return self.conditions.get(labels, lambda: self.compute_condition(labels))

    def modulation(self, branch: str, labels: tuple[Label, ...]) -> Buffer | None:
        """A branch's modulation, f32 [R, M, C], in a plan of format 2; None where its blocks have none."""
        graph = f"condition.{branch}"
        if graph not in self._manifest.graphs:
            return None
        return self.modulations.get((branch, labels), lambda: self._run(graph, labels)["modulation"])

    def compute_features(self, image: Image.Image, branch: str) -> Buffer:
        """The control image at every scale's size → the branch's features, f32 [L, C] (CAR section 3)."""
        inputs = {}
        for k, pixels in enumerate(control_pyramid(image, self._manifest.scales)):
            inputs[f"control_{k}"] = self._backend.allocate(pixels.shape, "uint8")
            self._backend.write(inputs[f"control_{k}"], pixels)
        features = self._backend.allocate((self._manifest.tokens, self._manifest.model.width), "float32")
        graph = "control" if self._manifest.format == 1 else f"control.{branch}"
        self._backend.run(graph, inputs, {"features": features})
        return features

    def compute_scheduled(self, features: Buffer, schedule: Schedule) -> Buffer:
        """Zeros, but at the scales of the schedule the features times its strength; f32 [L, C]."""
        first, last = (self._manifest.scales[schedule.control_scales[end]] for end in (0, -1))
        wanted = slice(first.start, last.stop)
        features_LC = self._backend.read(features)
        changed_LC = np.zeros_like(features_LC)
        changed_LC[wanted] = features_LC[wanted] * np.float32(schedule.control_strength)
        changed = self._backend.allocate(changed_LC.shape, "float32")
        self._backend.write(changed, changed_LC)
        return changed

    def compute_condition(self, labels: tuple[Label, ...]) -> Condition:
        """Class of every row → its start token and modulation (VAR section 3.2)."""
        return Condition(**self._run("condition", labels))

    def _run(self, graph: str, labels: tuple[Label, ...]) -> dict[str, Buffer]:
        """A graph of the class for these rows; rows between two classes are mixed linearly of both."""
        between = [row for row, label in enumerate(labels) if isinstance(label, Between)]
        made = self._run_plain(graph, tuple(label.one if isinstance(label, Between) else label for label in labels))
        if not between:
            return made
        ends = tuple(label.other if isinstance(label, Between) else label for label in labels)
        shares = np.array([label.share if isinstance(label, Between) else 0 for label in labels], np.float32)
        for name, towards in self._run_plain(graph, ends).items():
            values, others = self._backend.read(made[name]), self._backend.read(towards)
            share = shares[between].reshape(-1, *[1] * (values.ndim - 1))
            values[between] = (1 - share) * values[between] + share * others[between]
            self._backend.write(made[name], values)
        return made

    def _run_plain(self, graph: str, labels: tuple[int, ...]) -> dict[str, Buffer]:
        """The outputs of a graph of the class, by name, a row per class index."""
        R, C = len(labels), self._manifest.model.width
        M = int(self._manifest.graphs[graph].output("modulation").shape[1])
        label = self._backend.allocate((R,), "int64")
        self._backend.write(label, np.array(labels, np.int64))
        outputs = {"modulation": self._backend.allocate((R, M, C), "float32")}
        if graph == "condition":
            outputs["start"] = self._backend.allocate((R, 1, 1, C), "float32")
        self._backend.run(graph, {"label": label}, outputs)
        return outputs


def _digest(image: Image.Image) -> bytes:
    """What distinguishes control images: their bytes and their shape."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


class Recent(Generic[T]):
    """The most recently used results, by key. Threads that want the same new one at once each compute it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[object, T] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: object, compute: Callable[[], T]) -> T:
        """The result of this key; computed, and kept, if it is not there."""
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
        """Drop all results."""
        with self._lock:
            self._values.clear()
