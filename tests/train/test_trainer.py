"""The three stages on a small folder of drawn images: they learn, log, save, resume exactly, refuse clearly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_train import checkpoint
from car_train.cli import main
from car_train.data.folder import split_of
from car_train.training.ema import EMA
from car_train.training.optimizer import learning_rate, parameter_groups
from car_train.training.options import TrainOptions
from car_train.training.stages import new_vqvae
from car_train.training.trainer import Trainer, seed_everything

TOKENIZER = [
    "--patch-nums",
    "1,2,4",
    "--vocab",
    "32",
    "--latent-channels",
    "8",
    "--channels",
    "8",
    "--multipliers",
    "1,2,2",
]
QUICK = [
    "--batch",
    "8",
    "--warmup",
    "2",
    "--workers",
    "0",
    "--validate-every",
    "100",
    "--save-every",
    "100",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs and bars of random colours on transparent ground: 2 classes, 40 images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("bar", "disc"):
        (root / name).mkdir()
        for i in range(40):
            image = Image.new("RGBA", (32, 32))
            colour = (*rng.integers(0, 255, 3).tolist(), 255)
            x, y = rng.integers(2, 14, 2).tolist()
            draw = ImageDraw.Draw(image)
            (draw.ellipse if name == "disc" else draw.rectangle)(
                (x, y, x + 14, y + (14 if name == "disc" else 6)), fill=colour
            )
            image.save(root / name / f"{name}{i}.png")
    return root


class StopTrainingError(Exception):
    """Stands for a machine that went down."""


def train(stage: str, images: Path, output: Path, *flags: str) -> int:
    caches = [] if stage == "vqvae" else ["--token-root", str(images.parent / "tokens"), "--views", "2"]
    return main([stage, "--data", str(images), "-o", str(output), *QUICK, *caches, *flags])


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages, a few dozen steps each."""
    root = tmp_path_factory.mktemp("runs")
    small = ["--depth", "2", "--width", "32", "--heads", "2"]
    assert train("vqvae", images, root / "vqvae", "--steps", "60", "--lr", "2e-3", *TOKENIZER) == 0
    assert (
        train("var", images, root / "var", "--steps", "40", "--lr", "2e-3", "--vqvae", str(root / "vqvae"), *small)
        == 0
    )
    flags = ["--base", str(root / "var"), "--control", "canny", "--encoder-widths", "8,8,16"]
    assert train("car", images, root / "car", "--steps", "60", "--lr", "4e-3", *flags) == 0
    return root


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["vqvae", "var", "car"])
def test_a_stage_learns_and_leaves_a_log_a_sheet_and_a_checkpoint(runs: Path, stage: str) -> None:
    log = records(runs / stage)
    losses = [r["loss"] for r in log]
    assert np.mean(losses[-15:]) < np.mean(losses[:15])
    assert "val_loss" in log[-1]
    assert list((runs / stage).glob("samples-*.png"))
    assert checkpoint.load(runs / stage).config.vqvae.sides == (1, 2, 4)


def test_a_checkpoint_is_whole_and_a_branch_leaves_its_base_alone(runs: Path) -> None:
    tokenizer, base, steered = (checkpoint.load(runs / stage) for stage in ("vqvae", "var", "car"))
    for name, p in tokenizer.vqvae.named_parameters():
        assert torch.equal(p, steered.vqvae.get_parameter(name)), name
    assert base.car is not None
    assert steered.car is not None
    assert steered.car.branch is not None
    for name, p in base.car.base.named_parameters():
        assert torch.equal(p, steered.car.base.get_parameter(name)), name
    assert steered.config.class_names == ("bar", "disc")
    assert not torch.equal(steered.car.branch.blocks[0].attn.qkv_weight, base.car.base.blocks[0].attn.qkv_weight)


