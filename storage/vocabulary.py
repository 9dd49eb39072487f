"""The words of the project, as enumerations: what a study, a case, a report can be, and who a person can be.

Pure: imported by the gateway and the centre alike. The PostgreSQL enumerations are made from these, and a test
compares the two.
"""

from enum import StrEnum


class StudyState(StrEnum):
    """Where a study stands in the archive."""

    RECEIVING = "receiving"  # instances are arriving; not all that the gateway announced are here
    COMPLETE = "complete"  # every announced instance is verified and archived
    HELD = "held"  # its identity is in doubt (PS3.3 C.7.1.1: two patients under one Study Instance UID)


class CaseState(StrEnum):
    """Where the reading of a study stands."""

    QUEUED = "queued"  # on the worklist, nobody's
    CLAIMED = "claimed"  # one reader holds the lease
    REPORTED = "reported"  # its report is signed
    SUSPENDED = "suspended"  # not to be read: the study is held


class ReportState(StrEnum):
    """Where a report stands on its way home."""

    DRAFT = "draft"
    SIGNED = "signed"  # PAdES signature made, objects stored under lock, on the county's feed
    RECEIVED = "received"  # the gateway has it, and the signature verified there
    DELIVERED = "delivered"  # the county PACS answered C-STORE with Success
    SUPERSEDED = "superseded"  # a later version was signed


class UploadState(StrEnum):
    """Where one pack of an offer stands."""

    OFFERED = "offered"  # a presigned PUT was handed out
    RECEIPTED = "receipted"  # bytes verified, archived, receipt signed
    REJECTED = "rejected"  # the bytes did not match; the gateway offers again


class TriageState(StrEnum):
    """What triage has to say about a case."""

    PENDING = "pending"  # a model is expected to answer before the deadline
    DONE = "done"
    NO_MODEL = "no_model"  # no model reads this kind of study
    NOT_FOR_MODEL = "not_for_model"  # a model was asked and the study is outside its evidence
    NOT_TRIAGED = "not_triaged"  # no answer by the deadline, or the model failed; a late answer may still come


class RunState(StrEnum):
    """Where one run of one model on one study stands."""

    PENDING = "pending"
    DONE = "done"
    UNSUITABLE = "unsuitable"
    FAILED = "failed"


class RunMode(StrEnum):
    """Whether a model's result may be seen and may move a case (design §6)."""

    ACTIVE = "active"
    SHADOW = "shadow"  # stored and compared, never shown, never moves a due time


class Priority(StrEnum):
    """Urgency of a case, most urgent first (HL7 table 0027 in DICOM's words)."""

    STAT = "stat"
    URGENT = "urgent"
    ROUTINE = "routine"


class Conclusion(StrEnum):
    """The coded conclusion of a report."""

    NEGATIVE = "negative"
    POSITIVE = "positive"
    CRITICAL = "critical"  # 危急值


class Role(StrEnum):
    """What a person may do."""

    RADIOGRAPHER = "radiographer"  # county: sends, follows
    CLINICIAN = "clinician"  # county: opens reports
    READER = "reader"  # centre: reads and signs
    QUALITY = "quality"  # centre: audits
    ADMINISTRATOR = "administrator"  # centre: enrols


class Lane(StrEnum):
    """Order on the uplink; a higher lane pre-empts at pack boundaries."""

    STAT = "stat"
    URGENT = "urgent"
    ROUTINE = "routine"
    BULK = "bulk"


class Codec(StrEnum):
    """How an instance rests in a pack."""

    RAW = "raw"  # the data set as received, byte for byte


COUNTY_ROLES = frozenset({Role.RADIOGRAPHER, Role.CLINICIAN})
CENTRE_ROLES = frozenset({Role.READER, Role.QUALITY, Role.ADMINISTRATOR})
