"""multipart/related bodies (RFC 2387, PS3.18 8.6.1.2), whole or as a stream."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One part: its Content-Type and its bytes."""

    content_type: str
    content: bytes


def random_boundary() -> str:
    """A boundary that nobody can have put into pixels: 128 random bits, drawn after the pixels were stored."""
    return f"yuanzhen-{secrets.token_hex(16)}"


def boundary_outside(parts: Sequence[Part]) -> str:
    """A boundary that occurs in none of the parts."""
    while True:
        boundary = random_boundary()
        needle = boundary.encode()
        if not any(needle in part.content for part in parts):
            return boundary


def content_type(media_type: str, boundary: str) -> str:
    """Content-Type of the whole body. OHIF's parser takes the boundary without quotes as well as with them."""
    return f'multipart/related; type="{media_type}"; boundary={boundary}'


def stream(parts: Iterable[Part], boundary: str) -> Iterator[bytes]:
    """The body, piece by piece; one part is in memory at a time."""
    for part in parts:
        # Written as `Content-Type:`: OHIF looks for this capitalisation.
        yield (
            f"--{boundary}\r\nContent-Type: {part.content_type}\r\nContent-Length: {len(part.content)}\r\n\r\n"
        ).encode()
        yield part.content
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()


def body(parts: Sequence[Part], boundary: str) -> bytes:
    """The body at once."""
    return b"".join(stream(parts, boundary))
