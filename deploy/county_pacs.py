"""A small county PACS for demonstration and tests: a real Storage SCP that keeps what it receives and says so.

`python -m deploy.county_pacs --port N --ae-title COUNTYPACS --directory DIR`. Each object is on the disk (fsync,
rename, directory sync) before its C-STORE is answered with Success; one JSON line is printed for each, and one
`"action": "pacs.ready"` at the start with the port, so `--port 0` takes any free one. `--refuse` answers every C-STORE
with that status, and `--accept` names the SOP classes taken, to see what a gateway makes of it.
"""

import json
import re
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt

from storage.durable import write_durably

_CANNOT_UNDERSTAND = 0xC000  # PS3.4 Table B.2-1
_OUT_OF_RESOURCES = 0xA700
_VERIFICATION = "1.2.840.10008.1.1"
_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True, slots=True)
class CountyPacs:
    """What the handlers need."""

    directory: Path
    refuse: int | None

    def say(self, **words: object) -> None:
        """One JSON line on stdout. Identifiers only: no patient data in logs."""
        print(json.dumps(words), flush=True)

    def handle_store(self, event: evt.Event) -> int:
        """C-STORE: keep the data set as it came, then answer."""
        request: Any = event.request  # a C_STORE: the handler is bound to EVT_C_STORE
        uid = str(request.AffectedSOPInstanceUID)
        if self.refuse is not None:
            self.say(action="pacs.refused", sop_instance_uid=uid, status=f"{self.refuse:04X}")
            return self.refuse
        if not _UID.fullmatch(uid):  # it names a file here
            return _CANNOT_UNDERSTAND
        head = DicomBytesIO()
        head.is_little_endian, head.is_implicit_VR = True, False
        write_file_meta_info(head, event.file_meta)
        try:
            write_durably(
                self.directory / f"{uid}.dcm",
                b"\0" * 128 + b"DICM" + head.getvalue() + event.encoded_dataset(False),
                suffix=".part",
            )
        except OSError as error:
            self.say(action="pacs.disk", sop_instance_uid=uid, reason=error.strerror)
            return _OUT_OF_RESOURCES
        self.say(
            action="pacs.stored",
            sop_instance_uid=uid,
            sop_class=request.AffectedSOPClassUID.name,
            calling_ae_title=event.assoc.requestor.ae_title,
            path=f"{uid}.dcm",
        )
        return 0x0000


def main(
    directory: Annotated[Path, typer.Option(help="Folder that the objects go to")],
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    ae_title: Annotated[str, typer.Option(help="AE title; a call for another is rejected")] = "COUNTYPACS",
    refuse: Annotated[str, typer.Option(help="Answer each C-STORE with this status (hexadecimal)")] = "",
    accept: Annotated[list[str] | None, typer.Option(help="SOP Class UID to take; default: all of storage")] = None,
) -> None:
    """Be a PACS until SIGTERM."""
    directory.mkdir(parents=True, exist_ok=True)
    pacs = CountyPacs(directory, int(refuse, 16) if refuse else None)
    ae = AE(ae_title=ae_title)
    ae.require_called_aet = True
    ae.add_supported_context(_VERIFICATION)
    for sop_class in accept or [str(context.abstract_syntax) for context in AllStoragePresentationContexts]:
        ae.add_supported_context(sop_class, ALL_TRANSFER_SYNTAXES)
    server = ae.start_server((host, port), block=False, evt_handlers=[(evt.EVT_C_STORE, pacs.handle_store)])
    if server is None:
        sys.exit(1)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    pacs.say(action="pacs.ready", host=host, port=server.server_address[1], ae_title=ae_title)
    while not stop.wait(1.0):  # a wait without end can miss the signal in the main thread
        pass
    server.shutdown()


if __name__ == "__main__":
    typer.run(main)
