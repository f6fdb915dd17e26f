"""A plan's signature: who vouches for the manifest, and so for every file whose hash it holds.

`manifest.sig` is detached: the Ed25519 signature (RFC 8032) of `CONTEXT` followed by the manifest's bytes, in base64.
Hashes find damage; only a signature says where a plan is from. It needs `cryptography` (extra `sign`).
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_runtime.errors import PlanError, RequestError
from car_runtime.format.folder import PlanFolder
from car_runtime.format.schema import MANIFEST

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "manifest.sig"
CONTEXT = b"car-deploy plan manifest, signature 1\n"
"""Signed before the manifest, so that a signature serves for nothing else."""
SIGNATURE_BYTES = 1024
KEY_BYTES = 16 * 1024
"""A key file is not larger."""
MAKE_KEYS = "openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out pub.pem"


def check_signature(folder: PlanFolder, manifest: bytes, key: str | os.PathLike[str]) -> None:
    """See that a manifest's bytes are signed by the owner of a public key, a PEM file.

    Raises PlanError: no signature, or one of another key or manifest. RequestError: the key can't be used.
    """
    public, name = public_key(key), str(folder.root)
    from cryptography.exceptions import InvalidSignature

    try:
        text = folder.read(SIGNATURE, SIGNATURE_BYTES)
    except PlanError as error:
        raise PlanError(
            f"{name!r} has no signature ({SIGNATURE}); get one from who made the plan, or leave out "
            "--require-signature"
        ) from error
    try:
        public.verify(base64.b64decode(text.strip(), validate=True), CONTEXT + manifest)
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise PlanError(
            f"the signature of {name!r} is not of the key {str(key)!r}, or {MANIFEST} was changed after it was made; "
            "get the plan again, or the right key"
        ) from error


def sign(root: Path, key: str | os.PathLike[str]) -> bytes:
    """The content of `manifest.sig` for a plan, by a private key, a PEM file. Raises RequestError, OSError."""
    signature = private_key(key).sign(CONTEXT + (root / MANIFEST).read_bytes())
    return base64.b64encode(signature) + b"\n"


def public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    """A public key of a PEM file. Raises RequestError."""
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = serialization.load_pem_public_key(_key_text(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "public", "-----BEGIN PUBLIC KEY-----") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _no_key(path, "public", "of Ed25519")
    found: Ed25519PublicKey = key
    return found


def private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """A private key of a PEM file without a passphrase. Raises RequestError."""
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = serialization.load_pem_private_key(_key_text(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a passphrase
        raise _no_key(path, "private", "-----BEGIN PRIVATE KEY-----, without a passphrase") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _no_key(path, "private", "of Ed25519")
    found: Ed25519PrivateKey = key
    return found


def _cryptography() -> tuple[Any, Any]:
    """The modules `serialization` and `ed25519`. Raises RequestError where they are not installed."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise RequestError(
            "signatures need the package cryptography, which is not installed; pip install 'car-deploy[sign]'"
        ) from error
    return serialization, ed25519


def _key_text(path: str | os.PathLike[str]) -> bytes:
    """The content of a key file, which is small and regular."""
    if not isinstance(path, (str, os.PathLike)):
        raise RequestError(f"the key is {path!r}; give the path of a PEM file")
    try:
        if not Path(path).is_file():
            raise RequestError(f"there is no key file {str(path)!r}; make one with {MAKE_KEYS}")
        with open(path, "rb") as file:
            return file.read(KEY_BYTES)
    except OSError as error:
        raise RequestError(
            f"the key {str(path)!r} can't be read ({error.strerror}); check its permissions"
        ) from error


def _no_key(path: str | os.PathLike[str], kind: str, what: str) -> RequestError:
    return RequestError(f"{str(path)!r} is no {kind} key that can be used; give a PEM file, {what}")
