"""`--from-published DIR`: the files of a folder are recognised by what is in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from car_export import cli
from car_export.cli import main as build_engines
from car_export.config import ExportOptions
from car_export.published import Published, find_published
from car_train.config import ConfigError
from car_train.interop.official import OfficialCheckpointError
from car_train.model import Model
from fixtures.golden import Golden, save_official


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


@pytest.fixture
def folder(tiny: Golden, official_files: Callable[[Golden], dict[str, Path]], tmp_path: Path) -> Path:
    """Files as they are downloaded: a tokenizer, a transformer and the branch `depth`, in a folder each."""
    files, root = official_files(tiny), tmp_path / "downloads"
    for name, place in {
        "vae": "var/vae_ch160v4096z32.pth",
        "var": "var/var_d16.pth",
        "car": "car/car_depth_d16.pth",
    }.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[name], root / place)
    (root / "README.md").write_text("downloaded")
    return root


def look(folder: Path, var: Path | None = None) -> tuple[Published, list[str]]:
    lines: list[str] = []
    return find_published(folder, lines.append, var), lines


def test_one_command_exports_them_and_says_what_it_found(
    folder: Path, tiny: Golden, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan is made of; test_golden.py makes one of the same files."""
    exported: list[tuple[dict[str, Model], ExportOptions]] = []
    monkeypatch.setattr(cli, "build_plan_of_2", lambda models, options, _: exported.append((models, options)))
    sides = ",".join(map(str, tiny.sides))
    assert build_engines(["--from-published", str(folder), "--patch-nums", sides, "-o", "d16.plan"]) == 0
    said = capsys.readouterr().err
    assert "tokenizer: vae_ch160v4096z32.pth" in said
    assert "transformer: var_d16.pth, depth 2, width 128" in said
    assert "control depth: car_depth_d16.pth" in said
    ((models, options),) = exported
    assert [(name, cli.control_type_of(model)) for name, model in models.items()] == [("depth", "depth")]
    assert options.output == Path("d16.plan")
    assert set(options.provenance) == {
        "sha256 vae vae_ch160v4096z32.pth",
        "sha256 var var_d16.pth",
        "sha256 car car_depth_d16.pth",
    }


def test_several_branches_are_named_by_their_files_whatever_else_is_there(folder: Path, tiny: Golden) -> None:
    shutil.copy(folder / "car/car_depth_d16.pth", folder / "car/car_canny_d16.pth")
    shutil.copy(folder / "car/car_depth_d16.pth", folder / "CAR-Normals.ckpt")
    torch.save({"some.weight": torch.zeros(2)}, folder / "lpips.pth")
    found, lines = look(folder)
    assert {kind: path.name for kind, path in found.cars.items()} == {
        "canny": "car_canny_d16.pth",
        "depth": "car_depth_d16.pth",
        "normal": "CAR-Normals.ckpt",
    }
    assert [line for line in lines if "left out: lpips.pth" in line]


def test_of_several_transformers_the_one_that_the_branches_fit_is_taken(folder: Path) -> None:
    (folder / "other").mkdir()
    other = save_official(Golden("ten").state_dicts, folder / "other")
    (folder / "other" / other["vae"].name).unlink()
    shutil.move(other["car"], folder / "other/car_canny_d20.pth")
    (folder / "car/car_depth_d16.pth").unlink()
    found, _ = look(folder)
    assert found.var == other["var"], "branches of width 256 alone"
    assert list(found.cars) == ["canny"]
    plain, lines = look(folder, folder / "var/var_d16.pth")
    assert plain.var == folder / "var/var_d16.pth"
    assert plain.cars == {}
    assert "left out: car_canny_d20.pth, a branch for width 256, the transformer has 128" in lines
    assert "no control branch: the plan is plain VAR" in lines


def test_a_branch_that_brings_its_base_needs_no_transformer(folder: Path, tiny: Golden) -> None:
    states = tiny.state_dicts
    torch.save({**states["var"], **states["car"]}, folder / "car/car_depth_d16.pth")
    (folder / "var/var_d16.pth").unlink()
    found, _ = look(folder)
    assert found.var is None
    assert list(found.cars) == ["depth"]


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def copy(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder / name, folder / to)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("var/vae_ch160v4096z32.pth"), "has no tokenizer (such as vae_ch160v4096z32.pth); put it there"),
        (remove("var/var_d16.pth"), "has no transformer (such as var_d16.pth); put it there, or name it with --var"),
        (copy("var/vae_ch160v4096z32.pth", "again.pth"), "has several files of a tokenizer: again.pth, vae_ch160"),
        (
            copy("var/var_d16.pth", "var_d16_again.pth"),
            "several transformers that would do: var_d16.pth, var_d16_a",
        ),
        (copy("car/car_depth_d16.pth", "model.pth"), "what model.pth follows is not in its name; rename it"),
        (copy("car/car_depth_d16.pth", "canny-or-depth.pth"), "what canny-or-depth.pth follows is not in its name"),
        (copy("car/car_depth_d16.pth", "depth.pth"), "both follow depth; leave one of them there"),
        (lambda folder: shutil.rmtree(folder), "is no folder"),
    ],
)
def test_what_nothing_decides_is_refused_with_what_to_do(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=re.escape(message)):
        look(folder)


def test_a_hostile_file_is_refused_and_runs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"pos_1LC": Evil()}, folder / "evil.pth")
    with pytest.raises(OfficialCheckpointError, match=r"evil.pth: not a readable weights-only checkpoint"):
        look(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "evil.pth").unlink()
    torch.save({"car_control_convs.x": torch.zeros(1), "car_var_conv.weight": torch.zeros(3)}, folder / "thin.pth")
    with pytest.raises(OfficialCheckpointError, match=r"there is no matrix 'car_var_conv.weight'"):
        look(folder)


def test_flags_that_name_files_do_not_go_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--from-published", str(folder), "-o", "x.plan"]
    assert build_engines([*arguments, "--vae", "vae.pth"]) == 2
    assert "--from-published finds the files itself; leave out --vae, or that flag" in capsys.readouterr().err
    assert build_engines(["runs/car", *arguments]) == 2
    assert "are two models; give one of them" in capsys.readouterr().err
