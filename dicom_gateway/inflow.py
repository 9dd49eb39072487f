"""The memory that messages under way may hold: bounded for each message, and over all associations together.

pynetdicom gathers a message in memory until its last fragment comes, however many fragments there are. Here each
message gets a buffer that takes from one budget. What finds no room is read and dropped, and answered A700 (PS3.4
Table B.2-1), so that the sender tries again later and the association goes on; what never ends is cut off.
"""

import threading
import weakref
from functools import partial
from io import BytesIO
from typing import Any

from pynetdicom.dimse_messages import DIMSEMessage

from storage.wire import MAX_OBJECT_BYTES

_COMMAND_BYTES = 64 * 1024
"""A C-STORE-RQ command set has some 300 bytes (PS3.7 9.3.1)."""


class Inflow:
    """The budget. Thread safe."""

    def __init__(self, budget_bytes: int) -> None:
        self._lock = threading.Lock()
        self._free = budget_bytes
        self._most_for_one = max(1, budget_bytes // 2)  # so that one sender alone cannot keep the others out
        self._buffers: weakref.WeakKeyDictionary[Any, list[Received]] = weakref.WeakKeyDictionary()

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self._free

    def take(self, size_bytes: int, held_bytes: int) -> bool:
        """Whether a message that holds `held_bytes` may hold that much more."""
        with self._lock:
            if size_bytes > self._free or held_bytes + size_bytes > self._most_for_one:
                return False
            self._free -= size_bytes
            return True

    def give_back(self, size_bytes: int) -> None:
        """What was taken."""
        with self._lock:
            self._free += size_bytes

    def watch(self, association: Any) -> None:
        """Put this budget before an association's messages."""
        dimse = association.dimse
        dimse.receive_primitive = partial(self._receive, association, dimse.receive_primitive)

    def forget(self, association: Any) -> None:
        """The connection is closed: whatever its messages hold is free."""
        with self._lock:
            buffers = self._buffers.pop(association, [])
        for buffer in buffers:
            buffer.release()

    def _receive(self, association: Any, receive: Any, primitive: Any) -> None:
        dimse = association.dimse
        if dimse.message is None:
            dimse.message = DIMSEMessage()
            dimse.message.data_set = Received(self)
            with self._lock:
                held = [buffer for buffer in self._buffers.get(association, ()) if buffer.held_bytes]
                self._buffers[association] = [*held, dimse.message.data_set]
        message = dimse.message
        receive(primitive)
        if message.encoded_command_set.tell() > _COMMAND_BYTES or (
            isinstance(message.data_set, Received) and message.data_set.dropped_bytes > MAX_OBJECT_BYTES
        ):
            dimse.message = None
            association.dul.event_queue.put("Evt19")  # as pynetdicom does with a message that it cannot read


class Received(BytesIO):
    """A data set as it comes in. `overflowed`: there was no room, and nothing of it is kept."""

    def __init__(self, inflow: Inflow) -> None:
        super().__init__()
        self._inflow = inflow
        self._changing = threading.Lock()
        self.held_bytes = self.dropped_bytes = 0
        self.overflowed = False

    def write(self, data: Any, /) -> int:
        """Add a fragment, or drop it."""
        size_bytes = len(data)
        if not self.overflowed and self._inflow.take(size_bytes, self.held_bytes):
            self.held_bytes += size_bytes
            return super().write(data)
        self.overflowed = True
        self.dropped_bytes += size_bytes
        if self.held_bytes:
            self.release()
            self.seek(0)
            self.truncate()
        return size_bytes

    def release(self) -> None:
        """Give back what is held of the budget; once is enough."""
        with self._changing:
            held, self.held_bytes = self.held_bytes, 0
        self._inflow.give_back(held)
