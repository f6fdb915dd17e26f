"""The token cache: the tokenizer is frozen in stages 2 and 3, so every image is encoded once, not once a step.

A cache is a folder with `tokens.npy`, uint16 or int32 [views, N, L], memory-mapped when training, `labels.npy`,
int64 [N], and `tokens.json`. A view is one augmentation of all images: view v is what epoch v of
`ControlledImages` shows (mirrored or not, moved, zoomed), and epoch e of training reads view e mod `views`. Controls
made on the fly follow the same augmentation.

What a cache depends on (weights of the encoder and codes, images, size, seed, views, precision) is hashed into its
name, so it is never stale and all runs on one tokenizer share it, whatever its decoder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from car_train.data.dataset import ControlledImages
from car_train.data.folder import DataError
from car_train.files import folder_aside
from car_train.model.vqvae import VQVAE, join_tokens

DEFAULT_ROOT = Path("~/.cache/car/tokens")
MARKER = "tokens.json"
FORMAT = 2
"""Of caches; it changes with the augmentation too."""


class TokenCache:
    """An opened cache: `tokens`, memory-mapped, [views, N, L]; `labels`, int64 [N]."""

    def __init__(self, folder: Path):
        try:
            self.facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            self.tokens: NDArray[Any] = np.load(folder / "tokens.npy", mmap_mode="r")
            self.labels: NDArray[np.int64] = np.load(folder / "labels.npy")
            shape = (self.facts["views"], self.facts["pictures"], self.facts["tokens"])
            if self.tokens.shape != shape or self.labels.shape != shape[1:2]:
                raise ValueError(f"tokens {self.tokens.shape}, labels {self.labels.shape}, expected {shape}")
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: not a whole token cache ({error}); remove it, a new one is made") from error

    @property
    def views(self) -> int:
        return len(self.tokens)


class CachedTokens(Dataset[dict[str, Any]]):
    """The cached images: `tokens` int64 [L], `label` int, and `control` uint8 [S, S, 3] if there are controls.

    The images themselves are read only where a control is made from them.
    """

    def __init__(self, images: ControlledImages, cache: TokenCache):
        self.images, self.cache = images, cache
        self.view = 0

    def set_epoch(self, epoch: int) -> None:
        self.view = epoch % self.cache.views
        self.images.set_epoch(self.view)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        control = {}
        if self.images.control_type is not None:  # of the image at `index`, or of the next that one can be made of
            index, item = self.images.item(index)
            control["control"] = item["control"]
        tokens = torch.from_numpy(self.cache.tokens[self.view, index].astype(np.int64))
        return {"tokens": tokens, "label": int(self.cache.labels[index]), **control}


def identity(images: ControlledImages, vqvae: VQVAE, views: int, precision: str) -> dict[str, Any]:
    """What the tokens follow from; its hash names the cache."""
    weights = hashlib.sha256()
    for name, tensor in sorted(vqvae.state_dict().items()):
        if name.startswith(("decoder.", "post_quant_conv.")):
            continue  # see no image
        weights.update(name.encode())
        weights.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "format": FORMAT,
        "weights": weights.hexdigest(),
        "files": images.fingerprint(),
        "pictures": len(images),
        "image_size": images.image_size,
        "fit": images.fit,
        "tokens": vqvae.config.tokens,
        "sides": list(vqvae.config.sides),
        "vocab": vqvae.config.vocab,
        "augment": images.augment,
        "flip": images.augment and images.flip,
        "seed": images.seed if images.augment else 0,
        "views": views,
        "precision": precision,
    }


def open_cache(
    images: ControlledImages,
    vqvae: VQVAE,
    *,
    views: int,
    root: Path | None = None,
    precision: str = "fp32",
    batch: int = 64,
    encode: Callable[[Tensor], list[Tensor]] | None = None,
) -> TokenCache:
    """The cache of these images under this tokenizer; made first, where it doesn't stand yet.

    views: augmentations of every image, at least 1; without augmentation there is one.
    root: folder of caches, `DEFAULT_ROOT` when None. precision: a name for the type `encode` computes in.
    encode: images f32 [B, 3, H, W] in [-1, 1] → token grids; `vqvae.encode` when None.

    Raises DataError: the cache is damaged or can't be written. An interrupted encoding leaves nothing behind that
    looks like a cache.
    """
    views = views if images.augment else 1
    facts = identity(images, vqvae, views, precision)
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = (DEFAULT_ROOT if root is None else root).expanduser() / name
    if (folder / MARKER).is_file():
        return TokenCache(folder)
    try:
        with folder_aside(folder) as aside:
            _encode(images, encode or vqvae.encode, facts, batch, aside)
            (aside / MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        size = views * len(images) * vqvae.config.tokens * 2 / 2**20
        raise DataError(
            f"{folder}: can't be written ({error}); it needs {size:.0f} MiB: free some space, or give another "
            "folder (--token-root)"
        ) from error
    return TokenCache(folder)


def _encode(
    images: ControlledImages,
    encode: Callable[[Tensor], list[Tensor]],
    facts: dict[str, Any],
    batch: int,
    folder: Path,
) -> None:
    dtype = np.uint16 if facts["vocab"] <= 1 << 16 else np.int32
    shape = (facts["views"], len(images), facts["tokens"])
    labels = np.zeros(len(images), np.int64)
    before, control_type = images.epoch, images.control_type
    images.control_type = None  # not needed here, and the dearer half of an item
    bar = tqdm(total=shape[0] * shape[1], desc="encoding", unit="img", file=sys.stderr, disable=None, leave=False)
    try:
        with bar, torch.no_grad(), (folder / "tokens.npy").open("wb") as out:
            _allocate(out, shape, np.dtype(dtype))
            for view in range(shape[0]):
                images.set_epoch(view)
                start = 0
                for items in DataLoader(images, batch_size=batch, generator=torch.Generator()):
                    stop = start + len(items["label"])
                    out.write(join_tokens(encode(items["image"])).cpu().numpy().astype(dtype).tobytes())
                    labels[start:stop] = items["label"].numpy()
                    bar.update(stop - start)
                    start = stop
    finally:
        images.set_epoch(before)
        images.control_type = control_type
    np.save(folder / "labels.npy", labels)


def _allocate(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Begin a .npy file and claim its space, so that a full disk is met at once. Raises OSError.

    The array is then written, not mapped: a page of a sparse file that finds no room on the disk ends the process.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), file.tell(), max(1, math.prod(shape) * dtype.itemsize))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that can't
                raise
