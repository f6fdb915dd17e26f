"""A short campaign of tests/fuzz/fuzz.py, by random changes; `make fuzz` is the long one, guided by coverage."""

from __future__ import annotations

import random
import time

import pytest

from fuzz.fuzz import TARGETS, changed

SECONDS = 1
"""Of a core."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_takes_or_refuses_whatever_it_is_given(name: str) -> None:
    rng, target = random.Random(5), TARGETS[name]
    corpus, tried = target.corpus(), 0
    for data in corpus:
        target.read(data)
    end = time.process_time() + SECONDS
    while time.process_time() < end and tried < 2000:
        began = time.monotonic()
        target.read(changed(rng.choice(corpus), rng))
        assert time.monotonic() - began < 10
        tried += 1
    assert tried > 5
