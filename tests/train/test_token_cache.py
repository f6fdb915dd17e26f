"""The token cache holds what the tokenizer says, is made once, and is never stale or half written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_train.data.dataset import ControlledImages
from car_train.data.folder import DataError
from car_train.model.vqvae import join_tokens
from car_train.training.token_cache import MARKER, CachedTokens, open_cache
from fixtures.small import small_model


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            noise = rng.integers(0, 255, (24, 24, 4), np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / name / f"{name}{i}.png")
    return tmp_path / "images"


def images(image_folder: Path, **options: object) -> ControlledImages:
    settings = {"split": "all", "augment": True, "seed": 5} | options
    return ControlledImages(image_folder, 20, **settings)  # type: ignore[arg-type]


def test_every_view_holds_the_tokens_of_that_epochs_images(image_folder: Path, tmp_path: Path) -> None:
    vqvae, data = small_model().vqvae, images(image_folder)
    cache = open_cache(data, vqvae, views=3, root=tmp_path / "tokens", batch=5)
    assert cache.tokens.shape == (3, 12, vqvae.config.tokens)
    assert cache.tokens.dtype == np.uint16
    assert isinstance(cache.tokens, np.memmap)
    items = CachedTokens(data, cache)
    for epoch in (0, 2, 4):
        items.set_epoch(epoch)
        data.set_epoch(epoch % 3)
        for i in (0, 7, 11):
            item = data[i]
            expected = join_tokens(vqvae.encode(item["image"][None]))[0]
            assert torch.equal(items[i]["tokens"], expected)
            assert items[i]["label"] == item["label"]
    assert not np.array_equal(cache.tokens[0], cache.tokens[1])


def test_controls_follow_the_view(image_folder: Path, tmp_path: Path) -> None:
    data = images(image_folder, control_type="canny")
    items = CachedTokens(data, open_cache(data, small_model().vqvae, views=2, root=tmp_path / "tokens"))
    items.set_epoch(3)
    found = items[4]["control"]
    data.set_epoch(1)
    assert torch.equal(found, data[4]["control"])
    assert set(items[4]) == {"tokens", "label", "control"}


def test_a_cache_is_made_once(image_folder: Path, tmp_path: Path) -> None:
    vqvae, root = small_model().vqvae, tmp_path / "tokens"
    open_cache(images(image_folder), vqvae, views=2, root=root)

    def never(_: torch.Tensor) -> list[torch.Tensor]:
        raise AssertionError("encoded twice")

    # Another decoder, another control type, or none: the same tokens.
    with torch.no_grad():
        vqvae.decoder.conv_out.get_parameter("bias").add_(1)
        vqvae.post_quant_conv.get_parameter("bias").add_(1)
    cache = open_cache(images(image_folder, control_type="hed"), vqvae, views=2, root=root, encode=never)
    assert cache.views == 2
    assert len(list(root.iterdir())) == 1


def test_whatever_tokens_follow_from_makes_another_cache(image_folder: Path, tmp_path: Path) -> None:
    vqvae, root = small_model().vqvae, tmp_path / "tokens"

    def caches() -> int:
        return len(list(root.iterdir()))

    open_cache(images(image_folder), vqvae, views=2, root=root)
    for count, options in enumerate(
        [{"seed": 6}, {"augment": False}, {"classes": "y"}, {"flip": False}, {"fit": "pad"}], start=2
    ):
        open_cache(images(image_folder, **options), vqvae, views=2, root=root)
        assert caches() == count
    open_cache(images(image_folder), vqvae, views=2, root=root, precision="bf16")
    with torch.no_grad():
        vqvae.quant_conv.bias[0] += 1e-3
    open_cache(images(image_folder), vqvae, views=2, root=root)
    Image.new("RGB", (30, 30)).save(image_folder / "x" / "x0.png")
    open_cache(images(image_folder), vqvae, views=2, root=root)
    assert caches() == 9


def test_an_interrupted_encoding_leaves_nothing(image_folder: Path, tmp_path: Path) -> None:
    vqvae, root = small_model().vqvae, tmp_path / "tokens"
    calls = []

    def stop(batch: torch.Tensor) -> list[torch.Tensor]:
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return vqvae.encode(batch)

    with pytest.raises(KeyboardInterrupt):
        open_cache(images(image_folder), vqvae, views=2, root=root, batch=5, encode=stop)
    assert list(root.iterdir()) == []


def test_a_damaged_cache_says_so(image_folder: Path, tmp_path: Path) -> None:
    vqvae, root = small_model().vqvae, tmp_path / "tokens"
    open_cache(images(image_folder), vqvae, views=1, root=root)
    (folder,) = root.iterdir()
    facts = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps(facts | {"views": 4}))
    with pytest.raises(DataError, match="remove it"):
        open_cache(images(image_folder), vqvae, views=1, root=root)
    (folder / "tokens.npy").write_bytes(b"")
    with pytest.raises(DataError, match="remove it"):
        open_cache(images(image_folder), vqvae, views=1, root=root)


def test_a_full_disk_says_how_much_is_needed(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("car_train.training.token_cache.np.save", full)
    with pytest.raises(DataError, match="MiB: free some space"):
        open_cache(images(image_folder), small_model().vqvae, views=1, root=tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.filterwarnings("ignore:left out")
def test_all_of_a_cached_item_is_of_one_image(tmp_path: Path) -> None:
    """Of every third image no depth can be made, and one can't be read: the next takes its place as a whole."""
    for i in range(24):
        image = Image.new("RGBA", (24, 24), (250, 250, 250, 255) if i % 3 == 2 else (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse([3, 3 + i % 5, 9 + i // 2, 20], fill=(10 * i, 90, 240 - 10 * i, 255))
        path = tmp_path / "image_folder" / "ab"[i // 12] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (tmp_path / "image_folder" / "a" / "04.png").write_bytes(b"no image")
    vqvae = small_model().vqvae
    data = images(tmp_path / "image_folder", control_type="depth", preload=False)
    cached = CachedTokens(data, open_cache(data, vqvae, views=2, root=tmp_path / "tokens"))
    cached.set_epoch(1)
    for i in range(24):
        at, whole = data.item(i)
        assert at == i or i % 3 == 2 or i == 4
        assert torch.equal(cached[i]["control"], whole["control"])
        assert torch.equal(cached[i]["tokens"], join_tokens(vqvae.encode(whole["image"][None]))[0])
        assert cached[i]["label"] == whole["label"] == data.files[at][1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_met_before_anything_is_encoded(image_folder: Path, small_disk: Path) -> None:
    """In a process of its own: a memory map of a sparse file would end it by SIGBUS."""
    code = f"""
import torch
from pathlib import Path
from car_train.data.dataset import ControlledImages
from car_train.data.folder import DataError
from car_train.training.token_cache import open_cache
from fixtures.small import small_model

def never(_):
    raise AssertionError("encoded")

data = ControlledImages({str(image_folder)!r}, 20, split="all", augment=True)
try:
    open_cache(data, small_model().vqvae, views=500, root=Path({str(small_disk)!r}), encode=never)
except DataError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "MiB: free some space, or give another folder (--token-root)" in done.stdout
    assert list(small_disk.iterdir()) == []


def test_a_file_system_that_cannot_allocate_is_written_to_all_the_same(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    vqvae = small_model().vqvae
    plain = open_cache(images(image_folder), vqvae, views=2, root=tmp_path / "plain")
    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    other = open_cache(images(image_folder), vqvae, views=2, root=tmp_path / "other")
    np.testing.assert_array_equal(plain.tokens, other.tokens)
