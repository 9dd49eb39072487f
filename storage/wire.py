"""The wire contract between gateway and centre: every message, once, for both sides (design §5).

The gateway is always the client, over HTTPS with a client certificate that names its site. Order of a study's way up:

    POST /gateway/v1/offer      Offer      -> OfferAnswer    what the centre lacks, and a presigned PUT for each pack
    PUT  <presigned URL>        pack bytes                   straight to the object store, under staging/
    POST /gateway/v1/commit     Commit     -> CommitAnswer   verified and receipted, or why not
    POST /gateway/v1/inventory  Inventory  -> InventoryAnswer all instances of a study that went quiet: completeness
    POST /gateway/v1/heartbeat  Heartbeat  -> HeartbeatAnswer
    GET  /gateway/v1/feed?cursor=N&wait_s=25  -> Feed        signed reports going home, long poll
    GET  /gateway/v1/reports/{report_id}/{kind}              kind: pdf | encapsulated | sr
    POST /gateway/v1/acknowledge Acknowledge -> AcknowledgeAnswer

Fields of later depth (lanes, codecs, extents) are here from the start, so the shape need not change for them.
Unknown fields are ignored on reading, so a centre one version ahead can speak to an older gateway.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.vocabulary import Codec, Lane, Priority

WIRE_VERSION = 1
MAX_INSTANCES_PER_OFFER = 5000
MAX_PACK_BYTES = 16 * 1024 * 1024
"""Aim of a pack's size. One instance larger than this travels alone in a larger pack (extents: the uplink issue)."""
MAX_OBJECT_BYTES = 4 * 1024**3
FEED_WAIT_MAX_S = 25
"""Carrier NAT forgets an idle connection after about 30 s."""

