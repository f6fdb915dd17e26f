"""Edits of an image (VAR section 6): in-painting, out-painting, another class, new detail. No training is needed.

    plan.generate(label="cat", edit=Edit(image="photo.jpg", mask="mask.png"))        # draw the masked part anew
    plan.generate(label="cat", edit=Edit(image="photo.jpg", extend=(0, 0, 128, 0)))  # 128 pixels more on the right
    plan.generate(label="dog", edit=Edit(image="cat.png", from_scale=4))             # its coarse scales, a dog

The image is encoded to tokens; those that are kept are given, the others drawn (`known_tokens`). What is kept of the
image itself is put back afterwards, pixel for pixel.

Shapes: H, W pixels of the edited frame; L tokens of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime.editing.frame import Frame, Square, box_mask, extended, square_around
from car_runtime.editing.masks import MASK_RULES, known_mask_of
from car_runtime.errors import RequestError
from car_runtime.format.manifest import Manifest
from car_runtime.images import WHITE, Source, colour_profile, load_image, on_ground, open_image
from car_runtime.values import integer

MASK_LEVEL = 128
"""Grey level from which on a mask says "draw anew"."""
MAX_EXTEND = 1.0
"""Of the photo's side, the most that an edge may be moved."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """What is to be changed of an image. Without mask, box and extend it is all of it."""

    image: Source
    """The photo: path, open binary file, PIL image or uint8 array."""
    mask: Source | None = None
    """Grey image of the photo's size, white where the model draws."""
    box: tuple[int, int, int, int] | None = None
    """x0, y0, x1, y1 in pixels of the photo instead of a mask; x1 and y1 excluded."""
    extend: tuple[int, int, int, int] | None = None
    """Pixels that the frame grows by: left, top, right, bottom, each at most the photo's own side."""
    from_scale: int = 0
    """0…K: the tokens of coarser scales are kept everywhere; finer ones where the image is."""
    feather: float | None = None
    """Pixels of the seam, 0 = none; None: 2 % of the edited square's side."""
    rule: Literal["published", "strict"] = "published"
    """How a mask of pixels becomes one of tokens (`Plan.known_mask`)."""
    harmonise: int = 0
    """0…K: that many coarse scales are encoded once more, from the image with its first result put in, and all others
    drawn again: seams and colours come closer to the photo's. By `generate` alone. 0: off."""
    match: bool = True
    """Whether the tokenizer's error in colour is taken off what was drawn (`Frame.matched`)."""
    tokens: NDArray[np.int64] | None = None
    """[L]: the image's tokens where they are known, from its receipt; None: it is encoded."""

    @property
    def is_part(self) -> bool:
        """Whether a part is drawn, and put back into the photo."""
        return any(given is not None for given in (self.mask, self.box, self.extend))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedEdit:
    """An edit checked against a plan: all but the tokens, which need the plan's encoder."""

    edit: Edit
    frame: Frame
    known_mask: NDArray[np.bool_]
    """[L], true where tokens are kept."""
    whole: bool
    """Whether the whole image is drawn, so that no pixel is put back."""
    harmonise: int
    """What is still to be done of the edit's `harmonise`: 0 in the second pass."""

    def finished(self, drawn_NN3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image to hand out for one that the model drew: put into the frame, unless it is all new."""
        if self.whole:
            return drawn_NN3
        drawn_NN3 = self.frame.matched(drawn_NN3) if self.edit.match else drawn_NN3
        return self.frame.paste(drawn_NN3, self.edit.feather)

    @property
    def profile(self) -> bytes | None:
        """ICC profile of the finished images: the photo's, whose pixels they keep."""
        return None if self.whole else self.frame.profile

    def before(self, size: int) -> NDArray[np.uint8]:
        """The image that is changed, as a sheet shows it, uint8 [H, W, 3] as the results: grey where it is drawn.

        size: of the model's square, at which an image comes that is all drawn anew.
        """
        if self.whole:
            return np.asarray(self.frame.view(size))
        shown = np.array(on_ground(self.frame.image, WHITE))
        shown[self.frame.repaint] = 128
        return shown

    def facts(self) -> dict[str, Any]:
        """What a receipt says of the edit, as JSON has it. `part` is what keeps an image from being drawn again
        without the photo."""
        edit, square = self.edit, self.frame.square
        facts: dict[str, Any] = {"edit": "whole" if self.whole else "part", "edit_from_scale": edit.from_scale}
        if not self.whole:
            facts |= {"edit_rule": edit.rule, "edit_harmonise": edit.harmonise, "edit_feather": edit.feather}
            facts |= {"edit_square": f"{square.left},{square.top},{square.side}"}
        return facts


def prepare(manifest: Manifest, edit: Edit, drawn: int | None = None) -> PreparedEdit:
    """Read and check an edit. Raises RequestError, which names the value and its range, and ImageError.

    drawn: scales that are made; None: all of them.
    """
    K, size = len(manifest.scales), manifest.model.image_size
    if "encoder" not in manifest.graphs and edit.tokens is None:
        raise RequestError(f"the plan {manifest.name!r} has no encoder, so it can't edit; export it again with one")
    for name in ("from_scale", "harmonise"):
        integer(name, getattr(edit, name), 0, K, f"the plan has {K} scales")
    if not isinstance(edit.rule, str) or edit.rule not in MASK_RULES:
        raise RequestError(f"there is no mask rule {edit.rule!r}; choose {' or '.join(MASK_RULES)}")
    if edit.feather is not None and not (isinstance(edit.feather, Real) and 0 <= edit.feather <= 512):
        raise RequestError(f"feather is {edit.feather!r}, but must be in 0…512 pixels; 0 is a hard edge")
    if not isinstance(edit.match, (bool, np.bool_)):
        raise RequestError(f"match is {edit.match!r}, but must be True or False; leave it out for True")
    _check_tokens(manifest, edit.tokens)
    frame, whole = _frame(edit, size), not edit.is_part
    keep = (
        np.zeros(manifest.tokens, np.bool_)
        if whole
        else known_mask_of(frame.repaint_view(), manifest.scales, edit.rule)
    )
    coarse = manifest.scales[edit.from_scale - 1].stop if edit.from_scale else 0
    keep[:coarse] = True
    _check_drawn(manifest, edit, frame, keep, K if drawn is None else drawn)
    return PreparedEdit(edit=edit, frame=frame, known_mask=keep, whole=whole, harmonise=edit.harmonise)


def _check_drawn(manifest: Manifest, edit: Edit, frame: Frame, known_mask: NDArray[np.bool_], drawn: int) -> None:
    """Raise RequestError for an edit of which nothing that is seen would be drawn anew in `drawn` scales.

    The tokens of all scales that are drawn are a whole image by themselves (`from_scale` equal to `drawn`), and pass.
    """
    scales = manifest.scales
    if edit.from_scale > drawn or (edit.is_part and edit.from_scale == drawn):
        raise RequestError(
            f"from_scale is {edit.from_scale}, but scales 0…{drawn - 1} are drawn, so that none is drawn anew; give "
            f"less than {drawn}"
        )
    if not edit.is_part:
        return
    keep = known_mask
    if frame.is_cut_beyond:  # what is drawn there is not seen
        keep = known_mask_of(frame.repaint_view(beyond=False), scales, edit.rule)
    coarse = scales[edit.from_scale - 1].stop if edit.from_scale else 0
    if keep[coarse : scales[drawn - 1].stop].all():
        side, cells = frame.square.side, scales[drawn - 1].side
        raise RequestError(
            f"what is to be drawn anew covers no token by half, which are {side / cells:.3g} pixels wide here, so "
            "that all would be kept; give a larger part"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_tokens(manifest: Manifest, tokens: Any) -> None:
    L, vocab = manifest.tokens, manifest.model.vocab
    if tokens is None:
        return
    if not isinstance(tokens, np.ndarray) or tokens.shape != (L,) or tokens.dtype.kind not in "iu":
        raise RequestError(f"tokens are {tokens!r:.60}; give an array of integers of shape [{L}]")
    if tokens.min() < -1 or tokens.max() >= vocab:
        raise RequestError(f"tokens hold {int(tokens.min())}…{int(tokens.max())}; give -1…{vocab - 1}")


def _frame(edit: Edit, size: int) -> Frame:
    """The frame of an edit."""
    given = [name for name in ("mask", "box", "extend") if getattr(edit, name) is not None]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} are given; give one of mask, box and extend")
    image = open_image(edit.image)
    if not given:
        image = load_image(image, background=WHITE)
        side = min(image.size)
        square = Square(left=(image.width - side) // 2, top=(image.height - side) // 2, side=side)
        return Frame(image=image, repaint=np.ones((image.height, image.width), np.bool_), square=square)
    place, profile = None, colour_profile(image)
    if edit.extend is not None:
        margins, (w, h) = _margins(_four("extend", edit.extend), image.size), image.size
        image, repaint = extended(image, margins)
        place = (margins[0], margins[1], margins[0] + w, margins[1] + h)
    elif edit.box is not None:
        repaint = box_mask(image.size, _four("box", edit.box))
    else:
        repaint = _mask(edit.mask, image.size)
    square = square_around(repaint, size)
    return Frame(image=image, repaint=repaint, square=square, photo=place, profile=profile)


def _mask(source: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = load_image(source).convert("L")
    if mask.size != size:
        raise RequestError(
            f"the mask is {mask.width}×{mask.height} pixels and the image {size[0]}×{size[1]}; give one of its size, "
            "white where it is to be drawn anew"
        )
    return np.asarray(mask) >= MASK_LEVEL


def _four(name: str, given: object) -> tuple[int, int, int, int]:
    """Four whole numbers. Raises RequestError."""
    numbers = list(given) if isinstance(given, (list, tuple, np.ndarray)) else []
    if len(numbers) != 4 or not all(map(_is_whole, numbers)):
        raise RequestError(f"{name} is {given!r}, but must be four whole numbers of pixels; give a tuple of them")
    a, b, c, d = map(int, numbers)
    return a, b, c, d


def _margins(margins: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = margins
    sides = {"left": (left, size[0]), "top": (top, size[1]), "right": (right, size[0]), "bottom": (bottom, size[1])}
    for name, (value, side) in sides.items():
        if not 0 <= value <= MAX_EXTEND * side:
            raise RequestError(
                f"{name} is {value} pixels, but must be in 0…{side}: at most 100% of the image's side; extend twice "
                "for more"
            )
    if not any(margins):
        raise RequestError("all four edges are to be extended by 0; give one of left, top, right and bottom")
    return left, top, right, bottom


def composite(prepared: PreparedEdit, drawn_NN3: NDArray[np.uint8], size: int) -> Image.Image:
    """The model's square of the frame with a first result put in, RGB of the model's size, to be encoded anew."""
    pasted = Image.fromarray(prepared.finished(drawn_NN3))
    return Frame(image=pasted, repaint=prepared.frame.repaint, square=prepared.frame.square).view(size)