def test_a_tokenizer_goes_on_with_the_codes_it_was_given(images: Path, runs: Path, tmp_path: Path) -> None:
    """Random codes are revived after the first step; trained ones, of which one batch uses few, are kept."""
    steps = ["--steps", "2", "--lr", "1e-9", "--warmup", "0", *TOKENIZER]
    seed_everything(0)
    given = checkpoint.load(runs / "vqvae")
    starts = {"trained": given, "random": new_vqvae(given.config.vqvae)}
    for name, init in (("trained", ["--init", str(runs / "vqvae")]), ("random", [])):
        assert train("vqvae", images, tmp_path / name, *steps, *init) == 0
        now, before = (m.vqvae.quantizer.embedding for m in (checkpoint.load(tmp_path / name), starts[name]))
        assert torch.allclose(now, before, rtol=0, atol=1e-6) == (name == "trained")


def test_the_decoder_trains_alone_and_images_keep_their_tokens(
    images: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*"--decoder-only --steps 3 --lr 1e-3 --warmup 0 --ema 0.5".split(), *TOKENIZER]
    flags += "--adversarial 0.5 --critic-width 8".split()
    assert train("vqvae", images, tmp_path / "run", *flags, "--init", str(runs / "vqvae")) == 0
    now, before = (checkpoint.load(path).vqvae for path in (tmp_path / "run", runs / "vqvae"))
    for name, p in before.named_parameters():
        kept = name.startswith(("encoder.", "quant_conv.", "quantizer."))
        assert torch.equal(now.get_parameter(name), p) == kept, name
    assert "codes_used" not in {key for record in records(tmp_path / "run") for key in record}
    assert train("vqvae", images, tmp_path / "none", *flags) == 2
    assert "--init" in capsys.readouterr().err


def interrupted(stage: str, images: Path, output: Path, at: int, *flags: str) -> None:
    """A run that goes down at step `at`."""
    step = Trainer._train_step

    def stop(self: Trainer, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, float]:
        if self.step == at:
            raise StopTrainingError
        return step(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stop)
        with pytest.raises(StopTrainingError):
            train(stage, images, output, *flags)
    torch.rand(7)  # whatever else uses the random state in between


def same_weights(a: Path, b: Path) -> None:
    expected, found = (dict(checkpoint.load(path).named_parameters()) for path in (a, b))
    for name, p in expected.items():
        assert torch.equal(p, found[name]), name


RESUMED = {
    "vqvae": ("vqvae", TOKENIZER),
    # All that a run can have besides: an EMA, a critic, microbatches, activation checkpointing.
    "vqvae with everything": (
        "vqvae",
        [
            *TOKENIZER,
            *"--ema 0.9 --adversarial 0.5 --adversarial-start 12 --critic-width 8".split(),
            *"--grad-accum 2 --activation-checkpointing --bf16".split(),
        ],
    ),
    "var": ("var", "--vqvae RUNS/vqvae --depth 2 --width 32 --heads 2".split()),
    "var without a cache": ("var", "--vqvae RUNS/vqvae --depth 2 --width 32 --heads 2 --no-token-cache".split()),
    "car": ("car", "--base RUNS/var --control sketch --encoder-widths 8,8,16 --ema 0.9 --schedule linear".split()),
}


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(
    runs: Path, images: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three epochs of nine batches; the tokenizer's codes are revived between the stop and the end.
    monkeypatch.setattr("car_train.training.stages.REVIVE_EVERY", 6)
    stage, flags = RESUMED[name]
    flags = [flag.replace("RUNS", str(runs)) for flag in flags]
    flags = ["--steps", "20", "--save-every", "10", "--validate-every", "5", *flags]
    assert train(stage, images, tmp_path / "whole", *flags) == 0
    interrupted(stage, images, tmp_path / "parts", 13, *flags)
    assert train(stage, images, tmp_path / "parts", *flags, "--resume") == 0
    same_weights(tmp_path / "whole", tmp_path / "parts")
    last = [records(tmp_path / run)[-1] for run in ("whole", "parts")]
    assert {k: v for k, v in last[0].items() if k != "seconds"} == {
        k: v for k, v in last[1].items() if k != "seconds"
    }


def test_resuming_with_other_options_is_reported(runs: Path, images: Path, tmp_path: Path) -> None:
    flags = ["--steps", "4", "--save-every", "2", *TOKENIZER]
    interrupted("vqvae", images, tmp_path / "run", 3, *flags)
    with pytest.warns(UserWarning, match=r"lr 0.0006 → 0.0002"):
        assert train("vqvae", images, tmp_path / "run", *flags, "--resume", "--lr", "2e-4") == 0


@pytest.mark.parametrize("flags", [["--ema", "0.9"], ["--adversarial", "1", "--critic-width", "8"]])
def test_a_resumed_run_cannot_gain_an_ema_or_a_critic(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    run = shutil.copytree(runs / "vqvae", tmp_path / "run")
    assert train("vqvae", images, run, "--steps", "70", "--resume", *TOKENIZER, *flags) == 2
    assert "switched on or off" in capsys.readouterr().err


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in records(run)]


def test_parts_of_a_batch_take_the_same_steps(runs: Path, images: Path, tmp_path: Path) -> None:
    flags = ["--vqvae", str(runs / "vqvae"), *"--depth 2 --width 32 --heads 2 --drop-path 0 --steps 6".split()]
    assert train("var", images, tmp_path / "whole", *flags) == 0
    assert train("var", images, tmp_path / "parts", *flags, "--grad-accum", "4") == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_recomputed_activations_change_nothing(runs: Path, images: Path, tmp_path: Path) -> None:
    flags = ["--base", str(runs / "var"), *"--control hed --encoder-widths 8,8,16 --steps 6".split()]
    assert train("car", images, tmp_path / "kept", *flags) == 0
    assert train("car", images, tmp_path / "recomputed", *flags, "--activation-checkpointing") == 0
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "kept"), rel=1e-6)


