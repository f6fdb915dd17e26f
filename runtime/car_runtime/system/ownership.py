"""Whether a file can have been put there by anybody but this user and root: asked before what it holds is run."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def is_closed(folder: Path) -> bool:
    """Whether nobody but this user and root can change what is in a folder, or what its path leads to."""
    above = [folder.absolute(), *folder.absolute().parents, folder.resolve(), *folder.resolve().parents]
    for each in dict.fromkeys(above):
        found = each.stat()
        others_write = found.st_mode & _OTHERS and not found.st_mode & stat.S_ISVTX
        if others_write or found.st_uid not in (0, os.geteuid()):
            return False
    return not folder.stat().st_mode & _OTHERS


def is_ours(file: Path) -> bool:
    """Whether there is a file of this user's, no link, that nobody else can write to."""
    try:
        found = file.lstat()
    except FileNotFoundError:
        return False
    writable = found.st_mode & _OTHERS
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1 and not writable
