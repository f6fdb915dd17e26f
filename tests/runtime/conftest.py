from __future__ import annotations

from collections.abc import Iterator

import pytest

from fixtures.amx_machine import emulated_machine, without_amx, without_emulation


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    """The kernels for AMX can be run: as they are, or where there is no AMX with its tiles emulated."""
    if without_amx() is None or without_emulation() is not None:
        yield
        return
    with emulated_machine():
        yield
