"""Reading several pieces of one instance with few requests: neighbours come in one range read. Pure but for `read`."""

from collections.abc import Callable, Sequence

from storage.errors import MalformedDataSetError

Extent = tuple[int, int]
"""(offset, length) in bytes."""

_MAX_GAP_BYTES = 4096
"""Reading this much for nothing costs less than another request: fragments of frames have 8-byte headers between."""
_MAX_RUN_BYTES = 8 * 1024 * 1024
MAX_READ_BYTES = 1024 * 1024 * 1024
"""Of one frame or bulk value. The largest lossless mammograms are 50 MB; more is a file that lies."""


class Extents:
    """Reads extents in the order they were announced; `read(offset, length)` fetches from the instance."""

    def __init__(self, read: Callable[[int, int], bytes], extents: Sequence[Extent], size: int) -> None:
        """Raises MalformedDataSetError if an extent is not within `size` bytes."""
        for offset, length in extents:
            if offset < 0 or length < 0 or offset + length > size or length > MAX_READ_BYTES:
                raise MalformedDataSetError(f"{length} bytes at {offset} are not within an instance of {size} bytes")
        self._read = read
        self._extents = extents
        self._ends = _run_ends(extents)
        self._next = 0
        self._start, self._buffer = 0, b""

    def next(self) -> bytes:
        """Bytes of the next announced extent."""
        (offset, length), end = self._extents[self._next], self._ends[self._next]
        self._next += 1
        if length == 0:
            return b""
        if not self._start <= offset <= offset + length <= self._start + len(self._buffer):
            self._start, self._buffer = offset, self._read(offset, end - offset)
        return self._buffer[offset - self._start : offset - self._start + length]


def _run_ends(extents: Sequence[Extent]) -> list[int]:
    """For each extent, where a run of neighbours that starts there would end."""
    ends: list[int] = []
    for index in range(len(extents) - 1, -1, -1):
        offset, length = extents[index]
        end = offset + length
        if ends:
            next_offset, next_end = extents[index + 1][0], ends[-1]
            if 0 <= next_offset - end <= _MAX_GAP_BYTES and next_end - offset <= _MAX_RUN_BYTES:
                end = next_end
        ends.append(end)
    return ends[::-1]
