"""The names of ImageNet's 1,000 classes (ILSVRC 2012), which the published CAR and VAR models were trained on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CLASSES = 1000
_FILE = Path(__file__).with_name("imagenet_classes.txt")


@cache
def imagenet_names() -> tuple[str, ...]:
    """The names by class index, in the order of ILSVRC's synset identifiers: 0 tench … 999 toilet tissue."""
    return tuple(_FILE.read_text(encoding="utf-8").splitlines())
