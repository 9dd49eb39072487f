"""Receipts: the centre's Ed25519 signature over (site, pack, UIDs, digests, time). Pure; used by both sides.

The signed bytes are the receipt's JSON with sorted keys, no spaces, signature left out: any language can rebuild them.
"""

import base64
import hashlib
import json
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from storage.errors import ConfigurationError, SignatureInvalidError
from storage.wire import Receipt


def canonical(receipt: Receipt) -> bytes:
    """The bytes that are signed."""
    content = receipt.model_dump(mode="json", exclude={"signature"})
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def key_id(public_key: Ed25519PublicKey) -> str:
    """First 16 hex digits of the SHA-256 of the raw public key: names the key on the receipt."""
    return hashlib.sha256(public_key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def load_signing_key(pem: bytes) -> Ed25519PrivateKey:
    """Read the centre's private key. Raises ConfigurationError if it is another kind of key."""
    key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError("The receipt key is not an Ed25519 private key")
    return key


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file. Raises ConfigurationError that names the file."""
    try:
        return load_signing_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"Receipt key {path} cannot be read: {error}") from error


def load_public_key(pem: bytes) -> Ed25519PublicKey:
    """Read the centre's public key. Raises ConfigurationError if it is another kind of key."""
    key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigurationError("The receipt key is not an Ed25519 public key")
    return key


def sign(receipt: Receipt, key: Ed25519PrivateKey) -> Receipt:
    """The same receipt with key id and signature filled in."""
    named = receipt.model_copy(update={"key_id": key_id(key.public_key()), "signature": ""})
    return named.model_copy(update={"signature": base64.b64encode(key.sign(canonical(named))).decode()})


def verify(receipt: Receipt, key: Ed25519PublicKey, *, site: str) -> None:
    """Raise SignatureInvalidError unless `key` signed this receipt for `site`."""
    if receipt.site != site:
        raise SignatureInvalidError(f"Receipt is for site {receipt.site!r}, not {site!r}")
    try:
        key.verify(base64.b64decode(receipt.signature, validate=True), canonical(receipt))
    except (InvalidSignature, ValueError) as error:
        raise SignatureInvalidError("Receipt signature does not verify") from error
