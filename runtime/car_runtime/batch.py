"""Which images are drawn in the same steps, and which transformer rows a step has for them.

Shapes: B images of one batch; R transformer rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from car_runtime.conditioning import Between, Label
from car_runtime.request import Request


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """One image of a batch."""

    request: Request
    index: int
    """Which of the request's images it is."""
    owner: int
    """Position of the request among those of the call."""
    position: int
    """Position among all images of the call."""

    @property
    def seed(self) -> int:
        """What it is drawn with."""
        return self.request.seeds[self.index]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The transformer rows of a batch: each image's own, then the twins without class, then those without control."""

    image: tuple[int, ...]
    """Row → image."""
    unconditional: tuple[bool, ...]
    """Row → whether it has no class."""
    steered: tuple[bool, ...]
    """Row → whether the branches are mixed into it."""
    twin: tuple[int, ...]
    """Image → the row that its guidance leads away from; its own where it has none."""
    plain: tuple[int, ...]
    """Image → its row without control; its own where it has none."""

    def holds(self, row: int, fewer: Rows) -> bool:
        """Whether a row is among those of `fewer`, of the same images."""
        image = self.image[row]
        if self.unconditional[row]:
            return fewer.twin[image] != image
        return row < len(self.twin) or fewer.plain[image] != image

    def part(self, images: Sequence[int]) -> Rows:
        """The rows of some of the images, in the same order."""
        kept = [row for row, image in enumerate(self.image) if image in images]
        row_of, image_of = ({old: new for new, old in enumerate(some)} for some in (kept, images))
        return Rows(
            image=tuple(image_of[self.image[row]] for row in kept),
            unconditional=tuple(self.unconditional[row] for row in kept),
            steered=tuple(self.steered[row] for row in kept),
            twin=tuple(row_of[self.twin[i]] for i in images),
            plain=tuple(row_of[self.plain[i]] for i in images),
        )

    def labels(self, batch: Sequence[Drawing], no_class: int) -> tuple[Label, ...]:
        """What each row is conditioned on."""
        rows = zip(self.image, self.unconditional, strict=True)
        return tuple(no_class if free else _label(batch[i].request) for i, free in rows)


def _label(request: Request) -> Label:
    blend = request.blend
    if blend is None or blend.label == request.label:
        return request.label
    return Between(one=request.label, other=blend.label, share=blend.share)


def rows_of(batch: Sequence[Drawing], scale: int, guided_only: bool) -> Rows:
    """The rows that a batch needs from a scale on. guided_only: every image has a twin, needed or not."""
    B, images = len(batch), range(len(batch))
    guided = [i for i in images if guided_only or _guided_from(batch[i].request, scale)]
    unsteered = [i for i in images if batch[i].request.control_cfg > 0]
    steered = B + len(guided)
    controlled = steered if batch[0].request.controls else 0
    twin = {i: row for row, i in enumerate(guided, B)}
    plain = {i: row for row, i in enumerate(unsteered, steered)}
    image = (*images, *guided, *unsteered)
    return Rows(
        image=image,
        unconditional=tuple(B <= row < steered for row in range(len(image))),
        steered=tuple(row < controlled for row in range(len(image))),
        twin=tuple(twin.get(i, i) for i in images),
        plain=tuple(plain.get(i, i) for i in images),
    )


def _guided_from(request: Request, scale: int) -> bool:
    """Whether any scale from this one on is guided."""
    end = request.schedule.unguided_from
    return request.guided and (end is None or scale < end)


def batches(requests: Sequence[Request], sizes: Sequence[int], shared: bool) -> Iterator[tuple[Drawing, ...]]:
    """All images of all requests in batches of these sizes, large ones first.

    shared: whether images of different requests may be in one batch; they then have the same branches, and as many
    scales. Otherwise, and where they differ in that, each request has batches of its own.
    """
    groups: dict[object, list[Drawing]] = {}
    position = 0
    for owner, request in enumerate(requests):
        branches = tuple(control.branch for control in request.controls)
        key = (branches, request.schedule.drawn) if shared else owner
        for index in range(len(request.seeds)):
            drawing = Drawing(request=request, index=index, owner=owner, position=position)
            groups.setdefault(key, []).append(drawing)
            position += 1
    for group in groups.values():
        first = 0
        while first < len(group):
            size = max(size for size in sizes if size <= len(group) - first)
            yield tuple(group[first : first + size])
            first += size
