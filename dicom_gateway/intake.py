"""From the bytes of one C-STORE to a kept instance: check, read the identity, digest, store. Nothing is re-encoded."""

import hashlib
from dataclasses import dataclass
from datetime import datetime

from dicom_gateway.enrol import StoreOutcome
from dicom_gateway.identity import identify
from dicom_gateway.spool import Spool
from storage.dataset import Data, find_pixel_data
from storage.errors import MalformedDataSetError
from storage.wire import MAX_OBJECT_BYTES, InstanceFacts


class DataSetMismatchError(MalformedDataSetError):
    """The data set is not what the C-STORE request announced (C-STORE A900)."""


@dataclass(frozen=True)
class Arrival:
    """One C-STORE request: the data set as it was encoded, and what was said beside it."""

    data: Data
    transfer_syntax_uid: str
    sop_class_uid: str  # Affected SOP Class UID of the command
    sop_instance_uid: str
    calling_ae_title: str
    called_ae_title: str
    received_at: datetime


def receive(spool: Spool, arrival: Arrival) -> StoreOutcome:
    """Keep an arrival durably. Raises MalformedDataSetError, DataSetMismatchError, OutOfSpaceError, RetryableError."""
    data = arrival.data
    if len(data) > MAX_OBJECT_BYTES:
        raise MalformedDataSetError(f"{len(data)} bytes, the largest object is {MAX_OBJECT_BYTES}")
    layout = find_pixel_data(data, arrival.transfer_syntax_uid)
    identity = identify(
        data,
        arrival.transfer_syntax_uid,
        calling_ae_title=arrival.calling_ae_title,
        called_ae_title=arrival.called_ae_title,
        received_at=arrival.received_at,
        zone=spool.zone,
    )
    # PS3.4 B.2.3: A900, the data set does not match the SOP Class; nor may it be another instance.
    for what, announced, found in (
        ("SOPClassUID", arrival.sop_class_uid, identity.sop_class_uid),
        ("SOPInstanceUID", arrival.sop_instance_uid, identity.sop_instance_uid),
    ):
        if announced != found:
            raise DataSetMismatchError(f"{what} is not the one announced")
    view = memoryview(data)
    header_bytes = len(view) if layout.element_offset is None else layout.element_offset
    whole, pixels = hashlib.sha256(view[:header_bytes]), hashlib.sha256(view[header_bytes:])
    header_sha256 = whole.hexdigest()
    whole.update(view[header_bytes:])
    instance = InstanceFacts(
        sop_instance_uid=identity.sop_instance_uid,
        sop_class_uid=identity.sop_class_uid,
        series_instance_uid=identity.series_instance_uid,
        transfer_syntax_uid=arrival.transfer_syntax_uid,
        sha256=whole.hexdigest(),
        size_bytes=len(view),
        header_sha256=header_sha256,
        pixel_sha256=pixels.hexdigest(),
        received_at=arrival.received_at,
    )
    return spool.store(identity.study, instance, data)
