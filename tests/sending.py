"""Senders in a process of their own: `python -W ignore -m tests.sending PORT_FILE ACKNOWLEDGED_FILE FOLDER…`.

One thread a folder sends its files in order to the port that is in PORT_FILE just now, and goes on with the next
association after each cut. Each Success is a line "SOP Instance UID, SHA-256 of the data set" in ACKNOWLEDGED_FILE,
written before the next file is sent. A process of its own, because pynetdicom leaves sockets open when nobody answers.
"""

import hashlib
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from pydicom.filereader import dcmread
from pynetdicom import AE, build_context
from pynetdicom.sop_class import CTImageStorage

from tests.gateway_kit import data_set_of


def send(folder: Path, port_file: Path, acknowledged: TextIO, writing: threading.Lock) -> None:
    entity = AE(ae_title="CT1")
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 5
    entity.connection_timeout = 2
    waiting = [(dcmread(path), data_set_of(path)[1]) for path in sorted(folder.iterdir())]
    while waiting:
        association = entity.associate(
            "127.0.0.1",
            int(port_file.read_text()),
            [build_context(CTImageStorage, "1.2.840.10008.1.2.1")],
            ae_title="YUANZHEN",
        )
        while association.is_established and waiting:
            data_set, data = waiting[0]
            try:
                status = association.send_c_store(data_set)
            except RuntimeError:
                break
            if "Status" not in status:
                break
            if status.Status == 0x0000:
                with writing:
                    acknowledged.write(f"{data_set.SOPInstanceUID} {hashlib.sha256(data).hexdigest()}\n")
                    acknowledged.flush()
                waiting.pop(0)
        if association.is_established:
            association.release()
        else:
            time.sleep(0.02)  # nobody listens now


def main(port_file: str, acknowledged_file: str, *folders: str) -> None:
    writing = threading.Lock()
    with Path(acknowledged_file).open("w") as acknowledged:
        threads = [
            threading.Thread(target=send, args=(Path(folder), Path(port_file), acknowledged, writing))
            for folder in folders
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