Uid = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=64)]
"""PS3.5 9.1, but that leading zeros of a component are let through: they are out there."""
Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Message(BaseModel):
    """Base of all messages: immutable, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StudyFacts(Message):
    """What the gateway knows of a study; identity as the county sent it, text already decoded to Unicode."""

    study_instance_uid: Uid
    patient_id: str = Field(default="", max_length=256)
    issuer_of_patient_id: str = Field(default="", max_length=256)
    patient_name: str = Field(default="", max_length=512)  # decoded, PN groups kept: "Wang^Xiao=王^小"
    patient_birth_date: str = Field(default="", max_length=8)  # DA
    patient_sex: str = Field(default="", max_length=16)  # CS
    patient_age: str = Field(default="", max_length=4)  # AS, e.g. 004Y
    accession_number: str = Field(default="", max_length=64)
    study_date: str = Field(default="", max_length=8)  # DA
    study_time: str = Field(default="", max_length=16)  # TM
    study_description: str = Field(default="", max_length=256)
    specific_character_set: str = Field(default="", max_length=128)  # as sent
    repaired_character_set: str = Field(default="", max_length=32)  # the one that was used, if another
    calling_ae_title: str = Field(default="", max_length=16)
    called_ae_title: str = Field(default="", max_length=16)
    priority: Priority = Priority.ROUTINE
    clinical_question: str = Field(default="", max_length=2000)
    acquired_at: datetime | None = None  # modality's clock
    first_received_at: datetime  # gateway's clock, C-STORE of the first instance: the reading clock starts here


class InstanceFacts(Message):
    """One instance as received: the identity of its bytes."""

    sop_instance_uid: Uid
    sop_class_uid: Uid
    series_instance_uid: Uid
    transfer_syntax_uid: Uid
    sha256: Sha256Hex  # of the data set as received (no file meta information)
    size_bytes: int = Field(ge=0, le=MAX_OBJECT_BYTES)
    header_sha256: Sha256Hex  # of the data set before the PixelData element
    pixel_sha256: Sha256Hex  # of the rest
    received_at: datetime


class PackPlan(Message):
    """One object to be PUT: which instances it carries and the digest of the whole object."""

    pack_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    size_bytes: int = Field(gt=0, le=MAX_OBJECT_BYTES)
    sha256: Sha256Hex
    digests: tuple[Sha256Hex, ...] = Field(min_length=1, max_length=MAX_INSTANCES_PER_OFFER)
    codec: Codec = Codec.RAW


class Offer(Message):
    """A study (or some of it) that the gateway has and wants archived."""

    wire_version: int = WIRE_VERSION
    lane: Lane = Lane.ROUTINE
    study: StudyFacts
    instances: tuple[InstanceFacts, ...] = Field(min_length=1, max_length=MAX_INSTANCES_PER_OFFER)
    packs: tuple[PackPlan, ...] = Field(min_length=1)


class PutOrder(Message):
    """Where to PUT one pack. The URL is good for that key, that site and a short time."""

    pack_id: str
    url: str
    headers: dict[str, str] = Field(default_factory=dict)
    expires_at: datetime


class OfferAnswer(Message):
    """What the centre lacks; packs whose instances are all archived already come with their receipt instead."""

    puts: tuple[PutOrder, ...] = ()
    receipts: tuple["Receipt", ...] = ()


class Commit(Message):
    """The pack was PUT: verify it, archive it, sign for it."""

    study_instance_uid: Uid
    pack_id: str


class ReceiptLine(Message):
    """One instance the centre answers for."""

    sop_instance_uid: Uid
    sha256: Sha256Hex


class Receipt(Message):
    """Signed by the centre (Ed25519): only this lets the gateway free an instance (design §4.4)."""

    site: str
    pack_id: str
    instances: tuple[ReceiptLine, ...]
    archived_at: datetime
    key_id: str
    signature: str = ""  # base64, over storage.receipts.canonical(receipt)


class CommitAnswer(Message):
    """`verifying`: ask again after `retry_after_s`. `rejected`: offer the pack again; `reason` says why."""

    status: Literal["receipted", "verifying", "rejected"]
    receipt: Receipt | None = None
    reason: str = ""
    retry_after_s: float = 1.0


class Inventory(Message):
    """All instances the gateway received for a study that has gone quiet; sent again if more arrive."""

    study_instance_uid: Uid
    # As in the StudyFacts that were offered: two patients under one Study Instance UID are two studies.
    patient_id: str = ""
    issuer_of_patient_id: str = ""
    patient_name: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    instances: tuple[ReceiptLine, ...] = Field(max_length=100_000)
    quiet_since: datetime


class InventoryAnswer(Message):
    """`missing`: announced and not archived; the gateway offers them again."""

    complete: bool
    missing: tuple[ReceiptLine, ...] = ()


class Heartbeat(Message):
    """The gateway's state of health."""

    version: str
    sent_at: datetime  # gateway's clock
    unsent_instances: int
    unsent_bytes: int
    oldest_unsent_at: datetime | None = None
    quarantined: int = 0
    free_disk_bytes: int
    out_of_space: bool = False


class HeartbeatAnswer(Message):
    """The centre's clock, for the offset."""

    centre_time: datetime


class FeedItem(Message):
    """One signed report going home."""

    cursor: int
    report_id: int
    study_instance_uid: Uid
    accession_number: str
    patient_id: str
    version: int
    signed_at: datetime
    pdf_sha256: Sha256Hex
    encapsulated_sha256: Sha256Hex
    sr_sha256: Sha256Hex
    critical: bool = False


class Feed(Message):
    """Reports after the cursor, oldest first; `cursor` to ask with next."""

    items: tuple[FeedItem, ...] = ()
    cursor: int


class Acknowledge(Message):
    """A step of a report at the county."""

    report_id: int
    step: Literal["received", "delivered", "failed", "opened"]
    at: datetime
    detail: str = Field(default="", max_length=500)


class AcknowledgeAnswer(Message):
    """Idempotent: the same step again is fine."""

    recorded: bool


class Problem(Message):
    """RFC 9457 problem details, the body of every error answer."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = ""


OfferAnswer.model_rebuild()
