"""A run's folder: which checkpoints are the run's, what is never saved, and a log that never goes back in time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from car_train import checkpoint
from car_train.cli import main
from car_train.evaluation.runs import read_run
from fixtures.small import small_model

MODEL = "--patch-nums 1,2,4 --multipliers 1,1,1 --channels 8 --latent-channels 8 --vocab 32"
QUICK = "--batch 4 --workers 0 --threads 1 --warmup 0"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    for i in range(60):
        Image.new("RGB", (16, 16), (4 * i, 90, 60)).save(folder / f"{i}.png")
    return folder.parent


def train(images: Path, run: Path, flags: str) -> int:
    return main(["vqvae", "--data", str(images), "-o", str(run), *f"{MODEL} {QUICK} {flags}".split()])


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_checkpoints_are_known_by_number_and_those_put_aside_are_left_alone(images: Path, tmp_path: Path) -> None:
    run, every = tmp_path / "run", "--save-every 1 --keep 2"
    assert train(images, run, f"--steps 2 {every}") == 0
    aside = ("step-best", "step-0000001-good", "step-9x", "step-")
    for name in aside:
        shutil.copytree(run / "step-0000001", run / name)
    (run / "step-0000099").mkdir()  # not whole
    assert checkpoint.locate(run).name == "step-0000002"
    assert read_run(run).config is not None
    assert train(images, run, f"--steps 4 {every} --resume") == 0
    assert steps_of(run) == [1, 2, 3, 4]
    assert [path.name for path in checkpoint.of_run(run)] == ["step-0000003", "step-0000004"]
    assert all((run / name / "config.json").is_file() for name in aside)


def test_a_folder_with_checkpoints_that_were_put_aside_alone_is_free_for_a_run(images: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint.save(small_model(), tmp_path / "x"), tmp_path / "run" / "step-best")
    assert train(images, tmp_path / "run", "--steps 1") == 0


def test_numbers_order_checkpoints_however_many_digits_they_have(tmp_path: Path) -> None:
    model = small_model()
    for name in ("step-0000900", "step-10000000", "step-5"):
        checkpoint.save(model, tmp_path / name)
    assert [path.name for path in checkpoint.of_run(tmp_path)] == ["step-5", "step-0000900", "step-10000000"]


def test_a_model_that_the_last_step_broke_is_not_saved(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of 1e30 are numbers, what they compute isn't."""
    assert train(images, tmp_path / "first", "--steps 1 --lr 1e30") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not saved; start again with a lower lr" in error
    assert checkpoint.of_run(tmp_path / "first") == []
    run = tmp_path / "second"
    assert train(images, run, "--steps 2 --save-every 1 --keep 1") == 0
    assert train(images, run, "--steps 3 --save-every 1 --keep 1 --resume --lr 1e30 --schedule constant") == 2
    assert "resume from step-0000002 (--resume)" in capsys.readouterr().err
    assert [path.name for path in checkpoint.of_run(run)] == ["step-0000002"]


@pytest.mark.parametrize("where", ["weights", "trainer"])
def test_a_checkpoint_holds_finite_numbers_alone(tmp_path: Path, where: str) -> None:
    model, trainer = small_model(), {"optimizers": [{"state": {0: {"exp_avg": torch.tensor([1.0, float("inf")])}}}]}
    if where == "weights":
        trainer = {}
        next(model.vqvae.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"not written, (vqvae|optimizers\.0)\.\S+ is not finite; use"
    ):
        checkpoint.save(model, tmp_path / "step-1", trainer)
    assert not (tmp_path / "step-1").exists()


def test_a_log_is_cut_back_to_the_step_that_a_run_goes_on_from(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(images, run, "--steps 4 --save-every 2") == 0
    before = (run / "log.jsonl").read_text().splitlines()
    shutil.rmtree(run / "step-0000004")  # as if the end of the run had not come
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "sec')  # torn
    assert train(images, run, "--steps 4 --save-every 2 --resume") == 0
    after = (run / "log.jsonl").read_text().splitlines()
    assert steps_of(run) == [1, 2, 3, 4]
    assert after[:2] == before[:2]
    seconds = [json.loads(line)["seconds"] for line in after]
    assert seconds == sorted(seconds)


def test_a_run_that_ended_before_its_first_checkpoint_starts_its_log_anew(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(images, run, "--steps 3") == 0
    shutil.rmtree(run / "step-0000003")
    assert train(images, run, "--steps 2") == 0
    assert steps_of(run) == [1, 2]
