"""How control maps are made: one table in training and runtime, stated by checkpoints and plans, old ones too."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from car_runtime import conventions as runtime
from car_runtime.errors import PlanError
from car_runtime.format.manifest import parse_manifest, read_manifest
from car_runtime.plan import default_plan
from car_train import conventions as train
from car_train.config import CARConfig, ConfigError, ModelConfig
from fixtures.small import small_model


def test_training_and_runtime_have_the_same_table() -> None:
    assert {name: asdict(preset) for name, preset in train.PRESETS.items()} == {
        name: asdict(preset) for name, preset in runtime.PRESETS.items()
    }
    for name in ("CONTROL_TYPES", "ANNOTATORS", "COLOURS", "POLARITIES", "AXES", "FITS", "DERIVED", "FIRST"):
        assert getattr(train, name) == getattr(runtime, name)


@pytest.mark.parametrize("control_type", train.CONTROL_TYPES)
def test_each_type_has_a_published_preset_one_to_derive_and_one_of_0_1_0(control_type: str) -> None:
    for name in (control_type, train.DERIVED[control_type], train.FIRST[control_type]):
        assert train.PRESETS[name].control_type == control_type
        assert train.PRESETS[name].annotator in train.ANNOTATORS


def test_the_published_polarities_and_axes() -> None:
    presets = train.PRESETS
    assert presets["canny"].colour == "rgb"
    assert presets["canny"].thresholds == (100, 200)
    assert presets["sketch"].polarity == "light-on-dark"
    assert presets["depth"].polarity == "near-is-light"
    assert presets["normal"].axes == ("left", "up", "viewer")


def test_a_checkpoint_states_its_convention_and_an_older_one_is_of_0_1_0() -> None:
    config = small_model().config
    assert config.car is not None
    stated = json.loads(replace(config, car=replace(config.car, convention="sketch-dodge")).to_json())
    assert stated["car"]["convention"] == "sketch-dodge"
    assert ModelConfig.from_json(json.dumps(stated)).car == replace(config.car, convention="sketch-dodge")
    del stated["car"]["convention"]
    older = ModelConfig.from_json(json.dumps(stated)).car
    assert older is not None
    assert older.control_convention.name == "sketch-dark"


def test_a_convention_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="convention is 'sketch-dark'; for canny choose one of canny, canny-grey"):
        CARConfig(control_type="canny", convention="sketch-dark")


def _manifest(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((default_plan() / "manifest.json").read_text())
    whole["model"]["control_convention"] |= changes
    return whole


def _of_type(whole: dict[str, Any], kind: str) -> dict[str, Any]:
    """The manifest with another control type, which is its default branch's."""
    whole["model"]["control_type"] = whole["model"]["branches"]["canny"]["control_type"] = kind
    return whole


def test_the_shipped_plan_states_its_conventions() -> None:
    found = read_manifest(default_plan()).model.conventions
    names = {"canny": "canny", "hed": "hed", "sketch": "sketch-dodge", "depth": "depth-dome", "normal": "normal-dome"}
    assert found == {branch: runtime.PRESETS[name] for branch, name in names.items()}


def test_a_plan_that_states_none_is_of_0_1_0() -> None:
    whole = _manifest()
    del whole["model"]["control_convention"]
    assert parse_manifest(json.dumps(whole)).model.convention == runtime.PRESETS["canny-grey"]
    assert "control_convention" not in json.loads(parse_manifest(json.dumps(whole)).to_json())["model"]
    assert parse_manifest(json.dumps(_of_type(whole, "pose"))).model.convention is None


def test_a_convention_of_another_type_than_the_plans_is_ignored() -> None:
    whole = _of_type(_manifest(), "sketch")
    assert parse_manifest(json.dumps(whole)).model.convention == runtime.PRESETS["sketch-dark"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": "red"}, "colour 'red' is not one of rgb, grey"),
        ({"polarity": ""}, "polarity '' is not one of"),
        ({"fit": "tile"}, "fit 'tile' is not one of crop, pad, stretch"),
        ({"name": "x" * 65}, "must be a word of at most 64 letters"),
        ({"annotator": "a\nb"}, "must be a word"),
        ({"axes": ["left", "up"]}, "must be three, or none"),
        ({"axes": ["in", "up", "left"]}, "must be of left"),
        ({"ground": [0, 0]}, "must be 3 numbers in 0…255"),
        ({"ground": [0, 0, 256]}, "must be 3 numbers in 0…255"),
        ({"ground": [0.5, 0, 0]}, "must be an integer"),
        ({"value_range": [255, 0]}, "must be in ascending order"),
        ({"thresholds": [1, 9999]}, "must be 0 or 2 numbers in 0…2040"),
        ({"thresholds": "100"}, "must be a list"),
        ({"colour": None}, "must be a string"),
    ],
)
def test_a_manifest_with_a_bad_convention_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_manifest(json.dumps(_manifest(**changes)))
    assert says in str(caught.value)
    assert "; " in str(caught.value)
