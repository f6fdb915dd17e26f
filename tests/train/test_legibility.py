"""Legibility: the reader reads what was drawn without an error, and loses letters as an image loses detail."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from car_train.evaluation.legibility import INKS, LETTERS, SIZES, WORDS, legibility, page, read


def test_every_letter_is_drawn_and_read_back_at_every_size_and_ink() -> None:
    assert set(Counter("".join(WORDS))) == set(LETTERS)
    for size in SIZES:
        for ink in INKS:
            image, lines = page(128, size, ink, np.random.default_rng(size))
            assert len(lines) == 128 // size
            assert read(image, size, [len(line) for line in lines]) == lines


def test_untouched_text_is_read_whole_and_grey_is_read_by_chance() -> None:
    whole = legibility(lambda x: x, 64)
    assert whole["8"] == {"drawn_letters": 1, "drawn_words": 1, "read_letters": 1, "read_words": 1}
    grey = legibility(lambda x: np.full_like(x, 128), 64)
    assert all(row["read_letters"] < 0.2 and row["drawn_letters"] == 1 for row in grey.values())


def test_small_letters_are_lost_before_large_ones() -> None:
    def half(images_BHW3: np.ndarray) -> np.ndarray:
        small = [Image.fromarray(p).resize((16, 16)).resize((64, 64)) for p in images_BHW3]
        return np.stack([np.asarray(p) for p in small])

    found = legibility(half, 64)
    assert found["8"]["read_letters"] < 0.6 < 0.9 < found["24"]["read_letters"]


def test_sizes_that_do_not_fit_are_left_out_and_short_lines_have_letters() -> None:
    assert list(legibility(lambda x: x, 16)) == ["8", "12", "16"]
    _, lines = page(16, 12, (0, 255), np.random.default_rng(0))
    assert [len(line) for line in lines] == [1]
    with pytest.raises(ValueError, match=r"broadcast|shapes|mismatch"):
        legibility(lambda x: x[:, :4], 16)
