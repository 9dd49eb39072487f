"""Tells the centre how the gateway is, and how far the two clocks are apart (design §9)."""

import threading
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version

import structlog

from dicom_gateway.client import CentreClient
from dicom_gateway.quarantine import now, open_count
from dicom_gateway.settings import GatewaySettings
from dicom_gateway.spool import Spool
from storage.errors import YuanzhenError
from storage.wire import Heartbeat

log = structlog.get_logger(__name__)


def gateway_version() -> str:
    """Of the installed package; a checkout that is not installed says so."""
    try:
        return version("yuanzhen")
    except PackageNotFoundError:
        return "uninstalled"


class HeartbeatLoop:
    """`run` is the body of a thread. `last_contact`, `clock_offset` and `error` are for the status page."""

    def __init__(self, settings: GatewaySettings, spool: Spool, client: CentreClient) -> None:
        self._settings = settings
        self._spool = spool
        self._client = client
        self.last_contact: datetime | None = None
        self.clock_offset: timedelta | None = None  # centre's clock less ours
        self.error = ""

    def run(self, stop: threading.Event) -> None:
        """Beat until `stop`. One missed beat needs no retry of its own: the next one comes."""
        while not stop.is_set():
            try:
                self._beat()
            except YuanzhenError as error:
                if not self.error:
                    log.warning("heartbeat.failed", reason=error.reason)
                self.error = error.reason
            except Exception:  # the edge of the thread
                log.exception("heartbeat.error")
                self.error = "Internal error, see the gateway's log"
            stop.wait(self._settings.heartbeat_s)

    def _beat(self) -> None:
        backlog = self._spool.backlog()
        sent_at = now()
        answer = self._client.heartbeat(
            Heartbeat(
                version=gateway_version(),
                sent_at=sent_at,
                unsent_instances=backlog.instances,
                unsent_bytes=backlog.size_bytes,
                oldest_unsent_at=backlog.oldest_at,
                quarantined=open_count(self._spool.ledger),
                free_disk_bytes=self._spool.free_disk_bytes,
                out_of_space=self._spool.out_of_space,
            )
        )
        answered_at = now()
        self.clock_offset = answer.centre_time - (sent_at + (answered_at - sent_at) / 2)
        self.last_contact, self.error = answered_at, ""
