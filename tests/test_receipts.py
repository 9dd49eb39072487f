"""storage/receipts.py: a receipt verifies for its site under its key, and nothing else does."""

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigurationError, SignatureInvalidError
from storage.receipts import key_id, load_public_key, load_signing_key, sign, verify
from storage.wire import Receipt, ReceiptLine

KEY = ed25519.Ed25519PrivateKey.generate()
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
lines = st.builds(
    ReceiptLine, sop_instance_uid=st.from_regex(r"[0-9]{1,8}(\.[0-9]{1,8}){0,6}", fullmatch=True), sha256=digests
)
receipts = st.builds(
    Receipt, site=st.text(max_size=10), pack_id=st.just("0" * 32), instances=st.lists(lines, max_size=4).map(tuple),
    archived_at=st.datetimes(timezones=st.just(UTC)), key_id=st.just(""), signature=st.just(""),
)  # fmt: skip


@given(receipts)
def test_a_signed_receipt_verifies_also_after_the_wire(receipt):
    signed = Receipt.model_validate_json(sign(receipt, KEY).model_dump_json())
    assert signed.key_id == key_id(KEY.public_key())
    verify(signed, KEY.public_key(), site=receipt.site)


@given(receipts, lines)
def test_a_receipt_that_was_changed_does_not_verify(receipt, line):
    signed = sign(receipt, KEY)
    for change in (
        {"instances": (*receipt.instances, line)},
        {"archived_at": datetime(1990, 1, 1, tzinfo=UTC)},
        {"pack_id": "1" * 32},
        {"signature": ""},
        {"signature": "not base64"},
    ):
        with pytest.raises(SignatureInvalidError):
            verify(signed.model_copy(update=change), KEY.public_key(), site=receipt.site)


def test_another_key_or_another_site_does_not_verify():
    receipt = Receipt(site="a", pack_id="0" * 32, instances=(), archived_at=datetime.now(UTC), key_id="")
    signed = sign(receipt, KEY)
    with pytest.raises(SignatureInvalidError, match="does not verify"):
        verify(signed, ed25519.Ed25519PrivateKey.generate().public_key(), site="a")
    with pytest.raises(SignatureInvalidError, match="for site 'a'"):
        verify(signed, KEY.public_key(), site="b")


def test_keys_come_from_pem_and_other_kinds_are_named():
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert key_id(load_signing_key(pem).public_key()) == key_id(load_public_key(public))
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with pytest.raises(ConfigurationError):
        load_signing_key(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigurationError):
        load_public_key(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
