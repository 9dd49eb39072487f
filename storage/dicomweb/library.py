"""What the DICOMweb side reads: rows say where an instance lies, sidecars what is in it, range reads give its bytes.

Nothing here parses DICOM: that was done once, on arrival. Sidecars are kept in memory, least recently used out first;
they never change, for a pack is written once. Bytes read in ranges are not hashed (a digest covers the whole instance);
`whole` reads all of it and checks.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage import dataset
from storage.dicomweb.extents import Extents
from storage.errors import DigestMismatchError, MalformedDataSetError, NotFoundError
from storage.objects import Objects
from storage.rows import Instance, Pack, Series, Site, Study
from storage.sidecar import InstanceSidecar, read_sidecar

MAX_CACHED_INSTANCES = 4000
"""About 40 kB each as Python objects: at most 160 MB in a web process, some six large CT studies at once."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What one caller may see under one DICOMweb root: decided by the caller, obeyed by every query here."""

    study_ids: tuple[int, ...]
    root: str  # path of the root, without a slash at its end: /cases/7/dicomweb


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """One instance's row: identity, and where its bytes lie."""

    site_code: str
    patient_id: str
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    sha256: bytes
    pack_key: str
    sidecar_key: str
    offset: int
    length: int

    def path(self, root: str) -> str:
        """Its address under a DICOMweb root."""
        return (
            f"{root}/studies/{self.study_instance_uid}/series/{self.series_instance_uid}"
            f"/instances/{self.sop_instance_uid}"
        )


def public_patient_id(site_code: str, patient_id: str) -> str:
    """Patient ID as the viewer sees it. `1001` exists in every hospital; the viewer asks for priors by it alone."""
    return f"{site_code}:{patient_id}"


def find_instances(
    session: Session,
    scope: Scope,
    study_instance_uid: str,
    series_instance_uid: str | None = None,
    sop_instance_uid: str | None = None,
) -> list[StoredInstance]:
    """Instances of a study, series or one instance, by series and instance number; variants are left out.

    Raises NotFoundError if there is none in the scope.
    """
    statement = (
        sa.select(
            Site.code.label("site_code"),
            Study.patient_id,
            Study.study_instance_uid,
            Series.series_instance_uid,
            Instance.sop_instance_uid,
            Instance.sop_class_uid,
            Instance.transfer_syntax_uid,
            Instance.sha256,
            Pack.pack_key,
            Pack.sidecar_key,
            Instance.pack_offset.label("offset"),
            Instance.pack_length.label("length"),
        )
        .join(Study, Study.id == Instance.study_id)
        .join(Site, Site.site_id == Study.site_id)
        .join(Series, Series.id == Instance.series_id)
        .join(Pack, Pack.id == Instance.pack_id)
        .where(
            Study.id.in_(scope.study_ids),
            Study.study_instance_uid == study_instance_uid,
            Instance.is_variant.is_(False),
        )
        .order_by(Series.series_number, Series.id, Instance.instance_number, Instance.id)
    )
    if series_instance_uid is not None:
        statement = statement.where(Series.series_instance_uid == series_instance_uid)
    if sop_instance_uid is not None:
        statement = statement.where(Instance.sop_instance_uid == sop_instance_uid)
    found = [StoredInstance(**row) for row in session.execute(statement).mappings()]
    if not found:
        raise NotFoundError("No such study, series or instance here")
    return found


class Library:
    """Reads sidecars and bytes of instances. Thread-safe; one per process."""

    def __init__(self, objects: Objects, *, max_cached_instances: int = MAX_CACHED_INSTANCES) -> None:
        self._objects = objects
        self._limit = max_cached_instances
        self._lock = threading.Lock()
        self._cached: OrderedDict[str, dict[tuple[str, str], InstanceSidecar]] = OrderedDict()

    def sidecar(self, stored: StoredInstance) -> InstanceSidecar:
        """The sidecar of an instance. Raises ObjectStoreError, ObjectMissingError, MalformedDataSetError."""
        instances = self._pack(stored.sidecar_key)
        try:
            return instances[stored.sop_instance_uid, stored.sha256.hex()]
        except KeyError as error:
            raise MalformedDataSetError(f"Sidecar {stored.sidecar_key} lacks an instance of its pack") from error

    def _pack(self, key: str) -> dict[tuple[str, str], InstanceSidecar]:
        with self._lock:
            if (known := self._cached.get(key)) is not None:
                self._cached.move_to_end(key)
                return known
        # Outside the lock: two readers of one pack may both read it, which is harmless; waiting for S3 would not be.
        sidecar = read_sidecar(self._objects.get(key))
        instances = {(one.sop_instance_uid, one.sha256): one for one in sidecar.instances}
        with self._lock:
            self._cached[key] = instances
            while len(self._cached) > 1 and sum(map(len, self._cached.values())) > self._limit:
                self._cached.popitem(last=False)
        return instances

    def whole(self, stored: StoredInstance) -> bytes:
        """The data set as received, checked. Raises DigestMismatchError and what `Objects.get` raises."""
        data = self._objects.get(stored.pack_key, offset=stored.offset, length=stored.length) if stored.length else b""
        if hashlib.sha256(data).digest() != stored.sha256:
            raise DigestMismatchError(f"An instance in {stored.pack_key} no longer has the digest it was received with")
        return data

    def extents(self, stored: StoredInstance, extents: Sequence[tuple[int, int]]) -> Extents:
        """A reader of those (offset, length) of an instance, as its sidecar counts them.

        Raises MalformedDataSetError if one lies outside the instance.
        """
        if stored.transfer_syntax_uid in dataset.DEFLATED_SYNTAXES:
            inflated = dataset.inflate(self.whole(stored))  # its offsets count in the inflated data set
            return Extents(lambda offset, length: inflated[offset : offset + length], extents, len(inflated))

        def read(offset: int, length: int) -> bytes:
            return self._objects.get(stored.pack_key, offset=stored.offset + offset, length=length)

        return Extents(read, extents, stored.length)
