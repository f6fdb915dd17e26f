"""The published recipe: schedules of learning rate and weight decay, the gradient scaler, epochs, initialisation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from car_train import checkpoint
from car_train.cli import main
from car_train.config import ConfigError
from car_train.training.command import _car
from car_train.training.optimizer import learning_rate, lin0, weight_decay
from car_train.training.options import TrainOptions
from car_train.training.trainer import LARGEST_SCALE, Trainer

MODEL = "--patch-nums 1,2,4 --multipliers 1,1,2 --channels 8 --latent-channels 8 --vocab 32"
QUICK = "--batch 4 --workers 0 --threads 1 --warmup 0"
SMALL = "--depth 2 --width 32 --heads 2 --views 1"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    for name in ("ant", "bee"):
        (root / "data" / name).mkdir(parents=True)
        for i in range(45):
            Image.new("RGB", (16, 16), (5 * i, 90, 60)).save(root / "data" / name / f"{i}.png")
    return root / "data"


def train(stage: str, images: Path, run: Path, flags: str) -> int:
    tokens = "" if stage == "vqvae" else f"--token-root {images.parent / 'tokens'}"
    return main([stage, "--data", str(images), "-o", str(run), *f"{QUICK} {tokens} {flags}".split()])


@pytest.fixture(scope="module")
def tokenizer(images: Path) -> Path:
    assert train("vqvae", images, images.parent / "vqvae", f"{MODEL} --steps 2") == 0
    return images.parent / "vqvae"


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def options(tmp_path: Path, **given: object) -> TrainOptions:
    return TrainOptions(**{"data": tmp_path, "output": tmp_path, **given})  # type: ignore[arg-type]


def test_lin0_is_the_published_schedule(tmp_path: Path) -> None:
    """Warm-up from 0.5 %, 5 % of the rest at the peak, then a line that ends at the last step."""
    chosen = options(tmp_path, steps=220, warmup=20, lr=2.0, schedule="lin0", final_lr=0.1)
    rates = [learning_rate(step, chosen) for step in range(220)]
    assert rates[0] == pytest.approx(2 * 0.005)
    assert rates[10] == pytest.approx(2 * (0.005 + 0.995 * 0.5))
    assert rates[20:30] == [2.0] * 10  # 10 of 199 are the last below 5 %
    assert rates[119] == pytest.approx(2 * (0.1 + 0.9 * (1 - 99 / 199) / 0.95))
    assert rates[219] == pytest.approx(0.2)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert lin0(0, 1, 0, 0.1) == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "lin0"])
def test_the_share_that_is_left_at_the_end_can_be_chosen(tmp_path: Path, schedule: str) -> None:
    for final in (0.0, 0.01, 0.1):
        chosen = options(tmp_path, steps=100, warmup=0, lr=2.0, schedule=schedule, final_lr=final)
        assert learning_rate(100, chosen) == pytest.approx(2 * final)


def test_weight_decay_goes_along_half_a_cosine(tmp_path: Path) -> None:
    constant = options(tmp_path, steps=11, weight_decay=0.05)
    assert {weight_decay(step, constant) for step in range(11)} == {0.05}
    growing = options(tmp_path, steps=11, weight_decay=0.05, weight_decay_end=0.08)
    found = [weight_decay(step, growing) for step in range(11)]
    assert found == pytest.approx([0.08 - 0.03 * 0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(11)])


def test_what_decays_follows_the_schedule_and_the_rest_never_decays(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, ...]] = []
    step = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, *args: object, **named: object) -> object:
        seen.append(tuple(group["weight_decay"] for group in self.param_groups))
        return step(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    flags = f"{MODEL} --steps 3 --weight-decay 0.02 --weight-decay-end 0.04"
    assert train("vqvae", images, tmp_path / "run", flags) == 0
    assert seen == [(pytest.approx(decay), 0.0) for decay in (0.02, 0.03, 0.04)]


def test_epochs_stand_for_steps(images: Path, tmp_path: Path) -> None:
    assert train("vqvae", images, tmp_path / "run", f"{MODEL} --epochs 0.5 --final-lr 0.1") == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    expected = round(0.5 * (facts["pictures"]["train"] // 4))
    assert facts["options"]["steps"] == expected == len(records(tmp_path / "run"))
    with pytest.raises(SystemExit) as error:
        train("vqvae", images, tmp_path / "x", f"{MODEL} --epochs 1 --steps 5")
    assert error.value.code == 2


def test_the_gradient_scaler_starts_low_and_stays_below_half_of_fp16(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("car_train.training.trainer.SCALE_STEPS", 1)  # doubles at every good step
    scales: list[float] = []
    step = Trainer._train_step

    def watch(self: Trainer, batches: object) -> dict[str, float]:
        scales.append(self.scaler.get_scale())
        return step(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_train_step", watch)
    assert train("vqvae", images, tmp_path / "run", f"{MODEL} --steps 8 --precision fp16 --lr 1e-5") == 0
    assert scales[0] == 2**11
    assert max(scales) <= LARGEST_SCALE == 32768


def test_gammas_start_as_small_as_asked_for(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    stds = []
    for alng in (1e-3, 1e-1):
        flags = f"--vqvae {tokenizer} {SMALL} --steps 1 --lr 1e-12 --alng {alng}"
        assert train("var", images, tmp_path / f"{alng}", flags) == 0
        model = checkpoint.load(tmp_path / f"{alng}")
        assert model.car is not None
        projection = model.car.base.blocks[1].ada_linear
        assert projection is not None
        stds.append(projection.weight[:64].std().item() / alng)
    assert stds == pytest.approx([math.sqrt(1 / (3 * 32))] * 2, rel=0.1)


def test_base_and_branch_drop_paths_while_a_branch_trains(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    flags = f"--vqvae {tokenizer} {SMALL} --steps 1 --drop-path 0.4"
    assert train("var", images, tmp_path / "var", flags) == 0

    def rates(flag: str) -> list[float]:
        from car_train.cli import parse_args

        command = f"car --data {images} -o x --base {tmp_path / 'var'} --encoder-widths 8,8,16 {flag}"
        stage = _car(parse_args(command.split()))
        stage.train()
        car = stage.model.car
        assert car is not None
        assert car.training
        assert all(block.training for block in car.base.blocks)
        return [block.drop_path_rate for block in [*car.base.blocks, *car.branch_blocks]]

    assert rates("") == [0, 0.4, 0]
    assert rates("--drop-path 0.2") == [0, 0.2, 0]
    with pytest.raises(ConfigError, match="drop_path is 1"):
        rates("--drop-path 1")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--final-lr 2", "final_lr is 2"),
        ("--epochs 0", "epochs is 0"),
        ("--weight-decay-end -1", "weight_decay_end is -1"),
    ],
)
def test_numbers_out_of_range_are_named(
    images: Path, tmp_path: Path, flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("vqvae", images, tmp_path / "run", f"{MODEL} {flags}") == 2
    assert words in capsys.readouterr().err
