"""Files that survive a power cut: contents synced, name changed, directory synced, in this order."""

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes, *, suffix: str) -> None:
    """Write `content` beside `path` under a name ending in `suffix`, then put it in place. Raises OSError."""
    temporary = path.with_name(path.name + suffix)
    with temporary.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    sync_directory(path.parent)
