"""Where an edit takes place: the part of a photo that is drawn anew, the square the model sees, and the way back.

Shapes: H, W pixels of the frame; N pixels of the model's square; h, w those of the photo before it is extended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime.errors import RequestError
from car_runtime.images import BLACK, WHITE, on_ground

FEATHER = 0.02
"""Default width of the seam, as a share of the edited square's side."""
CONTEXT = 4
"""The edited square is that many times as wide as what is drawn anew, where the frame has the room."""
REACH = 1 / 16
"""Of the square: over how much a difference in colour is smoothed; it is taken twice as far around what is drawn."""
TONE = 24.0
"""Grey levels: what differs by more is another shape, not another tone."""
DOUBT = 0.3
"""Weight of no difference at a place whose own says nothing, such as at another shape."""
PLAIN = 16.0
"""Grey levels of deviation from which on an area is not plain."""
MAX_SIDE = 8192
"""Pixels on an edge of an extended frame, and of what is drawn anew."""


@dataclass(frozen=True, kw_only=True)
class Square:
    """A square of the frame in pixels. It may reach beyond the frame, which then goes on with its edge pixels."""

    left: int
    top: int
    side: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """A photo with the pixels that are to be drawn anew."""

    image: Image.Image
    """8-bit RGB or RGBA, [H, W]."""
    repaint: NDArray[np.bool_]
    """[H, W], true where the model draws."""
    square: Square
    photo: tuple[int, int, int, int] | None = None
    """Where an extended photo is in the frame: left, top, right, bottom."""
    profile: bytes | None = None
    """ICC profile that the photo's file has for its RGB."""

    def view(self, size: int) -> Image.Image:
        """What the model sees: the square as RGB of `size` pixels, transparent parts white."""
        flat = Image.fromarray(self._cut(np.asarray(on_ground(self.image, WHITE))))
        return flat if flat.width == size else flat.resize((size, size), Image.Resampling.LANCZOS)

    def cut_alike(self, image: Image.Image, ground: tuple[int, ...] = BLACK) -> Image.Image:
        """The square of another image of this frame, such as its control, brought to the frame's size first.

        An image of an extended photo's shape, not of the frame's, is that of the photo: `ground` is around it.
        """
        size, place = self.image.size, self._place_of(image)
        if place is not None:
            left, top, right, bottom = place
            whole = Image.new("RGB", size, ground)
            photo = on_ground(image, ground).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
            whole.paste(photo, (left, top))
            return Image.fromarray(self._cut(np.asarray(whole)))
        whole = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
        return Image.fromarray(self._cut(np.asarray(whole)))

    def put_alike(
        self, square_SS3: NDArray[np.uint8], image: Image.Image, ground: tuple[int, ...]
    ) -> NDArray[np.uint8]:
        """What `cut_alike` takes a square from, uint8 [H, W, 3], for a map [S, S, 3] that was made of `image`'s.

        Nothing is on the map where an extended photo isn't, nor on its edge, which is none of the photo's.
        """
        side = self.square.side
        whole = np.empty((self.image.height, self.image.width, 3), np.uint8)
        whole[:] = ground
        rows, columns = self._places()
        H, W = whole.shape[:2]
        down, right = (rows >= 0) & (rows < H), (columns >= 0) & (columns < W)
        square = np.asarray(Image.fromarray(square_SS3).resize((side, side), Image.Resampling.BOX))
        whole[np.ix_(rows[down], columns[right])] = square[np.ix_(down, right)]
        if (place := self._place_of(image)) is not None:
            x0, y0, x1, y1 = place
            edge = -(-side // len(square_SS3))
            photo = np.zeros((H, W), np.bool_)
            photo[y0 + edge : y1 - edge, x0 + edge : x1 - edge] = True
            whole[~photo] = ground
        return whole

    def _place_of(self, image: Image.Image) -> tuple[int, int, int, int] | None:
        """Where an image is that has the extended photo's shape rather than the frame's; None for any other."""
        if self.photo is None or _likeness(image.size, self.image.size) <= 1.01:
            return None
        left, top, right, bottom = self.photo
        alike = _likeness(image.size, (right - left, bottom - top)) < _likeness(image.size, self.image.size)
        return self.photo if alike else None

    @property
    def is_cut_beyond(self) -> bool:
        """Whether the square reaches beyond the frame."""
        left, top, side = self.square.left, self.square.top, self.square.side
        return min(left, top) < 0 or left + side > self.image.width or top + side > self.image.height

    def repaint_view(self, *, beyond: bool = True) -> NDArray[np.bool_]:
        """The part of `repaint` that is in the square, bool [side, side]; beyond the frame it is `beyond`."""
        cut, (rows, columns) = self._cut(self.repaint), self._places()
        inside = np.zeros_like(cut)
        inside[np.ix_((rows >= 0) & (rows < self.image.height), (columns >= 0) & (columns < self.image.width))] = True
        return np.asarray(np.where(inside, cut, beyond), np.bool_)

    def paste(self, drawn_NN3: NDArray[np.uint8], feather: float | None = None) -> NDArray[np.uint8]:
        """The frame with the drawn square put back, uint8 [H, W, 3], or [H, W, 4] for a photo with transparency.

        feather: width of the seam in pixels of the frame, outside of what is drawn anew; None: 2 % of the square's
        side; 0: none. Beyond it every pixel is the photo's own, to the byte.
        """
        square, (H, W) = self.square, self.repaint.shape
        width = round(FEATHER * square.side) if feather is None else round(feather)
        big = Image.fromarray(drawn_NN3)
        if big.width != square.side:
            big = big.resize((square.side, square.side), Image.Resampling.LANCZOS)
        frame = np.array(self.image)
        top, left = max(square.top, 0), max(square.left, 0)
        bottom, right = min(square.top + square.side, H), min(square.left + square.side, W)
        inner = (slice(top, bottom), slice(left, right))
        # The seam is made of the mask within its width of the square: of a large photo that is little.
        above, before = max(top - width, 0), max(left - width, 0)
        near = self.repaint[above : bottom + width, before : right + width]
        alpha = softened(near, width)[top - above : bottom - above, left - before : right - before, None]
        patch = np.asarray(big)[top - square.top : bottom - square.top, left - square.left : right - square.left]
        kept, share = frame[inner], alpha
        if frame.shape[2] == 4:  # what is transparent has no colour to mix in
            patch = np.concatenate([patch, np.full((*patch.shape[:2], 1), 255, np.uint8)], -1)
            cover = alpha + (1 - alpha) * kept[..., 3:] / 255
            share = np.broadcast_to(alpha / np.maximum(cover, 1e-9), kept.shape).copy()
            share[..., 3:] = alpha
        mixed = np.rint(share * patch + (1 - share) * kept)
        frame[inner] = np.where(alpha > 0, mixed, kept).astype(np.uint8)
        return frame

    def matched(self, drawn_NN3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The drawn square in the photo's tones, uint8 [N, N, 3]: without the tokenizer's error and the edge's step.

        Around what is drawn anew the square shows the photo once more, as the tokenizer gives it back: the difference
        there is added everywhere. Then, where photo and drawing are both plain along their border, what is left of a
        step between them is added too, less and less with the distance, if it is about that of most of the border.
        Nothing changes where nothing is kept.
        """
        N, photo_NN3 = len(drawn_NN3), np.asarray(self.view(len(drawn_NN3))).astype(np.float64)
        anew = np.asarray(Image.fromarray(self.repaint_view()).resize((N, N), Image.Resampling.NEAREST))
        width, drawn = max(1, round(REACH * N)), drawn_NN3.astype(np.float64)
        ring = ~anew & (softened(anew, 2 * width) > 0)
        if not ring.any():
            return drawn_NN3
        drawn += _spread(photo_NN3 - drawn, ring * _trust(photo_NN3 - drawn, TONE), ring, width)
        narrow = max(1, width // 2)
        outside, inside = ring & (softened(anew, narrow) > 0), anew & (softened(~anew, narrow) > 0)
        (kept, rough), (new, uneven) = (_mean_near(*pair, narrow) for pair in ((photo_NN3, outside), (drawn, inside)))
        weight = inside / (1 + ((rough + uneven) / PLAIN) ** 4)
        plain = min(1.0, 2 * weight.sum() / max(inside.sum(), 1))  # a border that is plain for the most part
        if (smooth := weight > 0.5).any():
            weight *= _trust(kept - new - np.median((kept - new)[smooth], axis=0), 2 * TONE)
        fade_NN1 = plain * (softened(~anew, N // 2) * anew)[..., None]
        drawn += fade_NN1 * _spread(kept - new, weight, inside, width)
        # The drawing's colour runs a little over the border, where the seam would show it.
        left, _ = _mean_near(photo_NN3 - drawn, ring, 1)
        drawn += (ring * _trust(left, 2 * TONE))[..., None] * left
        return np.rint(np.clip(drawn, 0, 255)).astype(np.uint8)

    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of the frame that the square's are, also beyond its edges."""
        along = np.arange(self.square.side)
        return self.square.top + along, self.square.left + along

    def _cut(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """The square of an array [H, W, …], the edge repeated beyond it."""
        rows, columns = self._places()
        H, W = values.shape[:2]
        return values[np.clip(rows, 0, H - 1)][:, np.clip(columns, 0, W - 1)]


def _likeness(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How many times as wide one image is for its height as another, or the other way round: 1 for the same shape."""
    ratio = one[0] * other[1] / (one[1] * other[0])
    return max(ratio, 1 / ratio)


def _mean_near(
    values_NN3: NDArray[np.float64], where_NN: NDArray[np.bool_], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Around each pixel the mean of the values at `where`, f64 [N, N, 3], and their deviation, f64 [N, N]."""
    weight = where_NN.astype(np.float64)[..., None]
    sums = [weight, weight * values_NN3, weight * values_NN3**2]
    count, mean, square = (_blurred(part, width) for part in sums)
    mean, square = mean / (count + 1e-9), square / (count + 1e-9)
    return mean, np.sqrt(np.maximum(square - mean**2, 0).mean(-1))


def _blurred(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Box means along both axes, twice, of an array [N, N, channels]."""
    for axis in (0, 1, 0, 1):
        values = np.stack([_window_mean(values[..., c], width, axis) for c in range(values.shape[-1])], -1)
    return values


def _trust(difference_NN3: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """1 where colours differ by little, near 0 where by more than `level` grey levels, f64 [N, N]."""
    return np.asarray(1 / (1 + (np.abs(difference_NN3).max(-1) / level) ** 4))


def _spread(
    values_NN3: NDArray[np.float64], weight_NN: NDArray[np.float64], among_NN: NDArray[np.bool_], width: int
) -> NDArray[np.float64]:
    """The weighted mean of the values around each place, f64 [N, N, 3]: of far ones where there are no near ones.

    among: where values can be from; what their weight lacks of 1 counts as zeros, by `DOUBT`.
    """
    weight = weight_NN[..., None]
    counted = weight + DOUBT * (among_NN[..., None] - weight)
    both = np.concatenate([values_NN3 * weight, counted], -1)
    total, reach, share = np.zeros_like(both), width, 1.0
    while True:
        total += share * _blurred(both, reach)
        if reach >= len(both):
            return np.asarray(total[..., :3] / np.maximum(total[..., 3:], 1e-12))
        reach, share = 2 * reach, share / 8


def softened(mask_HW: NDArray[np.bool_], width: int) -> NDArray[np.float64]:
    """1 where the mask is, falling to 0 over `width` pixels around it, f64 [H, W] in 0…1: exactly 0 from there on."""
    values = mask_HW.astype(np.float64)
    # Grown by the larger half of the width, then averaged over the other: the mask itself stays at 1.
    reach = width // 2
    for axis in (0, 1):
        values = (_window_mean(values, width - reach, axis) > 0).astype(np.float64)
    for axis in (0, 1):
        values = _window_mean(values, reach, axis)
    return values


def _window_mean(values: NDArray[np.float64], reach: int, axis: int) -> NDArray[np.float64]:
    """Mean of the `2 · reach + 1` neighbours along an axis, f64 of the same shape; the edge goes on beyond the array.

    Exact for zeros and ones: sums of whole numbers.
    """
    padding, size, width = [(0, 0), (0, 0)], values.shape[axis], 2 * reach + 1
    padding[axis] = (reach + 1, reach)
    total = np.cumsum(np.pad(values, padding, mode="edge"), axis=axis)
    return np.asarray(
        (np.take(total, np.arange(width, width + size), axis) - np.take(total, np.arange(size), axis)) / width
    )


def square_around(repaint_HW: NDArray[np.bool_], size: int) -> Square:
    """The square that the model sees, around what is drawn anew.

    `CONTEXT` times the part's longer side, not below the model's own `size`, within the frame where it fits. Raises
    RequestError for an empty mask, or a part of over `MAX_SIDE` pixels.
    """
    rows, columns = np.flatnonzero(repaint_HW.any(1)), np.flatnonzero(repaint_HW.any(0))
    if not rows.size:
        raise RequestError("the mask is empty, so there is nothing to draw; mark what is to be drawn anew in white")
    H, W = repaint_HW.shape
    longer = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    if longer > MAX_SIDE:
        raise RequestError(
            f"what is to be drawn anew is {longer} pixels long, over {MAX_SIDE}; mark less, or make the image smaller"
        )
    side = int(max(min(max(CONTEXT * longer, size), H, W), longer))
    centre = ((rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2)
    top, left = (_placed(c, side, length) for c, length in zip(centre, (H, W), strict=True))
    return Square(left=left, top=top, side=side)


def _placed(centre: float, side: int, length: int) -> int:
    """Where a stretch of `side` around a centre begins: inside 0…length where it fits, else around the middle."""
    if side > length:
        return (length - side) // 2
    return int(min(max(round(centre - side / 2), 0), length - side))


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """A box as a mask, bool [H, W]. size: (W, H). box: x0, y0, x1, y1 in pixels, x1 and y1 excluded."""
    x0, y0, x1, y1 = box
    W, H = size
    if not (0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H):
        raise RequestError(
            f"the box {x0},{y0},{x1},{y1} is not inside the image of {W}×{H} pixels; give x0,y0,x1,y1 with "
            f"0 ≤ x0 < x1 ≤ {W} and 0 ≤ y0 < y1 ≤ {H}"
        )
    mask = np.zeros((H, W), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def extended(image: Image.Image, margins: tuple[int, int, int, int]) -> tuple[Image.Image, NDArray[np.bool_]]:
    """A photo in a larger frame, and what is new of it, bool [H, W]. margins: left, top, right, bottom, in pixels.

    The new part shows the photo mirrored at its edge: something to encode that goes on as the photo does.
    """
    left, top, right, bottom = margins
    w, h = image.size
    if max(w + left + right, h + top + bottom) > MAX_SIDE:
        raise RequestError(
            f"the extended image is {w + left + right}×{h + top + bottom} pixels, over {MAX_SIDE} on an edge; "
            "extend it by less, or make it smaller first"
        )
    photo = np.asarray(image)
    rows, columns = (_mirrored(np.arange(-a, n + b), n) for a, n, b in ((top, h, bottom), (left, w, right)))
    new = np.ones((len(rows), len(columns)), np.bool_)
    new[top : top + h, left : left + w] = False
    return Image.fromarray(photo[rows][:, columns]), new


def _mirrored(at: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Indices before 0 and from n on, mirrored into 0 … n − 1."""
    folded = np.mod(at, 2 * n)
    return np.asarray(np.minimum(folded, 2 * n - 1 - folded), np.int64)