def test_a_token_cache_changes_no_step(runs: Path, images: Path, tmp_path: Path) -> None:
    flags = ["--base", str(runs / "var"), *"--control canny --encoder-widths 8,8,16 --steps 6".split()]
    assert train("car", images, tmp_path / "cached", *flags) == 0
    assert train("car", images, tmp_path / "encoded", *flags, "--no-token-cache") == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "encoded"), rel=1e-6)


def test_a_run_starts_from_the_weights_of_another(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base", str(runs / "var"), *"--encoder-widths 8,8,16 --steps 1 --lr 1e-12 --control sketch".split()]
    assert train("car", images, tmp_path / "run", *flags, "--init", str(runs / "car")) == 0
    started, source = (checkpoint.load(path) for path in (tmp_path / "run", runs / "car"))
    assert started.config.car is not None
    assert started.config.car.control_type == "sketch"
    assert started.car is not None
    assert source.car is not None
    assert started.car.branch is not None
    assert source.car.branch is not None
    for name, p in source.car.branch.named_parameters():
        torch.testing.assert_close(started.car.branch.get_parameter(name), p, atol=1e-6, rtol=0)
    assert train("car", images, tmp_path / "x", *flags, "--init", str(runs / "var")) == 2
    assert "has no car part" in capsys.readouterr().err
    wide = ["--base", str(runs / "var"), "--encoder-widths", "8,8,32", "--steps", "1", "--init", str(runs / "car")]
    assert train("car", images, tmp_path / "y", *wide) == 2
    assert "other sizes" in capsys.readouterr().err


def test_a_base_starts_from_one_of_other_scales_and_classes(runs: Path, images: Path, tmp_path: Path) -> None:
    """Positions are resized, classes found by name, the rest is taken as it is."""
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "disc").rename(tmp_path / "images" / "ball")
    sides = "1,2,3,8"
    scales = [sides if flag == "1,2,4" else flag for flag in TOKENIZER]
    start = ["--init", str(runs / "vqvae"), *"--decoder-only --steps 1 --lr 1e-12".split()]
    assert train("vqvae", images, tmp_path / "vqvae", *scales, *start) == 0
    flags = ["--vqvae", str(tmp_path / "vqvae"), *"--depth 2 --width 32 --heads 2 --steps 1 --lr 1e-12".split()]
    flags += ["--init", str(runs / "var"), "--no-token-cache"]
    assert train("var", tmp_path / "images", tmp_path / "run", *flags) == 0
    started, source = (checkpoint.load(path) for path in (tmp_path / "run", runs / "var"))
    assert started.car is not None
    assert source.car is not None
    mine, theirs = started.car.base, source.car.base
    for name, p in theirs.named_parameters():
        if name not in ("pos_LC", "level_KC", "class_embedding.weight"):
            torch.testing.assert_close(mine.get_parameter(name), p, atol=1e-6, rtol=0)
    ball, bar, none = mine.class_embedding.weight
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(bar, theirs.class_embedding.weight[0], **close)
    torch.testing.assert_close(ball, theirs.class_embedding.weight[-1], **close)
    torch.testing.assert_close(none, theirs.class_embedding.weight[-1], **close)
    # Sides 1 and 2 as they were; 3 and 8 of side 4, which is nearer to 3 than 2 is.
    torch.testing.assert_close(mine.level_KC, theirs.level_KC[[0, 1, 2, 2]], **close)
    torch.testing.assert_close(mine.pos_LC[:5], theirs.pos_LC[:5], **close)
    grid = theirs.pos_LC[5:].T.reshape(1, -1, 4, 4)
    for side, own in ((3, mine.pos_LC[5:14]), (8, mine.pos_LC[14:])):
        resized = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic")
        torch.testing.assert_close(own, resized[0].flatten(1).T, **close)


