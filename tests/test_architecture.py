"""Who may import whom: `[tool.importlinter]` in pyproject.toml states it, here it is checked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(contracts: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over this checkout's packages with other contracts, or with its own (empty)."""
    root = folder if contracts else ROOT
    if contracts:
        (folder / "pyproject.toml").write_text(contracts, encoding="utf-8")
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "export", ROOT / "runtime"))
    environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"}
    arguments = [sys.executable, "-c", LINT]
    return subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


def test_every_import_goes_the_way_that_the_contracts_state(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    done = lint("", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert found is not None
    assert int(found[1]) >= 7


def test_an_import_the_wrong_way_is_found(tmp_path: Path) -> None:
    """The check sees this checkout's imports: stated the other way round, the layers are broken."""
    pytest.importorskip("importlinter")
    done = lint(
        """
[tool.importlinter]
root_packages = ["car_runtime"]
[[tool.importlinter.contracts]]
name = "upside down"
type = "layers"
containers = ["car_runtime"]
layers = ["system", "backends"]
""",
        tmp_path,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "car_runtime.backends.spec -> car_runtime.system.gpu" in done.stdout


def test_every_package_says_what_is_in_it() -> None:
    packages = [
        path
        for name in ("benchmarks", "car_train", "export", "runtime")
        for path in (ROOT / name).rglob("__init__.py")
    ]
    assert packages
    assert not [path for path in packages if not path.read_text(encoding="utf-8").startswith('"""')]
