"""A small JSON status on loopback, for the person at the county and for the pages made from it later.

GET /status: what waits, what needs a person and why, the disk, the last contact, and each recent study.
POST /retry: try now what waits for its time. Names and birth dates of patients are not in it.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dicom_gateway.heartbeat import HeartbeatLoop, gateway_version
from dicom_gateway.scp import StorageScp
from dicom_gateway.settings import GatewaySettings
from dicom_gateway.spool import Spool

_RECENT_STUDIES = 200
_RECENT_QUARANTINE = 200

_STUDIES = """
    SELECT s.study_instance_uid, s.lane, s.first_received_at, s.complete_at, count(i.id) AS received,
        count(i.archived_at) AS archived, sum(i.variant) AS variants,
        (SELECT r.state FROM report_delivery r WHERE r.study_instance_uid = s.study_instance_uid
            ORDER BY r.cursor DESC LIMIT 1) AS report_state
    FROM (SELECT * FROM study ORDER BY last_received_at_s DESC LIMIT ?) s JOIN instance i ON i.study_id = s.id
    GROUP BY s.id ORDER BY s.last_received_at_s DESC
"""
_QUARANTINE = """
    SELECT kind, subject, reason, times, calling_ae_title, size_bytes, first_at, last_at FROM quarantine
    WHERE resolved_at IS NULL ORDER BY last_at DESC LIMIT ?
"""


def status(settings: GatewaySettings, spool: Spool, scp: StorageScp, heartbeat: HeartbeatLoop) -> dict[str, Any]:
    """The whole status as plain values."""
    backlog = spool.backlog()
    offset = heartbeat.clock_offset
    return {
        "site": settings.site,
        "name": settings.name,
        "version": gateway_version(),
        "backlog": {
            "instances": backlog.instances,
            "bytes": backlog.size_bytes,
            "oldest_at": backlog.oldest_at.isoformat() if backlog.oldest_at else None,
        },
        "disk": {
            "free_bytes": spool.free_disk_bytes,
            "watermark_bytes": settings.free_disk_watermark_bytes,
            "out_of_space": spool.out_of_space,
        },
        "centre": {
            "last_contact": heartbeat.last_contact.isoformat() if heartbeat.last_contact else None,
            "clock_offset_s": round(offset.total_seconds(), 3) if offset is not None else None,
            "error": heartbeat.error,
        },
        "dicom": dict(scp.counts),
        "packs": [
            dict(row)
            for row in spool.ledger.rows(
                "SELECT pack_id, state, size_bytes, tries, last_error FROM pack WHERE state <> 'receipted'"
                " ORDER BY planned_at_s LIMIT 100"
            )
        ],
        "quarantine": [dict(row) for row in spool.ledger.rows(_QUARANTINE, _RECENT_QUARANTINE)],
        "studies": [dict(row) for row in spool.ledger.rows(_STUDIES, _RECENT_STUDIES)],
    }


class StatusServer:
    """Serves `read` on 127.0.0.1 until `close()`; `retry` is what POST /retry does."""

    def __init__(self, port: int, read: Callable[[], dict[str, Any]], retry: Callable[[], None]) -> None:
        """Raises OSError if the port is taken."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/status":
                    self._answer(200, read())
                else:
                    self._answer(404, {"title": "Not Found", "status": 404})

            def do_POST(self) -> None:
                if self.path == "/retry":
                    retry()
                    self._answer(202, {"accepted": True})
                else:
                    self._answer(404, {"title": "Not Found", "status": 404})

            def _answer(self, code: int, content: dict[str, Any]) -> None:
                body = json.dumps(content, ensure_ascii=False).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the log has actions, not requests."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
