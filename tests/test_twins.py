"""What training and the runtime both need, and can't share since neither imports the other, says the same in both."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import car_runtime.cli.errors
import car_runtime.errors
import car_runtime.image_metadata
import car_runtime.images
import car_runtime.system.files
import car_train.data.image_metadata
import car_train.data.images
import car_train.errors
import car_train.files
import car_train.streams


def code_of(module: ModuleType, name: str) -> str:
    """A function or class without docstrings and comments."""
    tree = ast.parse(inspect.getsource(getattr(module, name)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        (car_train.streams, car_runtime.cli.errors, "Terminated"),
        (car_train.streams, car_runtime.cli.errors, "terminated_politely"),
        (car_train.streams, car_runtime.cli.errors, "open_closed_streams"),
        (car_train.errors, car_runtime.errors, "printable"),
        (car_train.errors, car_runtime.errors, "printable_lines"),
        (car_train.files, car_runtime.system.files, "_aside"),
        (car_train.files, car_runtime.system.files, "folder_aside"),
        (car_train.files, car_runtime.system.files, "new_folder"),
        (car_train.files, car_runtime.system.files, "put_in_place"),
        (car_train.files, car_runtime.system.files, "_remove"),
        (car_train.files, car_runtime.system.files, "exchange"),
        (car_train.files, car_runtime.system.files, "sweep"),
        (car_train.files, car_runtime.system.files, "_runs"),
        (car_train.files, car_runtime.system.files, "_sweep_once"),
        (car_train.files, car_runtime.system.files, "one_writer"),
        (car_train.files, car_runtime.system.files, "_locked"),
        (car_train.data.images, car_runtime.images, "_strips"),
    ],
)
def test_twins_are_the_same_code(one: ModuleType, other: ModuleType, name: str) -> None:
    assert code_of(one, name) == code_of(other, name)


def test_limits_of_images_are_the_same() -> None:
    for name in ("MAX_PIXELS", "MAX_PIXELS_DENSE", "DENSE_FORMATS", "MAX_BYTES", "STRIP_PIXELS", "FORMATS"):
        assert getattr(car_train.data.images, name) == getattr(car_runtime.images, name)


def test_what_steers_a_terminal_is_the_same() -> None:
    assert car_train.errors._STEERING.pattern == car_runtime.errors._STEERING.pattern


def test_what_one_leaves_the_other_knows() -> None:
    assert car_train.files._LEFT.pattern == car_runtime.system.files._LEFT.pattern
    assert car_train.files._LEFT.fullmatch(car_runtime.system.files.aside_of(Path("x.png")).name)


def test_metadata_of_images_are_looked_at_by_the_same_code() -> None:
    both = car_train.data.image_metadata, car_runtime.image_metadata
    one, other = ([ast.unparse(part) for part in ast.parse(inspect.getsource(module)).body[1:]] for module in both)
    assert one == other
