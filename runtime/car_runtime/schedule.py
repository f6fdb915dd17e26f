"""Schedules of the scale loop: which scales are guided, which follow the control, and where the loop stops.

Scales go by their indices, 0 … K−1, coarse first. Nothing here is on unless it is asked for: the schedule of a
request that names none is exact, with guidance and control at every scale and all scales drawn
(docs/design/schedules.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

from car_runtime.errors import RequestError

Scales: TypeAlias = "str | int | range"
"""Scales as a caller names them: "2-5" (both ends included), "2-", "-5", "3", 3, or a range such as range(2, 6)."""
MAX_STRENGTH = 2.0
"""Twice what the branch was trained on; it has seen nothing but 1."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule for K scales, checked. Equal schedules make equal images."""

    scales: int
    """K, all that the plan has."""
    cfg_scales: range
    """Where guidance is on; elsewhere the loop runs with cfg 0."""
    control_scales: range
    """Where the control's features come in; elsewhere zeros do."""
    control_strength: float
    """Factor of these features."""
    drawn: int
    """Scales that are made, the coarsest ones; the image is what they come to."""

    @property
    def guided(self) -> bool:
        """Whether any scale that is drawn is guided."""
        return self.cfg_scales.start < self.drawn

    @property
    def unguided_from(self) -> int | None:
        """The scale from which on nothing is guided any more, so that guidance rows can go; None: there is none."""
        return self.cfg_scales.stop if self.cfg_scales.stop < self.drawn else None

    @property
    def plain_control(self) -> bool:
        """Whether the control's features are taken as they are."""
        return self.control_scales == range(self.scales) and self.control_strength == 1

    def settings(self) -> dict[str, str | float | int]:
        """What differs from the exact loop, by the arguments' names; given again, they make the same schedule."""
        found: dict[str, str | float | int] = {}
        for name, scales in (("cfg_scales", self.cfg_scales), ("control_scales", self.control_scales)):
            if scales != range(self.scales):
                found[name] = f"{scales.start}-{scales.stop - 1}"
        if self.control_strength != 1:
            found["control_strength"] = self.control_strength
        if self.drawn != self.scales:
            found["stop_after"] = self.drawn - 1
        return found


def parse_scales(name: str, given: Scales | None, K: int) -> range:
    """The scales that a caller named, all K where it named none. Raises RequestError, which says `name`."""
    if given is None:
        return range(K)
    first, last = _ends(name, given, K)
    for end in (first, last):
        if not 0 <= end < K:
            raise RequestError(f"{name} is {given!r}, but the plan's scales are 0…{K - 1}; {_remedy(K)}")
    if first > last:
        raise RequestError(f"{name} is {given!r}, which ends before it begins; give the coarser scale first")
    return range(first, last + 1)


def _ends(name: str, given: object, K: int) -> tuple[int, int]:
    """First and last of the scales, not yet known to be among the plan's."""
    if isinstance(given, Integral) and not isinstance(given, bool):
        return int(given), int(given)
    if isinstance(given, range) and given.step == 1 and len(given):
        return given.start, given.stop - 1
    if isinstance(given, str):
        one = re.fullmatch(r"\s*([0-9]{1,9})\s*", given)
        if one:
            return int(one[1]), int(one[1])
        ends = re.fullmatch(r"\s*([0-9]{0,9})\s*-\s*([0-9]{0,9})\s*", given)
        if ends and (ends[1] or ends[2]):
            return int(ends[1] or 0), int(ends[2] or K - 1)
    raise RequestError(f"{name} is {given!r}, which names no scales; {_remedy(K)}")


def _remedy(K: int) -> str:
    last = K - 1
    return f"give two ends as 0-{last}, one of them as 1- or -{last}, or one scale"
