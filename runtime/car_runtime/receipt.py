"""Receipts: what an image was made of, in the PNG itself, so that it can be made again.

A receipt is a text chunk of JSON: the digests of the plan, the control and the image, the settings, and the tokens,
packed. Nothing of it is believed unseen: it is read with bounds, its own digest must fit, and tokens are taken for
the plan of that digest alone, and in the image's stead only while its pixels are those that were drawn.

Shapes: L tokens of an image, V vocabulary.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime.config import Blend
from car_runtime.errors import RequestError
from car_runtime.format.manifest import Manifest
from car_runtime.images import WHITE, load_image, on_ground
from car_runtime.request import MAX_WEIGHT

if TYPE_CHECKING:
    from car_runtime.request import Request

KEY = "car-receipt"
CONTROL_KEY = "car-control"
VERSION = 1
UPGRADED = "upgraded from plan"
"""Key in a manifest's provenance: the digest of the plan of format 1 that this one was made from, and draws as."""
MAX_RECEIPT = 64 * 1024
"""Characters of a receipt that are read; one of a d16's image has about 2,000."""
MAX_CONTROL = 4 * 1024 * 1024
"""Characters of an enclosed control image."""
SETTINGS = (
    *("label", "seed", "cfg", "top_k", "top_p", "more_smooth"),
    *("cfg_scales", "control_scales", "control_strength", "stop_after"),
    *("control_cfg", "blend_share", "blend_label", "blend_seed", "watermarked"),
)
"""Settings that a receipt has, those of `Blend` with its name before them, and whether there was a watermark, not its
key; nothing else of `GenerationConfig` is taken from a file, no path above all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Receipt:
    """What is known of an image that a plan made."""

    plan: str
    """`plan_digest` of the plan."""
    name: str
    """The plan's name, for people."""
    settings: Mapping[str, Any]
    """Fields of `GenerationConfig` by name, as JSON has them: label, seed, cfg, top_k, top_p, schedule …"""
    tokens: NDArray[np.int64] | None = field(default=None, repr=False)
    """[L], −1 where a scale was not drawn; None where they were left out."""
    control: str | None = None
    """SHA-256 of the control image's pixels at the model's size."""
    branches: tuple[tuple[str, float, str], ...] = ()
    """Branch, weight and SHA-256 of each control, where it isn't the default branch's alone, at weight 1."""
    image: str | None = None
    """SHA-256 of the image's own pixels, on white."""

    def is_of(self, image: Image.Image) -> bool:
        """Whether an image has the pixels that were drawn; programs that change them may keep the text chunks."""
        return self.image == image_digest(on_ground(image, WHITE))


