"""Packs: instances of one series travel and rest as one object (design §5). Pure; written by the gateway, read by both.

Layout, little endian, no padding:

    instance bytes, one after another | index: zstd of UTF-8 JSON | index length, u32 | SHA-256 of index | b"YZPACK01"

The index holds the study's facts and every instance's facts with offset and length, so that a lost database can be
rebuilt from packs alone. Offsets are from the start of the object, in bytes.
"""

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import MalformedDataSetError
from storage.vocabulary import Codec
from storage.wire import InstanceFacts, StudyFacts

MAGIC = b"YZPACK01"
_TRAILER = struct.Struct("<I32s8s")
TRAILER_BYTES = _TRAILER.size
MAX_INDEX_BYTES = 64 * 1024 * 1024
_COPY_BYTES = 1024 * 1024


class PackEntry(BaseModel):
    """Where one instance lies in the pack, and what it is."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    facts: InstanceFacts
    offset: int = Field(ge=0)
    length: int = Field(ge=0)
    codec: Codec = Codec.RAW
    codec_version: int = 1


class PackIndex(BaseModel):
    """All that is needed to give the instances back."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = 1
    study: StudyFacts
    entries: tuple[PackEntry, ...]


def write_pack(out: BinaryIO, study: StudyFacts, files: Iterable[tuple[InstanceFacts, Path]]) -> tuple[int, str]:
    """Write a pack of raw instances to `out`. Returns (size in bytes, SHA-256 hex of the whole object).

    The bytes are hashed again on the way; OSError if a file is gone, MalformedDataSetError if one is not what it was.
    """
    whole = hashlib.sha256()
    offset = 0
    entries: list[PackEntry] = []
    for facts, path in files:
        one = hashlib.sha256()
        length = 0
        with path.open("rb") as source:
            while block := source.read(_COPY_BYTES):
                out.write(block)
                whole.update(block)
                one.update(block)
                length += len(block)
        if one.hexdigest() != facts.sha256:
            raise MalformedDataSetError(f"{path.name}: the spool file no longer has the digest it was received with")
        entries.append(PackEntry(facts=facts, offset=offset, length=length))
        offset += length
    tail = _tail(PackIndex(study=study, entries=tuple(entries)))
    out.write(tail)
    whole.update(tail)
    return offset + len(tail), whole.hexdigest()


def _tail(index: PackIndex) -> bytes:
    packed = zstandard.ZstdCompressor(level=6).compress(index.model_dump_json().encode())
    return packed + _TRAILER.pack(len(packed), hashlib.sha256(packed).digest(), MAGIC)


def index_extent(trailer: bytes, size_bytes: int) -> tuple[int, int]:
    """From a pack's last TRAILER_BYTES: (offset, length) of its index. Raises MalformedDataSetError."""
    if len(trailer) != TRAILER_BYTES:
        raise MalformedDataSetError("Pack is shorter than its trailer")
    length, _, magic = _TRAILER.unpack(trailer)
    start = size_bytes - TRAILER_BYTES - length
    if magic != MAGIC or length > MAX_INDEX_BYTES or start < 0:
        raise MalformedDataSetError("Pack has no valid trailer: it was cut short or is something else")
    return start, length


def read_index(packed: bytes, trailer: bytes) -> PackIndex:
    """Decode an index whose bytes and trailer were read. Raises MalformedDataSetError."""
    _, digest, _ = _TRAILER.unpack(trailer)
    if hashlib.sha256(packed).digest() != digest:
        raise MalformedDataSetError("Pack index does not match its digest")
    try:
        # Where the frame states its size, zstandard allocates that much and disregards max_output_size.
        stated = zstandard.get_frame_parameters(packed).content_size
        if stated != zstandard.CONTENTSIZE_UNKNOWN and stated > MAX_INDEX_BYTES:
            raise MalformedDataSetError(f"Pack index is larger than {MAX_INDEX_BYTES} bytes")
        text = zstandard.ZstdDecompressor().decompress(packed, max_output_size=MAX_INDEX_BYTES)
        return PackIndex.model_validate_json(text)
    except (zstandard.ZstdError, ValidationError) as error:
        raise MalformedDataSetError(f"Pack index cannot be read: {type(error).__name__}") from error


def index_of(pack: bytes | memoryview) -> PackIndex:
    """The index of a pack that is wholly in memory. Raises MalformedDataSetError."""
    view = memoryview(pack)
    trailer = bytes(view[-TRAILER_BYTES:]) if len(view) >= TRAILER_BYTES else b""
    start, length = index_extent(trailer, len(view))
    return read_index(bytes(view[start : start + length]), trailer)
