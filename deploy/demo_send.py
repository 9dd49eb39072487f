"""A modality for the demonstration: C-STORE until the gateway says Success, whatever happens to the gateway."""

import time
from collections.abc import Callable

from pynetdicom import AE, _config

from deploy.demo_studies import Prepared
from storage.errors import PermanentError, RetryableError

CALLING_AE_TITLE = "DEMO_CT"
_SUCCESS = 0x0000
_OUT_OF_RESOURCES = range(0xA700, 0xA800)  # PS3.4 Table B.2-1
_PAUSE_S = 0.5


def store(files: list[Prepared], host: str, port: int, called_ae_title: str) -> None:
    """One association, each file as it lies on disk. Raises RetryableError when the association ends early,
    PermanentError when the gateway refuses a file for good."""
    _config.STORE_SEND_CHUNKED_DATASET = True  # the bytes of the file, not a new encoding of it
    entity = AE(ae_title=CALLING_AE_TITLE)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 30
    for context in {(file.sop_class_uid, file.transfer_syntax_uid) for file in files}:
        entity.add_requested_context(*context)
    association = entity.associate(host, port, ae_title=called_ae_title)
    if not association.is_established:
        raise RetryableError("The gateway did not accept the association")
    try:
        for file in files:
            try:
                status = association.send_c_store(file.path)
            except RuntimeError as error:  # the association ended under us
                raise RetryableError(f"{file.label}: the association ended") from error
            code = status.get("Status") if status else None
            if code is None or code in _OUT_OF_RESOURCES:
                raise RetryableError(f"{file.label}: no Success yet")
            if code != _SUCCESS:
                raise PermanentError(f"{file.label}: status {code:04X} {status.get('ErrorComment', '')}")
    finally:
        if association.is_established:
            association.release()


def store_until_success(
    files: list[Prepared], host: str, port: int, called_ae_title: str, *, patience_s: float, say: Callable[[str], None]
) -> int:
    """Send all files; start again when the gateway went away, as a modality's send queue does. Returns the attempts.

    What was sent before is sent again: the gateway answers AlreadyStored, a Success.
    """
    deadline = time.monotonic() + patience_s
    attempts = 0
    while True:
        attempts += 1
        try:
            store(files, host, port, called_ae_title)
        except RetryableError as error:
            if time.monotonic() > deadline:
                raise
            say(f"  modality: {error.reason}; sending again")
            time.sleep(_PAUSE_S)
        else:
            return attempts
