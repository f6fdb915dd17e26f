"""Files are written whole or not at all, and an error names the file that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from car_runtime.system.files import replacing, write_atomically


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_atomically({old: b"old"})
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomically({old: b"changed", new: b"new"})
    assert caught.value.filename == str(old)
    assert old.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_error_names_the_file_and_the_others_are_not_written(tmp_path: Path) -> None:
    missing = tmp_path / "no such folder" / "b"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically({tmp_path / "a": b"a", missing: b"b"})
    assert caught.value.filename == str(missing)
    assert list(tmp_path.iterdir()) == []


def test_a_file_replaces_another_and_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    path, plain = tmp_path / "x", tmp_path / "plain"
    write_atomically({path: b"old"})
    write_atomically({path: b"new"})
    plain.write_bytes(b"")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == plain.stat().st_mode


def test_somebody_elses_output_takes_its_place_only_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as aside:
        subprocess.run([sys.executable, "-c", f"open({str(aside)!r}, 'w').write('made')"], check=True)
        assert not path.exists()
    assert path.read_text() == "made"
    with pytest.raises(subprocess.CalledProcessError), replacing(path) as aside:
        subprocess.run([sys.executable, "-c", f"open({str(aside)!r}, 'w').write('half'); exit(1)"], check=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "made")]
