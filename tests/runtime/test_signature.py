"""Signatures of plans: who made the manifest, and through its hashes every file, is who the caller trusts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from car_export.cli import main as build_engines
from car_runtime import PlanError, RequestError, default_plan, open_plan
from car_runtime.cli.main import main
from car_runtime.format.manifest import MANIFEST, read_manifest
from car_runtime.format.signature import SIGNATURE

CONTROL = Path(__file__).parents[2] / "examples" / "umbrella.png"
PEM = serialization.Encoding.PEM


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new key pair: the private and the public file."""
    private = ed25519.Ed25519PrivateKey.generate()
    files = folder / f"{name}.pem", folder / f"{name}-pub.pem"
    plain = serialization.NoEncryption()
    files[0].write_bytes(private.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain))
    files[1].write_bytes(private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped plan, signed by the exporter, and two key pairs."""
    folder = tmp_path_factory.mktemp("signed")
    shutil.copytree(default_plan(), folder / "a.plan")
    key, _ = write_keys(folder, "mine")
    write_keys(folder, "other")
    assert build_engines([str(folder / "a.plan"), "--sign", str(key)]) == 0
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder / "a.plan", to / "a.plan")
    return to / "a.plan"


def test_a_signed_plan_runs(folder: Path, tmp_path: Path) -> None:
    key = ["--require-signature", str(folder / "mine-pub.pem")]
    plan = ["-e", str(folder / "a.plan")]
    assert main([*plan, *key, "--control", str(CONTROL), "-o", str(tmp_path / "x.png")]) == 0
    assert main([*plan, *key, "--list-classes"]) == 0
    with open_plan(folder / "a.plan", "ort-cpu", require_signature=folder / "mine-pub.pem") as opened:
        assert opened.manifest == read_manifest(default_plan())


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda plan: (plan / SIGNATURE).unlink(), "has no signature"),
        (lambda plan: (plan / SIGNATURE).write_bytes(b"A" * 88), "is not of the key"),
        (lambda plan: (plan / SIGNATURE).write_bytes(b"\xff not base64"), "is not of the key"),
        (lambda plan: (plan / SIGNATURE).write_bytes(b"A" * 5000), "has no signature"),
        (
            lambda plan: (plan / MANIFEST).write_text((plan / MANIFEST).read_text() + " "),
            "was changed after it was made",
        ),
    ],
)
def test_what_is_not_signed_as_it_is_gets_refused(folder: Path, tmp_path: Path, harm: object, said: str) -> None:
    plan = copy(folder, tmp_path)
    harm(plan)  # type: ignore[operator]
    with pytest.raises(PlanError, match=said):
        open_plan(plan, require_signature=folder / "mine-pub.pem")
    open_plan(plan, "ort-cpu").close()


def test_files_are_vouched_for_by_their_hashes(folder: Path, tmp_path: Path) -> None:
    plan = copy(folder, tmp_path)
    weights = bytearray((plan / "weights.bin").read_bytes())
    weights[1000] ^= 1
    (plan / "weights.bin").write_bytes(weights)
    with pytest.raises(PlanError, match="was changed after the export"):
        open_plan(plan, "ort-cpu", require_signature=folder / "mine-pub.pem")
    with pytest.raises(RequestError, match="vouches for hashes"):
        open_plan(plan, verify=False, require_signature=folder / "mine-pub.pem")


@pytest.mark.parametrize("command", [["--control", str(CONTROL), "-e"], ["--list-classes", "-e"], ["verify"]])
def test_another_key_is_one_line(
    folder: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*command, str(folder / "a.plan"), "--require-signature", str(folder / "other-pub.pem")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "is not of the key" in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_keys_that_cannot_be_used_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    (tmp_path / "ec.pem").write_bytes(curve.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "text.pem").write_text("no key")
    secp112r1 = "MDIwEAYHKoZIzj0CAQYFK4EEAAYDHgAEI4dPh9KumfrZwP/XqDcqtrs+C3rbahJFPXsj1w=="
    (tmp_path / "old.pem").write_text(f"-----BEGIN PUBLIC KEY-----\n{secp112r1}\n-----END PUBLIC KEY-----\n")
    for key, said in (
        ("ec.pem", "of Ed25519"),
        ("text.pem", "no public key"),
        ("gone.pem", "no key file"),
        ("old.pem", "no public key"),
    ):
        with pytest.raises(RequestError, match=said):
            open_plan(folder / "a.plan", require_signature=tmp_path / key)
    with pytest.raises(RequestError, match="no public key"):
        open_plan(folder / "a.plan", require_signature=folder / "mine.pem")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(RequestError, match=r"car-deploy\[sign\]"):
        open_plan(folder / "a.plan", require_signature=folder / "mine-pub.pem")


def test_signing_refuses_before_the_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("mine-pub.pem", "gone.pem"):
        assert build_engines([str(folder / "a.plan"), "--sign", str(folder / key)]) == 2
        assert "key" in capsys.readouterr().err
    assert build_engines([str(folder / "a.plan"), "--sign", str(folder / "mine.pem"), "--cfg", "3"]) == 2
    assert "--cfg" in capsys.readouterr().err
