"""JSON into dataclasses: types are checked, and an error says where in which file, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from car_runtime import PlanError
from car_runtime.format.typed_json import REST, parse_json


@dataclass(frozen=True)
class Item:
    side: int
    share: float
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Whole:
    items: tuple[Item, ...]
    by_name: dict[str, Item]
    names: tuple[str, ...] | None
    size: int | None = None
    rest: dict[str, Any] = field(default_factory=dict, metadata=REST)


ITEM = '{"side": 1, "share": 2, "shape": [3, "R"], "unknown": 1}'


def read(text: str) -> Whole:
    return parse_json(text, "x.json", "make it again").read(Whole)


def test_values_are_read_by_the_fields_types() -> None:
    item = Item(1, 2.0, (3, "R"))
    found = read(f'{{"items": [{ITEM}], "by_name": {{"a": {ITEM}}}, "names": null, "more": [1]}}')
    assert found == Whole((item,), {"a": item}, None, None, {"more": [1]})
    assert isinstance(found.items[0].share, float)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "the whole is [], but must be an object"),
        ("{}", "items is missing"),
        ('{"items": {}}', "items is {}, but must be a list"),
        ('{"items": [1]}', "items[0] is 1, but must be an object"),
        ('{"items": [{"side": true}]}', "items[0].side is True, but must be an integer"),
        ('{"items": [{"side": 1, "share": 1e999}]}', "items[0].share is inf, but must be a finite number"),
        ('{"items": [{"side": 1, "share": 1}]}', "items[0].shape is missing"),
        ('{"items": [], "by_name": {"a": {"side": "1"}}}', "by_name['a'].side is '1', but must be an integer"),
        ('{"items": [], "by_name": {}, "names": [1]}', "names[0] is 1, but must be a string"),
        ('{"items": [], "by_name": {}, "names": null, "size": "1"}', "size is '1', but must be an integer"),
    ],
)
def test_another_type_is_refused_with_file_path_and_remedy(text: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        read(text)
    assert str(caught.value) == f"x.json: {says}; make it again"


@pytest.mark.parametrize("text", ["", "{", b"\xff", '{"a": NaN}', "[" * 100_000])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text, "x.json", "make it again")
