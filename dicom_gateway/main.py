"""The gateway's process: `python -m dicom_gateway.main`. SCP, uplink, returns, heartbeat and status in one.

Starts in the order in which parts need each other and stops in the reverse one: first nothing new comes in, then what
is under way ends, then the database closes. SIGTERM and SIGINT stop it with status 0; a setting that cannot be used
ends it at once with status 2 and one line that says which.
"""

import logging
import os
import signal
import threading

import structlog

from dicom_gateway.client import CentreClient
from dicom_gateway.heartbeat import HeartbeatLoop
from dicom_gateway.returns import ReportReturn
from dicom_gateway.scp import StorageScp
from dicom_gateway.settings import GatewaySettings, load
from dicom_gateway.spool import Spool
from dicom_gateway.status import StatusServer, status
from dicom_gateway.sweep import sweep
from dicom_gateway.uplink import Uplink
from storage import logs
from storage.errors import ConfigurationError, YuanzhenError
from storage.receipts import load_public_key

log = structlog.get_logger(__name__)

_JOIN_S = 10.0
_SIGNAL_S = 0.5
"""The kernel may give a signal to any thread; Python's handler runs when the main thread next wakes up."""


def keep_house(settings: GatewaySettings, spool: Spool, stop: threading.Event) -> None:
    """Body of a thread: free what has been kept long enough."""
    while not stop.is_set():
        try:
            while spool.free_kept() and not stop.is_set():
                pass
        except YuanzhenError as error:
            log.warning("spool.keep_failed", reason=error.reason)
        except Exception:  # the edge of the thread
            log.exception("spool.keep_error")
        stop.wait(settings.keep_check_s)


def run(settings: GatewaySettings, stop: threading.Event) -> None:
    """Be a gateway until `stop` is set. Raises ConfigurationError, or OSError for a port that is taken."""
    receipt_key = load_public_key(settings.receipt_public_key_file.read_bytes())
    client = CentreClient(settings)
    spool = Spool(settings)
    sweep(spool)
    scp = StorageScp(settings, spool)
    uplink = Uplink(settings, spool, client, receipt_key)
    heartbeat = HeartbeatLoop(settings, spool, client)
    returns = ReportReturn(settings, spool, client)
    threads = [
        threading.Thread(target=heartbeat.run, args=(stop,), name="heartbeat", daemon=True),
        threading.Thread(target=returns.run, args=(stop,), name="returns", daemon=True),
        threading.Thread(target=keep_house, args=(settings, spool, stop), name="housekeeper", daemon=True),
    ]
    local = StatusServer(settings.status_port, lambda: status(settings, spool, scp, heartbeat), uplink.retry_now)
    port = scp.start()
    uplink.start()
    for thread in threads:
        thread.start()
    log.info(
        "gateway.ready", site=settings.site, ae_title=settings.ae_title, host=settings.host, port=port,
        status_port=local.port,
    )  # fmt: skip
    while not stop.wait(_SIGNAL_S):
        pass
    log.info("gateway.stopping")
    scp.stop()
    uplink.stop(_JOIN_S)
    client.close()  # ends the long poll of the report feed
    for thread in threads:
        thread.join(_JOIN_S)
    local.close()
    spool.close()
    log.info("gateway.stopped")


def main() -> int:
    """Entry point. Returns the exit status."""
    os.umask(0o077)  # whatever it writes is patient data
    logs.configure("gateway")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs presigned URLs
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(load(), stop)
    except ConfigurationError as error:
        log.error("gateway.misconfigured", reason=error.reason)
        return 2
    except OSError as error:
        log.error("gateway.cannot_start", reason=str(error))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
