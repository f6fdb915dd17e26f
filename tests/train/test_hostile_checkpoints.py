"""A checkpoint is data: what config and headers claim is checked before memory is taken, and refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from car_train import checkpoint
from car_train.checkpoint import CheckpointError
from car_train.cli import main as train_main
from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.errors import error_lines
from car_train.evaluation import evaluate
from car_train.interop.official import OfficialCheckpointError, build_model, load_pth
from car_train.model import Model

WEIGHTS = "var.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        vqvae=VQVAEConfig(sides=(1, 2, 3, 4), vocab=64, latent_channels=8, channels=8, multipliers=(1, 2, 2)),
        var=VARConfig(depth=2, width=64, heads=2, classes=2),
        car=CARConfig(control_type="canny", encoder_widths=(8, 16, 16), encoder_strides=(2, 2)),
    )
    model = Model(config)
    for weights in model.parameters():
        torch.nn.init.normal_(weights.requires_grad_(False), std=0.02)
    return checkpoint.save(model, tmp_path_factory.mktemp("hostile") / "good")


def _config(part: str, **values: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        whole = json.loads((root / "config.json").read_text())
        (whole[part] if part else whole).update(values)
        (root / "config.json").write_text(json.dumps(whole))

    return change


def _text(content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / "config.json").write_bytes(content)


def _weights(content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / WEIGHTS).write_bytes(content)


def _each(change: Callable[[Any], Any]) -> Callable[[Path], object]:
    return lambda root: save_file(
        {name: change(value).contiguous() for name, value in load_file(root / WEIGHTS).items()}, root / WEIGHTS
    )


def _fifo(name: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / name).unlink()
        os.mkfifo(root / name)

    return change


CASES: dict[str, Callable[[Path], object]] = {
    "depth 10^6": _config("var", depth=10**6, width=64, heads=2),
    "depth 2.5": _config("var", depth=2.5),
    "width 2^62": _config("var", width=2**62, heads=2),
    "vocab 10^12": _config("vqvae", vocab=10**12),
    "vocab of 5000 digits": _config("vqvae", vocab=10**4000),
    "res_blocks 10^7": _config("vqvae", res_blocks=10**7),
    "sides 30,000": _config("vqvae", sides=[1, 2, 3, 30_000]),
    "sides of texts": _config("vqvae", sides=["1", "2"]),
    "sides of lists": _config("vqvae", sides=[[1], [2]]),
    "5000 multipliers": _config("vqvae", multipliers=[1] * 5000),
    "an unknown key": _config("vqvae", unknown=1),
    "class names of numbers": _config("", class_names=[1, 2]),
    "deep lists": _text(b"[" * 10**6),
    "NaN": _text(b'{"vqvae":NaN}'),
    "not UTF-8": _text(b"\xff\xfe\0"),
    "5 MB of config": _text(b" " * 5 * 2**20),
    "a header of 2^63 bytes": _weights(struct.pack("<Q", 2**63) + b"{}"),
    "a header of 99 MB": _weights(struct.pack("<Q", 99_000_000) + b" " * 99_000_000),
    "no weights": _weights(b""),
    "a list as header": _weights(struct.pack("<Q", 4) + b"[1] "),
    "integers": _each(lambda value: value.long()),
    "ranks": _each(lambda value: value[None]),
    "not finite": _each(lambda value: value * float("nan")),
}
if os.name != "nt":
    CASES |= {"a FIFO as weights": _fifo(WEIGHTS), "a FIFO as config": _fifo("config.json")}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_refused_in_one_line(name: str, good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    CASES[name](bad)
    with pytest.raises(CheckpointError) as found:
        checkpoint.load(bad)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600


def test_weights_in_float64_load(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "double"
    shutil.copytree(good, bad)
    _each(lambda value: value.double() if value.is_floating_point() else value)(bad)
    loaded = checkpoint.load(bad)
    assert loaded.car is not None
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.skipif(os.name == "nt", reason="there are no FIFOs")
def test_a_fifo_is_not_hashed(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    os.mkfifo(bad / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more\.safetensors: not a file"):
        checkpoint.fingerprint(bad)


def test_a_training_state_of_another_kind_is_refused(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    torch.save([1, 2], bad / "trainer.pt")
    with pytest.raises(CheckpointError, match="it holds a list"):
        checkpoint.load_trainer(bad)


def test_a_packed_training_state_or_published_file_is_refused_before_it_is_unpacked(
    good: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(bad / "trainer.pt", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    assert (bad / "trainer.pt").stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="it is packed"):
        checkpoint.load_trainer(bad)
    with pytest.raises(OfficialCheckpointError, match="it is packed"):
        load_pth(bad / "trainer.pt")
    assert load_pth(tmp_path / "plain.pth")["a"].shape == (10**6,)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3)])
def test_a_published_file_of_wrong_ranks_is_refused_in_one_line(shape: tuple[int, ...]) -> None:
    said = r"'quantize\.embedding\.weight' is .*, expected 2 sizes"
    with pytest.raises(OfficialCheckpointError, match=said) as found:
        build_model({"quantize.embedding.weight": torch.zeros(shape)})
    assert "\n" not in str(found.value)


def test_a_published_transformer_of_wrong_ranks_is_refused() -> None:
    with pytest.raises(OfficialCheckpointError, match=r"'pos_1LC' is \[680\], expected 3 sizes"):
        build_model({}, {"pos_1LC": torch.zeros(680)})


def test_what_a_file_says_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": _Executed(tmp_path / "ran")}, tmp_path / "code.pth")
    assert train_main(["import", "--vae", str(tmp_path / "code.pth"), "-o", str(tmp_path / "out")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_an_error_is_at_most_20_lines_of_300_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(["sample", str(tmp_path / "/".join(["\x1b[2J" + "n" * 200] * 4)), "--class", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= 300
    assert "\x1b" not in line
    lines = error_lines("\n".join(f"{i}: {'x' * i * 100}" for i in range(50))).split("\n")
    assert len(lines) == 20
    assert (lines[0], lines[10]) == ("0: ", "  … 31 more")
    assert lines[-1].startswith("49: x")
    assert max(map(len, lines)) == 280


def test_the_table_of_an_evaluation_steers_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], good: Path
) -> None:
    report = {"name": "plan\x1b[2J\x9b2J"}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: report)
    monkeypatch.setattr(evaluate, "table", lambda found: found["name"])
    command = ["eval", str(good), "--data", "x", "--features", "none"]
    for flags in ([], ["--json"]):
        assert train_main([*command, *flags]) == 0
        out, err = capsys.readouterr()
        assert not {"\x1b", "\x9b"} & set(out + err)
        assert r"plan\x1b[2J\x9b2J" in (err if flags else out)


class _Executed:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.mark), "w"))


def test_a_published_file_never_runs_code(tmp_path: Path) -> None:
    torch.save({"a": _Executed(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(OfficialCheckpointError, match="not a readable weights-only"):
        load_pth(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()
