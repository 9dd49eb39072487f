"""Peers of the report return: a centre that has signed reports to give, and the simulated county PACS as a process."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deploy.pki import Pki
from storage import wire
from tests.gateway_kit import ROOT, free_port, until
from tests.scripted_centre import ScriptedCentre


class ReportCentre(ScriptedCentre):
    """Adds feed, reports and acknowledge to the scripted centre; its faults work on them too."""

    def __init__(self, pki: Pki, site: str) -> None:
        self.items: list[wire.FeedItem] = []
        self.objects: dict[tuple[int, str], bytes] = {}
        self.acknowledged: list[wire.Acknowledge] = []
        self.cursors: list[int] = []
        self._published = threading.Condition()
        self._closing = False
        super().__init__(pki, site)

    def publish(self, item: wire.FeedItem, pdf: bytes, encapsulated: bytes, sr: bytes) -> wire.FeedItem:
        """Put a report on the feed. The digests are made here, the cursor too."""
        with self._published:
            digests = {
                f"{kind}_sha256": hashlib.sha256(content).hexdigest()
                for kind, content in (("pdf", pdf), ("encapsulated", encapsulated), ("sr", sr))
            }
            placed = item.model_copy(update={"cursor": len(self.items) + 1, **digests})
            self.items.append(placed)
            self.objects |= {
                (item.report_id, "pdf"): pdf,
                (item.report_id, "encapsulated"): encapsulated,
                (item.report_id, "sr"): sr,
            }
            self._published.notify_all()
        return placed

    def steps(self, report_id: int) -> list[str]:
        return [message.step for message in list(self.acknowledged) if message.report_id == report_id]

    def close(self) -> None:
        with self._published:
            self._closing = True
            self._published.notify_all()
        super().close()

    def _serve(self, handler: Any, body: bytes) -> None:
        split = urlsplit(handler.path)
        endpoint, *rest = split.path.removeprefix("/gateway/v1/").split("/")
        with self.lock:
            fault = self.faults[endpoint].popleft() if self.faults[endpoint] else self.always.get(endpoint)
        if endpoint not in ("feed", "reports", "acknowledge") or fault is not None:
            if fault is not None:
                self.faults[endpoint].appendleft(fault)
            return super()._serve(handler, body)
        self.calls.append(endpoint)
        if endpoint == "reports":
            return self._answer(handler, 200, self.objects[int(rest[0]), rest[1]])
        if endpoint == "acknowledge":
            self.acknowledged.append(wire.Acknowledge.model_validate_json(body))
            return self._answer(handler, 200, wire.AcknowledgeAnswer(recorded=True).model_dump_json().encode())
        query = parse_qs(split.query)
        answer = self._read_feed(int(query["cursor"][0]), float(query["wait_s"][0]))
        return self._answer(handler, 200, answer.model_dump_json().encode())

    def _read_feed(self, cursor: int, wait_s: float) -> wire.Feed:
        with self._published:
            self.cursors.append(cursor)
            self._published.wait_for(lambda: len(self.items) > cursor or self._closing, wait_s)
            return wire.Feed(items=tuple(self.items[cursor:]), cursor=len(self.items))


class PacsProcess:
    """The county PACS. `stored` are the lines it printed for what it keeps."""

    def __init__(self, directory: Path, port: int, *options: str) -> None:
        self.directory = directory
        self.lines: list[dict[str, Any]] = []
        arguments = ["--directory", str(directory), "--port", str(port), *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.county_pacs", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(until(lambda: self.said("pacs.ready"), "county PACS ready")[0]["port"])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def said(self, action: str) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if line["action"] == action]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        self._reader.join()
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def county_pacs(directory: Path, *options: str, port: int | None = None) -> Iterator[PacsProcess]:
    pacs = PacsProcess(directory, port or free_port(), *options)
    try:
        yield pacs
    finally:
        pacs.stop()
