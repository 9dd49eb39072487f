"""A pack under staging/: fetched to a temporary file, and every instance in it proved before anything is written.

Nothing the gateway says is believed here but what was agreed in the offer: size and SHA-256 of the whole object and
the SHA-256 of each instance. Memory stays bounded: the pack is mapped from the file, whatever its size.
"""

import hashlib
import mmap
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from storage import dataset, packs, patients, sidecar
from storage.errors import DigestMismatchError, MalformedDataSetError
from storage.objects import Objects
from storage.packs import PackEntry
from storage.rows import Study
from storage.sidecar import InstanceSidecar
from storage.wire import PackPlan

_IDENTIFIERS = {"0020000D": "study_instance_uid", "00100020": "patient_id"}


@dataclass(frozen=True)
class FetchedPack:
    """A staged object in a temporary file, its size and digest being those of the plan."""

    file: BinaryIO
    view: memoryview


@dataclass(frozen=True, slots=True)
class VerifiedInstance:
    """One instance whose bytes were proved, and what was made of them."""

    entry: PackEntry
    sidecar: InstanceSidecar
    header_sha256: str
    pixel_sha256: str
    contradicts: str = ""  # the identity attribute in which the data set differs from the offer


@contextmanager
def fetched(objects: Objects, key: str, plan: PackPlan) -> Iterator[FetchedPack]:
    """Read a staged object once. Raises DigestMismatchError if it is not the planned one, ObjectMissingError."""
    size = objects.size(key)
    if size != plan.size_bytes:
        raise DigestMismatchError(f"The object has {size} bytes, {plan.size_bytes} were announced")
    with tempfile.TemporaryFile() as file:
        whole = hashlib.sha256()
        length = 0
        for block in objects.stream(key):
            length += len(block)
            if length > plan.size_bytes:  # PUT again while it was being read
                break
            whole.update(block)
            file.write(block)
        if length != plan.size_bytes or whole.hexdigest() != plan.sha256:
            raise DigestMismatchError("The object does not have the announced SHA-256")
        file.flush()
        # Not closed by hand: slices of it live as long as the errors and results that hold them.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        yield FetchedPack(file, view)


def verify(pack: FetchedPack, plan: PackPlan, study: Study) -> list[VerifiedInstance]:
    """Prove every instance of a fetched pack. Raises DigestMismatchError, MalformedDataSetError."""
    index = packs.index_of(pack.view)
    if index.study.study_instance_uid != study.study_instance_uid:
        raise DigestMismatchError("The pack's index names another study than the offer")
    if Counter(entry.facts.sha256 for entry in index.entries) != Counter(plan.digests):
        raise DigestMismatchError("The pack's index names other instances than the offer")
    limit = len(pack.view) - packs.TRAILER_BYTES
    return [_verify_one(pack.view, entry, limit, study) for entry in index.entries]


def _verify_one(view: memoryview, entry: PackEntry, limit: int, study: Study) -> VerifiedInstance:
    facts = entry.facts
    if entry.offset + entry.length > limit or entry.length != facts.size_bytes:
        raise MalformedDataSetError(f"Instance at byte {entry.offset} does not lie inside the pack")
    data = view[entry.offset : entry.offset + entry.length]
    if hashlib.sha256(data).hexdigest() != facts.sha256:
        raise DigestMismatchError(f"Instance at byte {entry.offset} does not have the announced SHA-256")
    try:
        header, pixels = split_digests(data, facts.transfer_syntax_uid)
        made = sidecar.build(data, facts, study.repaired_character_set)
        contradicts = _contradiction(made, study)
    except MalformedDataSetError as error:
        # The bytes are what the gateway received: they are kept, and the reason is shown beside them.
        header, pixels = hashlib.sha256(data).hexdigest(), hashlib.sha256().hexdigest()
        made = sidecar.minimal(facts, study.study_instance_uid, error.reason)
        contradicts = ""
    return VerifiedInstance(entry, made, header, pixels, contradicts)


def split_digests(data: memoryview, transfer_syntax_uid: str) -> tuple[str, str]:
    """SHA-256 of the data set before Pixel Data, and of the rest. Raises MalformedDataSetError."""
    layout = dataset.find_pixel_data(data, transfer_syntax_uid)
    cut = len(data) if layout.element_offset is None else layout.element_offset
    return hashlib.sha256(data[:cut]).hexdigest(), hashlib.sha256(data[cut:]).hexdigest()


def _contradiction(made: InstanceSidecar, study: Study) -> str:
    """Which identity attribute of the data set speaks against the offered study; text that is not ASCII is left to
    people, because gateway and centre may decode it differently. As `patients.same_patient`, but that what a data set
    does not say is no contradiction."""
    found = sidecar.text(made.metadata, "00080018", 64)
    if found and found != made.sop_instance_uid:
        return "sop_instance_uid"
    for tag, name in _IDENTIFIERS.items():
        said, offered = _values(made, tag), getattr(study, name).rstrip("\\ ")
        # The gateway carries a value as it was sent; DICOM JSON has it in parts (PS3.5 6.4: `\` separates values).
        comparable = any(said) and "".join(said).isascii() and offered.isascii()
        if comparable and said != [part.strip() for part in offered.split("\\")]:
            return name
    birth_date, sex = (sidecar.text(made.metadata, tag, 16) for tag in ("00100030", "00100040"))
    if contradicting := patients.contradicting_demographics(study, birth_date.replace(".", ""), sex):
        return contradicting
    name, offered = sidecar.text(made.metadata, "00100010", 512), study.patient_name.partition("=")[0]
    if not patients.names_somebody(study.patient_id) and name and name.isascii() and offered.isascii():
        return "" if patients.same_name(name, offered) else "patient_name"
    return ""


def _values(made: InstanceSidecar, tag: str) -> list[str]:
    """All values of an element as text, trimmed, without empty ones at the end."""
    values = ["" if part is None else str(part).strip() for part in made.metadata.get(tag, {}).get("Value", ())]
    while values and not values[-1]:
        values.pop()
    return values
