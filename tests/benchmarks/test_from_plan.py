"""A plan's checkpoint, made again: the weights that were exported, and the tokens that the plan draws."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.from_plan import main, plan_model
from car_runtime import open_plan
from car_runtime.plan import default_plan
from car_train import checkpoint
from car_train.model.sample import sample
from fixtures.small import small_model
from fixtures.small_plans import small_plan
from fixtures.two_branches import two_branches


def test_the_checkpoint_is_the_one_that_was_exported(tmp_path: Path) -> None:
    assert main([str(small_plan("steered")), "-o", str(tmp_path / "made")]) == 0
    made, exported = checkpoint.load(tmp_path / "made"), small_model(depth=2, sides=(1, 2, 4))
    assert exported.config.car is not None
    named = dataclasses.replace(exported.config.car, convention="sketch")  # what a plan says where a config is silent
    assert made.config == dataclasses.replace(exported.config, car=named)
    theirs = exported.state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_shipped_plans_checkpoint_draws_its_tokens() -> None:
    model = plan_model(default_plan())
    assert model.car is not None
    with open_plan(backend="ort-cpu", threads=1) as plan:
        found = plan.generate(label=3, seed=5, cfg=1.5, top_k=100, top_p=0.5)
    uniforms = torch.from_numpy(np.random.default_rng(5).random((1, plan.manifest.tokens), dtype=np.float32))
    tokens, _ = sample(model.vqvae, model.car, torch.tensor([3]), uniforms, None, 1.5, 100, 0.5)
    np.testing.assert_array_equal(found.tokens, tokens.numpy())


def test_what_is_no_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "made")]) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_any_branch_of_a_plan_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = two_branches()
    assert main([str(plan), "--branch", "other", "-o", str(tmp_path / "made")]) == 0
    made, exported = (checkpoint.load(path).state_dict() for path in (tmp_path / "made", plan.parent / "other"))
    assert all(torch.equal(tensor, exported[name]) for name, tensor in made.items())
    default = checkpoint.load(plan.parent / "one").state_dict()
    assert not all(torch.equal(tensor, default[name]) for name, tensor in made.items())
    assert main([str(plan), "--branch", "third", "-o", str(tmp_path / "third")]) == 2
    assert "no branch 'third'; choose of: sketch, other" in capsys.readouterr().err
