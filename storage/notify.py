"""Wake-ups inside the centre: one LISTEN connection per process, fanned out to whoever waits (feed, worklist, clock).

Only a hint that something changed: the waiter reads the truth from its tables, and must also look by itself now and
then, because a notification is lost when the connection is.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import structlog

_LOG = structlog.get_logger()
_RECONNECT_S = 1.0


class Hub:
    """Give each waiter its own event; set them all when a matching notification comes."""

    def __init__(self, dsn: str, channels: tuple[str, ...]) -> None:
        self._dsn = dsn
        self._channels = channels
        self._waiters: dict[asyncio.Event, str] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """Stop listening and wake everybody, so that long polls end."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._wake("")

    @contextlib.asynccontextmanager
    async def waiter(self, prefix: str = "") -> AsyncIterator[asyncio.Event]:
        """An event that is set when a payload starting with `prefix` arrives; clear() it before looking."""
        event = asyncio.Event()
        self._waiters[event] = prefix
        try:
            yield event
        finally:
            del self._waiters[event]

    def _wake(self, payload: str) -> None:
        for event, prefix in list(self._waiters.items()):
            if not payload or payload.startswith(prefix):
                event.set()

    async def _listen(self) -> None:
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as connection:
                    for channel in self._channels:
                        await connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
                    self._wake("")  # whatever was missed while disconnected
                    async for notification in connection.notifies():
                        self._wake(notification.payload)
            except psycopg.Error as error:
                _LOG.warning("notify.reconnect", error=type(error).__name__)
            await asyncio.sleep(_RECONNECT_S)