def test_some_classes_train_and_the_others_are_left(runs: Path, images: Path, tmp_path: Path) -> None:
    flags = ["--base", str(runs / "var"), *"--encoder-widths 8,8,16 --steps 2 --classes disc".split()]
    assert train("car", images, tmp_path / "run", *flags) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["pictures"]["train"] == sum(1 for p in (images / "disc").iterdir() if split_of(p) == "train")
    assert checkpoint.load(tmp_path / "run").config.class_names == ("bar", "disc")


def test_run_json_says_what_the_run_is(runs: Path) -> None:
    facts = json.loads((runs / "car" / "run.json").read_text())
    assert facts["stage"] == "car"
    assert facts["options"]["steps"] == 60
    assert facts["config"]["car"]["control_type"] == "canny"
    assert 0 < facts["parameters"]["trainable"] < facts["parameters"]["total"]


def test_codebook_usage_is_logged_for_every_scale(runs: Path) -> None:
    first = records(runs / "vqvae")[0]
    used = [first[f"codes_used_{k}"] for k in range(3)]
    assert all(0 < share <= first["codes_used"] for share in used)
    assert used[0] <= 8 / 32  # one token an image, eight images


@pytest.mark.parametrize(
    ("schedule", "half"), [("cosine", 0.505), ("linear", 0.01 + 0.99 * 0.5 / 0.95), ("constant", 1.0)]
)
def test_learning_rates_warm_up_and_fall(schedule: str, half: float, tmp_path: Path) -> None:
    options = TrainOptions(data=tmp_path, output=tmp_path, steps=110, warmup=10, lr=2.0, schedule=schedule)
    rates = [learning_rate(step, options) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[60] == pytest.approx(2 * half)
    assert rates[110] == pytest.approx(2.0 if schedule == "constant" else 0.02)


def test_the_learning_rate_of_the_papers_grows_with_the_batch(images: Path, tmp_path: Path) -> None:
    flags = [*TOKENIZER, "--steps", "3", "--lr-per-256", "0.032", "--schedule", "constant"]
    assert train("vqvae", images, tmp_path / "run", *flags) == 0
    assert records(tmp_path / "run")[-1]["lr"] == pytest.approx(0.001)


def test_matrices_and_the_class_embedding_decay(runs: Path) -> None:
    model = checkpoint.load(runs / "car")
    assert model.car is not None
    base = model.car.base.requires_grad_(True)
    decayed, free = (group["params"] for group in parameter_groups(base, 0.1))
    names = {id(p): name for name, p in base.named_parameters()}
    published = {"blocks.0.mlp.fc1.weight", "class_embedding.weight", "word_embedding.weight"}
    assert published <= {names[id(p)] for p in decayed}
    assert {"pos_LC", "level_KC", "blocks.1.attn.log_scale_H", "head.bias"} <= {names[id(p)] for p in free}


def test_an_ema_is_what_its_formula_says() -> None:
    module = torch.nn.Linear(3, 2)
    ema, expected = EMA(module, 0.5), module.weight.detach().clone()
    for step in range(1, 5):
        with torch.no_grad():
            module.weight.add_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    raw = module.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight.detach(), raw)


