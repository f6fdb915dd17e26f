"""What can go wrong, by kind.

Every message names the offending value and ends, after a semicolon, with what to do about it. The command line prints
the message as its one line on stderr; `UserError` kinds end with exit code 2 (the caller can repair it), the rest
with 1.
"""

from __future__ import annotations

import re


class CarError(Exception):
    """Base of everything car_runtime raises on purpose."""


class UserError(CarError):
    """Something the caller gave cannot be used; nothing is wrong with the program."""


class PlanError(UserError):
    """The plan is missing, truncated, edited, inconsistent, or written by a newer version."""


class BackendError(UserError):
    """The named backend does not exist, is not installed, or cannot open on this machine."""


class ImageError(UserError):
    """An image cannot be read, or its size or kind is unusable."""


class RequestError(UserError):
    """An argument is out of range, or does not fit this plan."""


class OutputError(UserError):
    """A result cannot be written where it was asked for."""


class RunError(CarError):
    """The engine failed while running a graph."""


LINE = 280
"""Characters of an error's message; with the command's name before it, its line has at most 300."""
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, breaks lines at or reorders text by, and halves of characters."""


def printable(text: str) -> str:
    """A text of a file as a terminal may show it: what would steer it is escaped, as in "\\x1b[2J"."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """`printable` of each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(error: object) -> str:
    """An error's message on one line, printable, or its type where it has none."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def error_line(error: object) -> str:
    """`one_line` of at most `LINE` characters: a longer one loses its middle, so that what and what to do stay."""
    text = one_line(error)
    return text if len(text) <= LINE else f"{text[: LINE // 2]}…{text[LINE // 2 + 1 - LINE :]}"
