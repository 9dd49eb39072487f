"""Ask a DICOM server whether it answers: one association request, one release, written by hand.

pynetdicom would start threads, and the supervisor that asks must stay single-threaded because it forks.
"""

import socket
import struct

_APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"  # PS3.7 Annex A
_VERIFICATION = b"1.2.840.10008.1.1"  # PS3.4 Annex A
_IMPLICIT_LITTLE_ENDIAN = b"1.2.840.10008.1.2"
_IMPLEMENTATION_CLASS = b"2.25.305828488182831875890203105390285383139"  # PS3.5 Annex B.2
_ACCEPT, _REJECT = 0x02, 0x03
_RELEASE_REQUEST = struct.pack(">BxII", 0x05, 4, 0)  # PS3.8 Table 9-24


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


def _request(called: str, calling: str) -> bytes:
    """An A-ASSOCIATE-RQ that proposes Verification (PS3.8 Table 9-11)."""
    context = struct.pack(">B3x", 1) + _item(0x30, _VERIFICATION) + _item(0x40, _IMPLICIT_LITTLE_ENDIAN)
    user = _item(0x51, struct.pack(">I", 16384)) + _item(0x52, _IMPLEMENTATION_CLASS)
    items = _item(0x10, _APPLICATION_CONTEXT) + _item(0x20, context) + _item(0x50, user)
    titles = called.ljust(16).encode("ascii") + calling.ljust(16).encode("ascii")
    body = struct.pack(">H2x", 1) + titles + bytes(32) + items
    return struct.pack(">BxI", 0x01, len(body)) + body


def dicom_problem(port: int, called_ae_title: str, seconds: float) -> str | None:
    """None when the server on 127.0.0.1 accepts or rejects an association: both are answers.

    A rejection counts, because a gateway may know only its own modalities (PS3.8 Table 9-21).
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
            connection.sendall(_request(called_ae_title, "YZSTATUS"))
            kind = connection.recv(1)
            if kind == bytes([_ACCEPT]):
                connection.sendall(_RELEASE_REQUEST)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
    except OSError as error:
        return str(error) or type(error).__name__
    return None if kind and kind[0] in (_ACCEPT, _REJECT) else "no answer to an association request"