def plan_digest(manifest: Manifest) -> str:
    """What distinguishes plans that draw differently: SHA-256 over the names and digests of all files of a plan."""
    lines = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(manifest.files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def image_digest(image: Image.Image) -> str:
    """SHA-256 of an image's size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def pack(tokens_L: NDArray[np.int64], vocab: int) -> str:
    """Tokens in as few bits as the vocabulary (and −1) needs, as base64; 1.4 KB for 680 tokens of 4096."""
    bits = max(1, int(vocab).bit_length())  # vocab itself stands for −1
    values = np.where(tokens_L < 0, vocab, tokens_L).astype(np.uint32)
    spread = (values[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return base64.b64encode(np.packbits(spread.astype(np.uint8).reshape(-1)).tobytes()).decode()


def unpack(text: str, L: int, vocab: int) -> NDArray[np.int64]:
    """The tokens of `pack`, [L]. Raises ValueError for what it did not write."""
    bits = max(1, int(vocab).bit_length())
    raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if raw.size != -(-L * bits // 8):
        raise ValueError(f"{raw.size} bytes of tokens, not {-(-L * bits // 8)}")
    spread = np.unpackbits(raw)[: L * bits].reshape(L, bits).astype(np.int64)
    values = (spread << np.arange(bits)).sum(1)
    if (values > vocab).any():
        raise ValueError("a token beyond the vocabulary")
    return np.asarray(np.where(values == vocab, -1, values), np.int64)


def text_of(receipt: Receipt, vocab: int) -> str:
    """A receipt as the text of its chunk."""
    body: dict[str, Any] = {
        "version": VERSION,
        "plan": receipt.plan,
        "name": receipt.name,
        "settings": dict(receipt.settings),
        "control": receipt.control,
        "image": receipt.image,
    }
    if receipt.branches:
        body["branches"] = [list(branch) for branch in receipt.branches]
    if receipt.tokens is not None:
        body["tokens"] = pack(receipt.tokens, vocab)
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({"receipt": body, "sha256": hashlib.sha256(plain.encode()).hexdigest()}, separators=(",", ":"))


def receipt_of(chunks: Mapping[str, str], manifest: Manifest) -> Receipt | None:
    """The receipt among the text chunks of a PNG, checked against a plan; None where there is none.

    The plan may be the upgraded form of the receipt's, which draws the same.
    Raises RequestError: altered, of another plan, or of a newer version.
    """
    text = chunks.get(KEY)
    if text is None:
        return None
    body = _body(text)
    if body.get("plan") not in (plan_digest(manifest), manifest.provenance.get(UPGRADED, plan_digest(manifest))):
        raise RequestError(
            f"the image was made by another plan, {str(body.get('name'))[:60]!r}, and this one is {manifest.name!r}; "
            "name that plan with -e"
        )
    try:
        packed = body.get("tokens")
        tokens = None if packed is None else unpack(str(packed), manifest.tokens, manifest.model.vocab)
    except (ValueError, binascii.Error) as error:
        raise RequestError(f"the image's receipt is damaged ({error}); draw from the image itself instead") from error
    control = body.get("control")
    return Receipt(
        plan=str(body["plan"]),
        name=manifest.name,
        settings=_settings(body.get("settings")),
        tokens=tokens,
        control=control if isinstance(control, str) and len(control) == 64 else None,
        branches=_branches(body.get("branches"), manifest),
        image=str(body.get("image")),
    )


def _body(text: str) -> dict[str, Any]:
    """The checked JSON of a chunk."""
    altered = RequestError("the image's receipt was altered or is damaged; draw from the image itself instead")
    if len(text) > MAX_RECEIPT:
        raise altered
    try:
        outer = json.loads(text)
        body, digest = outer["receipt"], outer["sha256"]
        plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise altered from error
    if not isinstance(body, dict) or hashlib.sha256(plain.encode()).hexdigest() != digest:
        raise altered
    if body.get("version") != VERSION:
        raise RequestError(
            f"the image's receipt is of version {str(body.get('version'))[:20]}, and this program reads {VERSION}; "
            "update the program"
        )
    return body


def _branches(found: object, manifest: Manifest) -> tuple[tuple[str, float, str], ...]:
    """Branches of a receipt that the plan has, with weights and digests of plain types."""
    if not isinstance(found, list) or not 0 < len(found) <= len(manifest.model.branches):
        return ()
    good = []
    for one in found:
        if not isinstance(one, list) or len(one) != 3:
            return ()
        name, weight, digest = one
        known = isinstance(name, str) and name in manifest.model.branches
        if not (known and type(weight) in (int, float) and 0 <= weight <= MAX_WEIGHT):
            return ()
        good.append((name, float(weight), str(digest)[:64]))
    return tuple(good)


def _settings(found: object) -> dict[str, Any]:
    """The settings that a receipt may have, and facts of an edit, of plain types; their ranges are `resolve`'s."""
    if not isinstance(found, dict):
        return {}
    plain = (str, int, float, bool, type(None))
    return {k: v for k, v in found.items() if (k in SETTINGS or k.startswith("edit")) and isinstance(v, plain)}


def receipts_of(
    manifest: Manifest, request: Request, tokens_nL: NDArray[np.int64], images: Mapping[int, NDArray[np.uint8]]
) -> list[dict[str, str]]:
    """The text chunks of some images of a request: the receipt and, where there is one, the control image.

    tokens: int64 [n, L] of all its images. images: position → finished image, uint8 [H, W, 3 or 4].
    """
    digest, control = plan_digest(manifest), request.control
    branches = tuple((c.branch, c.weight, image_digest(c.image)) for c in request.controls)
    if len(branches) == 1 and branches[0][:2] == (manifest.model.default_branch or branches[0][0], 1.0):
        branches = ()
    settings: dict[str, Any] = {
        "label": None if request.classless else request.label,
        "cfg": request.sampling.cfg,
        "top_k": request.sampling.top_k % manifest.model.vocab,
        "top_p": request.sampling.top_p,
        **request.schedule.settings(),
        **({"more_smooth": True} if request.more_smooth else {}),
        **({"control_cfg": request.control_cfg} if request.control_cfg else {}),
        **({"watermarked": True} if request.watermark else {}),
        **({} if request.edit is None else request.edit.facts()),
    }
    enclosed = {} if control is None else {CONTROL_KEY: control_text(control)}
    enclosed |= {f"{CONTROL_KEY}-{other.branch}": control_text(other.image) for other in request.controls[1:]}
    control_digest = None if control is None else image_digest(control)
    found = []
    for i, image in images.items():
        own = settings | {"seed": request.seeds[i]}
        if request.blend is not None:
            blend = request.blend
            own |= {"blend_share": blend.share, "blend_label": blend.label, "blend_seed": blend.seeds[i]}
        receipt = Receipt(
            plan=digest,
            name=manifest.name,
            settings=own,
            tokens=tokens_nL[i],
            control=control_digest,
            branches=branches,
            image=image_digest(on_ground(Image.fromarray(image), WHITE)),
        )
        found.append({KEY: text_of(receipt, manifest.model.vocab), **enclosed})
    return found


def blend_of(receipt: Receipt, classes: int) -> Blend | None:
    """The blend that an image was made with, if it was. classes: of the plan; that index is "no class"."""
    found = receipt.settings
    if "blend_share" not in found:
        return None
    label, seed = found.get("blend_label"), found.get("blend_seed")
    return Blend(share=found["blend_share"], label=None if label == classes else label, seed=seed)


def control_text(control: Image.Image) -> str:
    """A control image as the text of its chunk: PNG in base64."""
    stream = io.BytesIO()
    control.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def control_of(
    chunks: Mapping[str, str], receipt: Receipt, size: int
) -> Image.Image | dict[str, tuple[Image.Image, float]] | None:
    """The control images that a PNG encloses, as `GenerationConfig.control` takes them; None if any isn't its own.

    Each is RGB of the model's size.
    """
    if not receipt.branches:
        return _enclosed(chunks.get(CONTROL_KEY), receipt.control, size)
    found: dict[str, tuple[Image.Image, float]] = {}
    for n, (branch, weight, digest) in enumerate(receipt.branches):
        image = _enclosed(chunks.get(f"{CONTROL_KEY}-{branch}" if n else CONTROL_KEY), digest, size)
        if image is None:
            return None
        found[branch] = (image, weight)
    return found


def _enclosed(text: str | None, digest: str | None, size: int) -> Image.Image | None:
    """A control image out of its chunk, if it is the one of this digest."""
    if text is None or digest is None or len(text) > MAX_CONTROL:
        return None
    try:
        stream = io.BytesIO(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error):
        return None
    control = load_image(stream)
    return control if control.size == (size, size) and image_digest(control) == digest else None