def test_an_ema_is_saved_and_validated_but_not_trained(runs: Path, images: Path, tmp_path: Path) -> None:
    """With a decay near 1 the saved weights trail far behind what is trained."""
    flags = [*TOKENIZER, "--steps", "10", "--lr", "2e-3"]
    assert train("vqvae", images, tmp_path / "raw", *flags) == 0
    assert train("vqvae", images, tmp_path / "averaged", *flags, "--ema", "0.9999") == 0
    assert losses(tmp_path / "averaged") == losses(tmp_path / "raw")
    validated = [records(tmp_path / run)[-1]["val_loss"] for run in ("raw", "averaged")]
    assert validated[0] != validated[1]
    state = checkpoint.load_trainer(tmp_path / "averaged")
    model = checkpoint.load(tmp_path / "raw").vqvae
    for name, p in state["raw"].items():
        assert torch.equal(p, model.get_parameter(name)), name


def test_a_critic_starts_late_and_learns_to_distinguish(images: Path, tmp_path: Path) -> None:
    flags = [*TOKENIZER, *"--steps 30 --adversarial 0.1 --adversarial-start 10 --critic-width 16 --lr 2e-3".split()]
    assert train("vqvae", images, tmp_path / "run", *flags) == 0
    log = records(tmp_path / "run")
    assert not any("discriminator" in r for r in log[:10])
    assert all(np.isfinite(r["adversarial"]) and r["adaptive"] > 0 for r in log[10:])
    assert log[-1]["discriminator"] < log[10]["discriminator"]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoints(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("vqvae", images, tmp_path / "run", *TOKENIZER, "--steps", "2") == 0
    flags = [*TOKENIZER, *"--steps 400 --lr 1e9 --warmup 20 --grad-clip 1e30 --resume".split()]
    assert train("vqvae", images, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert "the loss is nan" in error
    assert "lower lr" in error
    assert checkpoint.locate(tmp_path / "run").name == "step-0000002"
    assert checkpoint.load(tmp_path / "run").config.vqvae.sides == (1, 2, 4)


def test_a_full_disk_loses_no_checkpoint(
    runs: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "vqvae", tmp_path / "run")
    before = sorted(p.name for p in run.glob("step-*"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("car_train.checkpoint.torch.save", full)
    assert train("vqvae", images, run, "--steps", "62", "--resume", *TOKENIZER) == 2
    assert "free some space" in capsys.readouterr().err
    assert sorted(p.name for p in run.glob("step-*")) == before
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_torch_compile_computes_the_same(runs: Path, images: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    flags = ["--vqvae", str(runs / "vqvae"), *"--depth 1 --width 16 --heads 1 --steps 2".split()]
    assert train("var", images, tmp_path / "eager", *flags) == 0
    assert train("var", images, tmp_path / "compiled", *flags, "--compile") == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


def test_sample_draws_from_a_checkpoint(runs: Path, tmp_path: Path, images: Path) -> None:
    output = tmp_path / "s.png"
    control = tmp_path / "c.png"
    Image.new("L", (40, 30)).save(control)
    assert main(["sample", str(runs / "car"), "--control", str(control), "--class", "1", "-o", str(output)]) == 0
    assert Image.open(output).size == (16, 16)


def test_bfloat16_trains_too(images: Path, tmp_path: Path) -> None:
    assert train("vqvae", images, tmp_path / "run", "--steps", "3", "--bf16", *TOKENIZER) == 0
    assert all(np.isfinite(r["loss"]) for r in records(tmp_path / "run"))


def test_float16_scales_its_gradients_and_trains(images: Path, tmp_path: Path) -> None:
    flags = [*TOKENIZER, *"--steps 12 --precision fp16 --lr 2e-3".split()]
    assert train("vqvae", images, tmp_path / "run", *flags) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert checkpoint.load_trainer(tmp_path / "run")["scaler"]["scale"] >= 1


def test_tensorboard_gets_every_figure(images: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train("vqvae", images, tmp_path / "run", *TOKENIZER, "--steps", "3", "--tensorboard") == 0
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"loss", "l1", "psnr", "lr", "val/loss", "val/psnr"} <= set(board.Tags()["scalars"])
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(r["step"], pytest.approx(r["loss"])) for r in records(tmp_path / "run")]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["vqvae", "--data", "nowhere", "-o", "x"], "is not a folder"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--patch-nums", "2,1"], "start at 1 and grow"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--batch", "1000"], "make it smaller"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--lr", "0"], "must be positive"),
        (["vqvae", "--data", "IMAGES", "-o", "RUNS/vqvae"], "add --resume"),
        (["vqvae", "--data", "IMAGES", "-o", "RUNS/vqvae", "--resume", "--patch-nums", "1,2"], "another config"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--resume"], "no checkpoint there"),
        (["var", "--data", "IMAGES", "-o", "x", "--vqvae", "nowhere"], "no checkpoint there"),
        (
            ["var", "--data", "IMAGES", "-o", "x", "--vqvae", "RUNS/vqvae", "--width", "33", "--heads", "2"],
            "not a multiple of heads",
        ),
        (["car", "--data", "IMAGES", "-o", "x", "--base", "RUNS/vqvae"], "tokenizer only"),
        (
            ["car", "--data", "IMAGES", "-o", "x", "--base", "RUNS/var", "--control-root", "nowhere"],
            "is not a folder",
        ),
        (["car", "--data", "three", "-o", "x", "--base", "RUNS/var"], "has 3 classes, the model 2"),
        (["sample", "RUNS/car"], "needs control"),
        (["sample", "RUNS/car", "--class", "9"], "out of range"),
        (["sample", "RUNS/car", "--class", "1", "--control", "RUNS/car/log.jsonl"], "not a readable image"),
        (["sample", "RUNS/var", "--top-k", "33"], "top-k in 0…32"),
        (["sample", "RUNS/var", "-o", "image.xyz"], "a .png in a folder that exists"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--device", "abacus"], "can't be used"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--workers", "-1"], "at least 0"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--grad-accum", "3"], "a multiple of 3"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--ema", "1"], "e.g. 0.999"),
        (["vqvae", "--data", "IMAGES", "-o", "x", "--classes", "disc,cat"], "'cat' of 'disc,cat' isn't there"),
        (
            ["vqvae", "--data", "IMAGES", "-o", "x", "--perceptual", "1", "--perceptual-weights", "no"],
            "car_train weights",
        ),
        (
            ["car", "--data", "IMAGES", "-o", "x", "--base", "RUNS/var", "--token-root", "RUNS/car/log.jsonl"],
            "--token-root",
        ),
        (["vqvae", "--data", "IMAGES", "-o", "RUNS/car/log.jsonl"], "log.jsonl"),
        (["var", "--data", "IMAGES", "-o", "x", "--vqvae", "RUNS/vqvae", "--heads", "0"], "at least 1"),
    ],
)
def test_bad_requests_are_one_line_with_a_remedy(
    argv: list[str],
    words: str,
    runs: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "three")
    shutil.copytree(images / "bar", "three/third")
    argv = [a.replace("IMAGES", str(images)).replace("RUNS", str(runs)) for a in argv]
    assert main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("car_train: error:")]
    assert len(error) == 1
    assert words in error[0]


def test_a_damaged_trainer_state_is_an_error_not_a_traceback(
    runs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "vqvae", tmp_path / "run")
    newest = sorted(run.glob("step-*"))[-1]
    (newest / "trainer.pt").write_bytes(b"nothing")
    assert train("vqvae", images, run, "--steps", "70", "--resume", *TOKENIZER) == 2
    assert "trainer.pt" in capsys.readouterr().err
