"""What a user can put right: the base of every error that a command reports in one line."""

from __future__ import annotations

import re


class UserError(Exception):
    """Something that the user can put right. The message names the value and ends with the remedy."""


LINE = 280
"""Characters of a line of an error's message; with the command's name before it, at most 300."""
LINES = 20
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, breaks lines at or reorders text by, and halves of characters."""


def printable(text: str) -> str:
    """A text of a file as a terminal may show it: what would steer it is escaped, as in "\\x1b[2J"."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """`printable` of each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def error_lines(error: object) -> str:
    """An error's message, printable: at most `LINES` lines of at most `LINE` characters; of more the ends."""
    lines = printable_lines(str(error)).split("\n")
    if len(lines) > LINES:
        lines[LINES // 2 : LINES // 2 + 1 - LINES] = [f"  … {len(lines) - LINES + 1} more"]
    return "\n".join(line if len(line) <= LINE else _without_middle(line) for line in lines)


def _without_middle(text: str) -> str:
    return f"{text[: LINE // 2]}…{text[LINE // 2 + 1 - LINE :]}"
