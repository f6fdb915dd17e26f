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


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its type."""
    return " ".join(str(error).split()) or type(error).__name__
