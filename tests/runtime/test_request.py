"""Requests: what is filled in, what is refused, and which tokens an edit keeps."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from car_runtime.cli.options import settings_of
from car_runtime.cli.run import parse_args
from car_runtime.config import GenerationConfig, config_of, flags
from car_runtime.editing.masks import MASK_RULES, known_mask_of
from car_runtime.errors import RequestError
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.request import Request, resolve, resolve_label, uniforms
from fixtures.runtime_plan import CLASSES, SIDES, L, V, build_plan

CONTROL = np.zeros((9, 9), np.uint8)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(build_plan(tmp_path_factory.mktemp("sampling") / "tiny.plan"))


def ask(manifest: Manifest, **settings: Any) -> Request:
    return resolve(manifest, GenerationConfig(control=CONTROL, **settings))


def test_defaults_come_from_the_plan_and_fit_its_vocabulary(manifest: Manifest) -> None:
    sampling = ask(manifest).sampling
    assert (sampling.cfg, sampling.top_k, sampling.top_p) == (1.5, V, 0.95)


def test_a_preset_is_where_what_is_not_given_comes_from(manifest: Manifest) -> None:
    def drawn(**settings: Any) -> tuple[float, int, float]:
        sampling = ask(manifest, **settings).sampling
        return sampling.cfg, sampling.top_k, sampling.top_p

    assert drawn(preset="car") == (4.0, V, 0.95)
    assert drawn(preset="var-fid") == (1.5, V, 0.96)
    assert drawn(preset="plan") == drawn() == (1.5, V, 0.95)
    assert drawn(preset="car", cfg=1, top_k=3, top_p=0) == (1.0, 3, 0.0)
    with pytest.raises(RequestError, match="there is no preset 'cra'; choose plan, car, var-fid"):
        drawn(preset="cra")


@pytest.mark.parametrize(
    ("settings", "top_k", "top_p_input"),
    [
        ({"top_k": 0, "top_p": 0}, V, 2.0),
        ({"top_k": V, "top_p": 1}, V, 2.0),
        ({"top_k": 1, "top_p": 0.5}, 1, 0.5),
        ({"top_k": np.int64(3), "top_p": np.float32(0.25)}, 3, 0.25),
    ],
)
def test_off_is_spelled_as_the_step_graph_takes_it(
    manifest: Manifest, settings: dict[str, Any], top_k: int, top_p_input: float
) -> None:
    sampling = ask(manifest, **settings).sampling
    assert (sampling.top_k, sampling.top_p_input) == (top_k, top_p_input)


def test_without_guidance_there_are_no_unconditional_rows(manifest: Manifest) -> None:
    assert not ask(manifest, cfg=0).sampling.guided
    assert ask(manifest, cfg=0.1).sampling.guided


def test_without_a_class_there_is_nothing_to_guide(manifest: Manifest) -> None:
    assert not ask(manifest, cfg=4).guided
    assert ask(manifest, cfg=4, label=0).guided
    assert not ask(manifest, cfg=0, label=0).guided
    assert ask(manifest, cfg=4).sampling.cfg == 4  # as asked for: with a class added it is a guided request


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cfg": -0.1}, "cfg is -0.1, but must be a number in 0…1000"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"cfg": float("inf")}, "cfg is inf"),
        ({"cfg": "4"}, "cfg is '4'"),
        ({"cfg": True}, "cfg is True"),
        ({"top_k": V + 1}, f"top_k is {V + 1}, but must be a whole number in 0…{V}"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"n": 0}, "n is 0"),
        ({"n": 10**9}, "n is 1000000000, but must be a whole number in 1…1024"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, f"seed is {2**63}"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"label": 3}, "class is 3, but must be a whole number in 0…2"),
        ({"label": -1}, "class is -1"),
        ({"label": "-1"}, "class is -1"),
        ({"label": "99"}, "class is 99"),
        ({"label": "--5"}, "there is no class '--5'"),
        ({"label": "golden retreiver"}, "there is no class 'golden retreiver'; did you mean 'Golden Retriever'?"),
        ({"label": "xyzzy"}, "there is no class 'xyzzy'; give an index, 0…2"),
        ({"label": ""}, "there is no class ''"),
        ({"label": 1.0}, "class is 1.0"),
        ({"known_tokens": np.zeros(L, int)}, "known_mask is missing; give both"),
        ({"known_mask": np.zeros(L, bool)}, "known_tokens is missing; give both"),
        ({"known_tokens": np.zeros(3, int), "known_mask": np.zeros(L, bool)}, f"give integers of shape [{L}]"),
        ({"known_tokens": np.zeros(L), "known_mask": np.zeros(L, bool)}, "known_tokens is float64"),
        ({"known_tokens": np.zeros(L, int), "known_mask": np.zeros(L, int)}, "give booleans"),
        ({"known_tokens": np.full(L, V), "known_mask": np.ones(L, bool)}, f"known_tokens holds {V}"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(
    manifest: Manifest, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        ask(manifest, **settings)
    assert says in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("label", "index"),
    [(None, CLASSES), (0, 0), ("2", 2), (" 1 ", 1), ("cat", 0), ("LION", 2), ("goldie", 1), ("golden retriever", 1)],
)
def test_a_class_is_found_by_index_name_and_synonym(manifest: Manifest, label: Any, index: int) -> None:
    assert resolve_label(manifest, label) == index


def test_a_name_that_two_classes_share_asks_for_an_index(manifest: Manifest) -> None:
    model = replace(manifest.model, class_names=("crane, bird", "dog", "crane, machine"))
    with pytest.raises(RequestError, match="any of 0, 2; give one of these"):
        resolve_label(replace(manifest, model=model), "crane")


def test_of_names_that_differ_in_case_the_one_written_so_is_meant(manifest: Manifest) -> None:
    names = ("Polish, Wax", "polish, wax", "x, WAX")
    model = replace(manifest, model=replace(manifest.model, class_names=names))
    found = [resolve_label(model, name) for name in ("Polish, Wax", " polish, wax ", "Wax", "wax", "WAX", "Polish")]
    assert found == [0, 1, 0, 1, 2, 0]
    with pytest.raises(RequestError, match="any of 0, 1; give one of these"):
        resolve_label(model, "POLISH")


def test_a_plan_without_names_takes_indices_alone(manifest: Manifest) -> None:
    nameless = replace(manifest, model=replace(manifest.model, class_names=None))
    assert resolve_label(nameless, "2") == 2
    with pytest.raises(RequestError, match="no class names; give an index"):
        resolve_label(nameless, "cat")


def test_a_plan_of_1000_classes_without_names_has_those_of_imagenet(manifest: Manifest) -> None:
    imagenet = replace(manifest, model=replace(manifest.model, classes=1000, class_names=None))
    names = imagenet.model.names
    assert names is not None
    assert len(names) == len(set(names)) == 1000
    assert all(name == name.strip() and name for name in names)
    for index, name in {
        0: "tench",
        1: "goldfish",
        207: "golden retriever",
        281: "tabby",
        999: "toilet tissue",
    }.items():
        assert names[index] == name
        assert resolve_label(imagenet, name) == index
    # What a result says of its class means that class again, though some names begin alike.
    assert [resolve_label(imagenet, name) for name in names] == list(range(1000))
    with pytest.raises(RequestError, match="did you mean 'golden retriever'"):
        resolve_label(imagenet, "golden retreiver")
    own = tuple(f"class {i}" for i in range(1000))
    assert replace(imagenet.model, class_names=own).names == own
    assert json.loads(imagenet.to_json())["model"]["class_names"] is None


def test_known_tokens_are_read_only_where_the_mask_is_true(manifest: Manifest) -> None:
    tokens, mask = np.full(L, 10**6), np.zeros(L, bool)
    tokens[3], mask[3] = 7, True
    request = ask(manifest, n=2, known_tokens=tokens, known_mask=mask)
    assert request.known.shape == request.known_mask.shape == (2, L)
    assert request.known[:, 3].tolist() == [7, 7]
    assert request.known.sum() == 14


def test_uniforms_of_an_image_depend_on_its_seed_alone() -> None:
    together = uniforms([5, 6, 7], L)
    assert together.dtype == np.float32
    assert together.shape == (3, L)
    assert (together[1] == np.random.default_rng(6).random(L, dtype=np.float32)).all()
    assert (uniforms([6], L)[0] == together[1]).all()


# A call's arguments.


def test_a_call_gives_a_config_or_its_settings() -> None:
    by_name = GenerationConfig(control="edges.png", label="cat", seed=3, n=2, cfg=1.0)
    for config in (
        config_of("edges.png", "cat", 3, 2, cfg=1.0),
        config_of("edges.png", n=2, seed=3, label="cat", cfg=1.0),
        config_of(by_name),
        config_of(GenerationConfig(control="edges.png", label="cat", seed=9, n=2), seed=3, cfg=1.0),
    ):
        assert asdict(config) == asdict(by_name)
    assert asdict(config_of()) == asdict(GenerationConfig())


@pytest.mark.parametrize(
    ("given", "settings", "says"),
    [
        ((), {"cfgs": 1}, "there is no setting 'cfgs'; did you mean 'cfg'?"),
        ((), {"steps": 1}, "there is no setting 'steps'; the settings are control, label, seed, n, cfg"),
        (("x.png", 1), {"label": 2}, "label is given twice, 1 and 2; give it once"),
        (("x.png", 1, 2, 3, 4.0), {}, "4.0 has no name; only control, label, seed, n go without, name the others"),
        ((GenerationConfig(), 5), {}, "5 follows a config; give by name"),
    ],
)
def test_what_is_no_setting_is_said_with_the_remedy(
    given: tuple[Any, ...], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        config_of(*given, **settings)
    assert says in str(caught.value)


def test_every_setting_but_arrays_and_edits_has_a_flag_with_its_default() -> None:
    names = {f.name for f in fields(GenerationConfig)}
    assert names - flags().keys() == {"known_tokens", "known_mask", "blend", "edit"}
    assert settings_of(parse_args([])) == {name: getattr(GenerationConfig(), name) for name in flags()}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_strictly_kept_tokens_follow_the_repainted_area(manifest: Manifest, H: int, W: int, seed: int) -> None:
    repaint = np.random.default_rng(seed).random((H, W)) < 0.5
    kept = known_mask_of(repaint, manifest.scales, "strict")
    # The slow way: every pixel split in side × side parts, which divide among the cells evenly.
    for scale in manifest.scales:
        S = scale.side
        fine = repaint.repeat(S, 0).repeat(S, 1).reshape(S, H, S, W).mean((1, 3))
        clear = abs(fine - 0.5) > 1e-9
        assert (kept[scale.start : scale.stop].reshape(S, S) == (fine < 0.5))[clear].all()


def test_repainting_nothing_keeps_all_and_repainting_all_keeps_nothing(manifest: Manifest) -> None:
    for rule in MASK_RULES:
        assert known_mask_of(np.zeros((9, 7), bool), manifest.scales, rule).all()
    assert not known_mask_of(np.ones((9, 7), bool), manifest.scales, "strict").any()
    assert known_mask_of(np.ones((9, 7), bool), manifest.scales).nonzero()[0].tolist() == [0]  # the 1×1


@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=6).map(sorted),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 0.5, 0.9]),
    st.booleans(),
)
def test_kept_tokens_are_those_of_the_published_code(
    manifest: Manifest, sides: list[int], seed: int, share: float, box: bool
) -> None:
    N, rng = sides[-1], np.random.default_rng(seed)
    keep = rng.random((N, N)) < share
    if box:
        top, left, bottom, right = (int(edge) for edge in rng.integers(0, N + 1, 4))
        keep[:] = False
        keep[top:bottom, left:right] = True
    scales = [replace(manifest.scales[0], side=side) for side in sides]
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        sides = [side for side in sides if N % side == 0]  # without fused multiply-add ties fall otherwise
    kept = known_mask_of(~keep.repeat(3, 0).repeat(3, 1), scales)
    mask = torch.from_numpy(keep.astype(np.float32))[None, None]
    expected = [
        np.ones(1, bool)
        if side == 1
        else (F.interpolate(mask, size=(side, side), mode="bilinear", align_corners=False) > 0.5).numpy().reshape(-1)
        for side in sides
    ]
    assert kept.tolist() == np.concatenate(expected).tolist()


def test_another_mask_rule_is_refused(manifest: Manifest) -> None:
    with pytest.raises(RequestError, match="no mask rule 'loose'; choose published or strict"):
        known_mask_of(np.zeros((9, 7), bool), manifest.scales, "loose")  # type: ignore[arg-type]


def test_a_small_spot_leaves_the_coarse_tokens_alone(manifest: Manifest) -> None:
    repaint = np.zeros((32, 32), bool)
    repaint[:8, :8] = True
    kept = [known_mask_of(repaint, manifest.scales)[scale.start : scale.stop] for scale in manifest.scales]
    assert [int((~part).sum()) for part in kept] == [0, 0, 1]
    assert len(SIDES) == 3


@pytest.mark.parametrize("mask", [np.zeros(3, bool), np.zeros((2, 2)), np.zeros((0, 2), bool), "x"])
def test_a_repaint_mask_of_another_kind_is_refused(manifest: Manifest, mask: Any) -> None:
    with pytest.raises(RequestError, match="give booleans of shape"):
        known_mask_of(mask, manifest.scales)
