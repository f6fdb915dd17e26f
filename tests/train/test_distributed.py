"""Two processes under torchrun (gloo) take the steps of one process at the same global batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from car_train import checkpoint
from car_train.cli import main
from car_train.training.distributed import World

ROOT = Path(__file__).parents[2]
COMMON = "--batch 8 --warmup 2 --workers 0 --threads 1 --seed 3 --validate-every 3 --save-every 3".split()
# 24 channels: norms have groups of three. Before a norm of single channels a bias counts for nothing, its gradient is
# rounding alone, and Adam makes steps of ±lr of that.
TOKENIZER = "--patch-nums 1,2,4 --vocab 32 --latent-channels 8 --channels 24 --multipliers 1,2,2".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(40):
            coarse = Image.fromarray(rng.integers(0, 255, (3, 3, 3), np.uint8))
            coarse.resize((24, 24), Image.Resampling.BICUBIC).save(root / name / f"{name}{i}.png")
    return root


def run(processes: int, *arguments: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "car_train"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m", "car_train"]), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(one: Path, two: Path) -> None:
    a, b = log(one), log(two)
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for left, right in zip(a, b, strict=True):
        for name in ("loss", "val_loss", "val_psnr", "val_accuracy"):
            assert (name in left) == (name in right)
            if name in left:
                assert right[name] == pytest.approx(left[name], rel=2e-4), (left["step"], name)
    found = dict(checkpoint.load(two).named_parameters())
    for name, p in checkpoint.load(one).named_parameters():
        # Adam's first steps are near ±lr, whatever the gradient's size: rounding may turn the sign of a tiny one.
        torch.testing.assert_close(found[name], p, rtol=0, atol=2e-4, msg=name)


def test_two_processes_take_the_steps_of_one(images: Path, tmp_path: Path) -> None:
    data = ["--data", str(images), *COMMON]
    flags = ["vqvae", *data, *TOKENIZER, *"--steps 6 --lr 1e-4 --ema 0.9".split()]
    for processes in (1, 2):
        run(processes, *flags, "-o", str(tmp_path / f"vqvae{processes}"))
    same(tmp_path / "vqvae1", tmp_path / "vqvae2")

    base = ["--vqvae", str(tmp_path / "vqvae1"), *"--depth 2 --width 32 --heads 2 --drop-path 0".split()]
    caches = ["--token-root", str(tmp_path / "tokens"), "--views", "2"]
    flags = ["var", *data, *base, *caches, *"--steps 6 --lr 1e-4".split()]
    for processes in (1, 2):
        run(processes, *flags, "-o", str(tmp_path / f"var{processes}"))
    same(tmp_path / "var1", tmp_path / "var2")
    assert len(list((tmp_path / "tokens").iterdir())) == 2  # one of each split: all processes share them

    # A run of two goes on from its checkpoint as if it had never stopped.
    state = checkpoint.load_trainer(tmp_path / "var2" / "step-0000003")
    assert len(state["rng"]) == 2


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return list(map(int, found.read_text().split())) if found.exists() else []


@pytest.mark.slow  # a minute on two quiet cores: three groups of processes start one after another
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a rank by /proc")
def test_two_nodes_go_on_from_the_last_checkpoint_when_a_rank_is_killed(images: Path, tmp_path: Path) -> None:
    """Two launchers, as on two machines; the rank of the second is killed, and the end is that of one process."""
    flags = ["vqvae", "--data", str(images), *COMMON, *TOKENIZER, *"--steps 24 --lr 1e-4 --save-every 6".split()]
    run(1, *flags, "-o", str(tmp_path / "alone"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    launcher += ["--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "car_train", *flags, "-o", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = [(tmp_path / f"node{i}.log").open("w") for i in range(2)]
    nodes = [subprocess.Popen(launcher, env=environment, stdout=file, stderr=file) for file in errors]
    try:
        while not (tmp_path / "two" / "step-0000006").exists():
            assert [node.poll() for node in nodes] == [None, None], (tmp_path / "node0.log").read_text()[-2000:]
            time.sleep(0.01)
        (rank,) = children(nodes[1].pid)[:1]
        os.kill(rank, signal.SIGKILL)
        codes = [node.wait(timeout=500) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # a launcher that is killed leaves its rank behind
            node.wait()
        for file in errors:
            file.close()
    assert codes == [0, 0], (tmp_path / "node1.log").read_text()[-2000:]
    assert "exitcode: -9" in (tmp_path / "node1.log").read_text()
    same(tmp_path / "alone", tmp_path / "two")


def test_a_critic_trains_on_two_processes(images: Path, tmp_path: Path) -> None:
    flags = ["vqvae", "--data", str(images), *COMMON, *TOKENIZER, "--steps", "4", "--grad-accum", "2"]
    run(2, *flags, *"--adversarial 0.5 --critic-width 8".split(), "-o", str(tmp_path / "run"))
    assert all(np.isfinite(r["discriminator"]) for r in log(tmp_path / "run"))


def test_a_batch_that_cannot_be_shared_out_is_an_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(World, "join", lambda device: (World(rank=0, size=2), device))
    flags = ["vqvae", "--data", str(images), *COMMON, *TOKENIZER, "--steps", "4", "--batch", "7"]
    assert main([*flags, "-o", str(tmp_path / "run")]) == 2
    assert "a multiple of 2" in capsys.readouterr().err
