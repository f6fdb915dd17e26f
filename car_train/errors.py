"""What a user can put right: the base of every error that a command reports in one line."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right. The message names the value and ends with the remedy."""
