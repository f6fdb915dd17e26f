"""Importing the published checkpoints.

Their config is inferred, and whatever doesn't fit is refused, all of it at once.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from car_train import checkpoint
from car_train.cli import main
from car_train.config import SIDES_256, VQVAEConfig
from car_train.interop.official import OfficialCheckpointError, build_model, load_pth
from fixtures.golden import OFFICIAL_D16, OFFICIAL_VAE, Golden, official_state_dicts, save_official


def dicts(**changes: object) -> dict[str, dict[str, torch.Tensor]]:
    config: dict[str, object] = {
        "V": 64,
        "Cvae": 32,
        "ch": 32,
        "depth": 2,
        "num_classes": 10,
        "patch_nums": [1, 2, 3, 4],
    }
    return official_state_dicts(**(config | changes))  # type: ignore[arg-type]


def test_the_official_names_and_shapes_of_d16_fit_exactly() -> None:
    """The real files' names, shapes and no values: every parameter finds its tensor, none is left over."""
    with torch.device("meta"):
        vae = {k: torch.empty(s) for k, s in OFFICIAL_VAE.items()}
        both = {k: torch.empty(s) for k, s in OFFICIAL_D16.items()}
    model = build_model(
        vae,
        {k: v for k, v in both.items() if not k.startswith("car_")},
        {k: v for k, v in both.items() if k.startswith("car_")},
        "depth",
    )
    config = model.config
    assert config.vqvae == VQVAEConfig()
    assert (config.var.depth, config.var.C, config.var.H, config.var.classes, config.var.shared_aln) == (
        16,
        1024,
        16,
        1000,
        False,
    )
    assert config.car.encoder_widths == (64, 128, 256, 512, 1024)
    assert config.vqvae.sides == SIDES_256


def test_phi_of_each_scale_is_the_published_one() -> None:
    # Ties, such as scale 2 of 10, fall as float64 makes them: towards the later φ.
    assert VQVAEConfig().phi_index == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


def test_config_is_inferred_with_shared_aln() -> None:
    parts = dicts(shared_aln=True, depth=4, V=96, num_classes=7)
    config = build_model(parts["vae"], parts["var"], parts["car"], sides=(1, 2, 3, 4)).config
    assert config.var.shared_aln
    assert (config.var.depth, config.var.classes, config.vqvae.vocab) == (4, 7, 96)


def test_sides_that_are_not_official_must_be_named() -> None:
    parts = dicts()
    with pytest.raises(OfficialCheckpointError, match="--patch-nums 1,2,3,4"):
        build_model(parts["vae"], parts["var"])
    with pytest.raises(OfficialCheckpointError, match="it has 4 scales"):
        build_model(parts["vae"])
    assert build_model(parts["vae"], sides=(1, 2, 3, 4)).car is None


def test_everything_wrong_is_listed_at_once() -> None:
    parts = dicts()
    del parts["var"]["blocks.1.attn.proj.weight"]
    parts["var"]["surprise"] = torch.zeros(3)
    parts["vae"]["post_quant_conv.bias"] = torch.zeros(5)
    parts["car"]["car_skip_norm.7.weight"] = torch.zeros(1)
    with pytest.raises(OfficialCheckpointError) as caught:
        build_model(parts["vae"], parts["var"], parts["car"], sides=(1, 2, 3, 4))
    text = str(caught.value)
    assert text.startswith("4 tensors don't fit")
    for finding in (
        "missing in var: blocks.1.attn.proj.weight",
        "unexpected in var: surprise [3]",
        "misshapen in vae: post_quant_conv.bias is [5], expected [32]",
        "unexpected in car: car_skip_norm.7.weight [1]",
    ):
        assert finding in text


def test_a_transposed_tensor_is_misshapen() -> None:
    parts = dicts()
    parts["var"]["word_embed.weight"] = parts["var"]["word_embed.weight"].T.contiguous()
    with pytest.raises(
        OfficialCheckpointError, match=r"misshapen in var: word_embed.weight is \[32, 128\], expected \[128, 32\]"
    ):
        build_model(parts["vae"], parts["var"], sides=(1, 2, 3, 4))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(OfficialCheckpointError, match="not a readable weights-only checkpoint"):
            load_pth(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_training_containers_are_unwrapped(tmp_path: Path) -> None:
    torch.save({"trainer": {"var_wo_ddp": {"module.a": torch.ones(2)}}}, tmp_path / "t.pth")
    assert set(load_pth(tmp_path / "t.pth")) == {"a"}


def test_import_writes_a_checkpoint_that_gives_the_golden_tokens(
    tiny: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = save_official(tiny.state_dicts, tmp_path)
    argv = ["import", "--vae", str(files["vae"]), "--var", str(files["var"]), "--car", str(files["car"])]
    assert main([*argv, "--control-type", "depth", "--sides", "1,2,3,4", "-o", str(tmp_path / "ck")]) == 0
    assert sorted(p.name for p in (tmp_path / "ck").iterdir()) == [
        "car.safetensors",
        "config.json",
        "var.safetensors",
        "vqvae.safetensors",
    ]
    model = checkpoint.load(tmp_path / "ck")
    assert model.config.car is not None
    assert model.config.car.control_type == "depth"
    with torch.no_grad():
        grids = model.vqvae.encode(torch.from_numpy(tiny["image"]))
    np.testing.assert_array_equal(torch.cat([g.flatten(1) for g in grids], 1).numpy(), tiny["image_tokens"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["import", "--var", "v.pth", "-o", "x"], "--vae is missing"),
        (["import", "--vae", "v.pth", "--car", "c.pth", "-o", "x"], "--control-type is missing"),
        (["import", "--vae", "nothing.pth", "-o", "x"], "no such file"),
        (["sample", "nowhere"], "no checkpoint there"),
    ],
)
def test_bad_requests_are_one_line_with_a_remedy(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path, tiny: Golden) -> None:
    parts = tiny.state_dicts
    model = build_model(parts["vae"], sides=tiny.sides)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(checkpoint.CheckpointError, match="is not a checkpoint"):
        checkpoint.save(model, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    for _ in range(2):  # a checkpoint may be replaced by another, and leaves nothing next to it
        checkpoint.save(model, tmp_path / "ck")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "photos"]


def test_a_damaged_checkpoint_says_which_file(tmp_path: Path, tiny: Golden) -> None:
    parts = tiny.state_dicts
    path = checkpoint.save(build_model(parts["vae"], parts["var"], sides=tiny.sides), tmp_path / "ck")
    data = (path / "var.safetensors").read_bytes()
    (path / "var.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(checkpoint.CheckpointError, match=r"var\.safetensors: doesn't fit"):
        checkpoint.load(path)
    (path / "var.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"var\.safetensors: missing"):
        checkpoint.load(path)
    config = json.loads((path / "config.json").read_text())
    config["vqvae"]["sides"] = [3, 2, 1]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(checkpoint.CheckpointError, match="start at 1 and grow"):
        checkpoint.load(path)
