"""Settings of one gateway: read once from the environment (prefix YUANZHEN_GATEWAY_), checked, then frozen."""

from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from storage.errors import ConfigurationError

AeTitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[\x21-\x5b\x5d-\x7e][\x20-\x5b\x5d-\x7e]*$")]
"""PS3.5 Table 6.2-1: at most 16 characters, no backslash, no control character, not all spaces."""


class GatewaySettings(BaseSettings):
    """What differs between two gateways. Units are in the names; the reason stands behind each default."""

    model_config = SettingsConfigDict(env_prefix="YUANZHEN_GATEWAY_", frozen=True, extra="ignore")

    site: str = Field(min_length=1, max_length=32)  # the site's code, as in its certificate and on its receipts
    name: str = ""  # shown to people
    timezone: str = "Asia/Shanghai"  # of the modalities' clocks, where a data set has no offset from UTC itself
    spool_dir: Path  # on a disk that survives a power cut; everything the gateway knows is below it

    # DICOM, from the hospital's side.
    ae_title: AeTitle = "YUANZHEN"  # called AE title; an association for any other is rejected
    host: str = "127.0.0.1"  # the LAN address is a decision of the person who installs
    port: int = Field(default=11112, ge=0, le=65535)  # 0: any free one, named in the ready line
    allowed_ae_titles: tuple[AeTitle, ...] = ()  # empty: any calling AE title
    maximum_associations: int = Field(default=32, ge=1)  # a thread pair each; a CT opens one or two
    maximum_pdu_bytes: int = Field(default=262_144, ge=4096)  # fewer, larger PDUs: Python pays for each
    network_timeout_s: float = Field(default=60.0, gt=0)  # a peer silent this long between messages is gone
    dimse_timeout_s: float = Field(default=60.0, gt=0)  # a message begun and not finished
    acse_timeout_s: float = Field(default=5.0, gt=0)  # a connection that never asks for an association
    receive_memory_bytes: int = Field(default=1024**3, gt=0)  # all data sets under way; one may have half of it

    # The centre.
    centre_url: str  # https://host:port
    centre_proxy: str | None = None  # http://host:port, where the county has no other way out
    ca_file: Path  # who may have signed the centre's certificate
    cert_file: Path  # the gateway's own, which names its site
    key_file: Path  # of cert_file
    receipt_public_key_file: Path  # Ed25519: only its receipts free an instance
    report_ca_file: Path | None = None  # who may have issued the report signers' certificates
    connect_timeout_s: float = Field(default=10.0, gt=0)  # then the next try, after a pause
    request_timeout_s: float = Field(default=30.0, gt=0)  # silence on a connection, not the length of a transfer

    # The local PACS that reports go home to.
    pacs_host: str | None = None  # none: reports are received and not delivered
    pacs_port: int = Field(default=104, ge=1, le=65535)  # as the PACS listens
    pacs_ae_title: AeTitle = "PACS"  # as the PACS calls itself
    pacs_character_set: Literal["GB18030", "ISO_IR 192"] = "GB18030"  # what most county PACS read

    # Spool.
    free_disk_watermark_bytes: int = Field(default=2 * 1024**3, ge=0)  # room for packs, SQLite and the system
    refused_keep_bytes: int = Field(default=2 * 1024**3, ge=0)  # of refused data sets, for a person to look at
    keep_days: float = Field(default=7.0, ge=0)  # after the receipt; reconcile repairs the centre from here
    keep_check_s: float = Field(default=3600.0, gt=0)  # how often what may be freed is freed

    # Uplink.
    gather_s: float = Field(default=1.0, ge=0)  # a series idle this long is packed as it is
    quiet_s: float = Field(default=10.0, ge=0)  # a study idle this long is announced as whole
    uplink_threads: int = Field(default=3, ge=1, le=16)  # packs under way at once; hides the link's round trip
    retry_base_s: float = Field(default=0.5, gt=0)  # the first pause is at most this, each next up to twice the last
    retry_ceiling_s: float = Field(default=60.0, gt=0)  # the first try after a long outage comes within a minute
    refused_retry_s: float = Field(default=3600.0, gt=0)  # a refusal is asked again in case the centre changed its mind
    heartbeat_s: float = Field(default=30.0, gt=0)  # well below what the centre calls silence

    # Local status, loopback only.
    status_port: int = Field(default=0, ge=0, le=65535)  # 0: any free one, named in the ready line

    @field_validator("centre_url")
    @classmethod
    def _https_only(cls, value: str) -> str:
        if not value.startswith("https://"):
            raise ValueError("the centre is spoken to over https only")
        return value.rstrip("/")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:  # OSError: a name that is a folder of zones
            raise ValueError(f"there is no time zone {value!r} on this machine") from error
        return value

    @model_validator(mode="after")
    def _files_exist(self) -> Self:
        for name in ("ca_file", "cert_file", "key_file", "receipt_public_key_file", "report_ca_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: there is no file {path}")
        return self

    @property
    def zone(self) -> ZoneInfo:
        """`timezone` itself."""
        return ZoneInfo(self.timezone)


def load() -> GatewaySettings:
    """Settings from the environment. Raises ConfigurationError naming each setting that is missing or wrong."""
    try:
        return GatewaySettings()
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or 'settings'}: {e['msg']}" for e in error.errors()
        )
        raise ConfigurationError(f"Gateway settings (YUANZHEN_GATEWAY_*): {wrong}") from error
