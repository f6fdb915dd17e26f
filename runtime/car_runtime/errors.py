"""What can go wrong, by kind.

Every message names the offending value and ends, after a semicolon, with what to do about it. The command line prints
the message as its one line on stderr; `UserError` kinds end with exit code 2 (the caller can repair it), the rest
with 1.
"""

from __future__ import annotations


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


LINE = 300
"""Characters of an error line. What a file says may be of any length, and a terminal shows all of it."""


def printable(text: str) -> str:
    """A text of a file as a terminal may show it: what would steer it is escaped, as in "\\x1b[2J"."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def one_line(error: object) -> str:
    """An error's message on one line of at most `LINE` characters, printable; or its type where it has none.

    A longer one is shortened before its remedy, the part after the last semicolon.
    """
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if len(text) <= LINE:
        return text
    problem, semicolon, remedy = text.rpartition(";")
    if not semicolon or len(remedy) > LINE // 2:
        return text[: LINE - 1] + "…"
    return f"{problem[: LINE - len(remedy) - 2]}…;{remedy}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode() if character != " " else character
