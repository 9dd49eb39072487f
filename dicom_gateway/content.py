"""Whether two data sets with one SOP Instance UID say the same, though their bytes differ (design §4.8).

A sender that was refused, or a PACS that stored the image and sends it on, may use another transfer syntax: implicit
for explicit VR, little for big endian, defined for undefined lengths. Two digests decide, one of the header and one of
the pixels, over what the elements say: tags and values in order, little endian, without group lengths, value padding,
VRs and the way sequences end. Pixel data that is compressed is compared as the code stream it is: the gateway does not
decode, so an image recompressed on the way counts as another one and is kept beside the first.
"""

import hashlib

from storage.dataset import (
    DEFLATED_SYNTAXES,
    EXPLICIT_VR_BIG_ENDIAN,
    PIXEL_DATA,
    Data,
    Element,
    inflate,
    walk,
)

_ITEM = 0xFFFEE000
_TRAILING_PADDING = 0xFFFCFFFC
_WORD_BYTES = {
    **dict.fromkeys((b"AT", b"OW", b"SS", b"US"), 2),
    **dict.fromkeys((b"FL", b"OF", b"OL", b"SL", b"UL"), 4),
    **dict.fromkeys((b"FD", b"OD", b"OV", b"SV", b"UV"), 8),
}
"""PS3.5 7.3: the VRs whose values are swapped in big endian, and by how many bytes."""


def _little_endian(value: bytes, width: int) -> bytes:
    usable = len(value) // width * width
    swapped = bytearray(value)
    for index in range(width):
        swapped[index:usable:width] = value[width - 1 - index : usable : width]
    return bytes(swapped)


def _value(data: Data, element: Element, swap: bool) -> bytes:
    value = bytes(data[element.value_offset : element.end])
    if swap and element.vr in _WORD_BYTES:
        value = _little_endian(value, _WORD_BYTES[element.vr])
    return value


def content_digests(data: Data, transfer_syntax_uid: str) -> tuple[str, str]:
    """(SHA-256 hex of what the header says, SHA-256 hex of the pixels). Raises MalformedDataSetError."""
    if transfer_syntax_uid in DEFLATED_SYNTAXES:
        data = inflate(data)
    swap = transfer_syntax_uid == EXPLICIT_VR_BIG_ENDIAN
    header, pixels = hashlib.sha256(), hashlib.sha256()
    for element in walk(data, transfer_syntax_uid):
        if element.tag == PIXEL_DATA and element.depth == 0:
            pixels.update(_value(data, element, swap))
            continue
        is_group_length = element.tag & 0xFFFF == 0 and element.tag != _ITEM
        if is_group_length or element.tag == _TRAILING_PADDING:
            continue
        header.update(f"{element.depth}:{element.tag:08x}:".encode())
        if element.end > element.value_offset:  # not a sequence or an item, whose content comes by itself
            header.update(_value(data, element, swap).rstrip(b" \0") + b"\n")
    return header.hexdigest(), pixels.hexdigest()
