"""Settings of the centre: environment variables with prefix YUANZHEN_, read once, frozen (12-factor).

The gateway has its own (`dicom_gateway/settings.py`). `docs/settings.md` is generated from both.
"""

from functools import cache
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from storage.errors import ConfigurationError

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Where the centre's servers are, and its limits. Units are in the names."""

    model_config = SettingsConfigDict(env_prefix="YUANZHEN_", frozen=True, extra="ignore")

    database_url: str = Field(description="PostgreSQL as the application role, which owns nothing")
    database_owner_url: str = Field(default="", description="PostgreSQL as the owner; for migrations only")
    broker_url: str = Field(description="redis:// (Valkey, Redis) or amqp:// (RabbitMQ)")
    s3_url: str = Field(description="Object store as the centre reaches it, http(s)://host:port")
    s3_public_url: str = Field(default="", description="The same store as gateways reach it; default: s3_url")
    s3_access_key: str = Field(description="Object store access key")
    s3_secret_key: SecretStr = Field(description="Object store secret key")
    s3_region: str = Field(default="us-east-1", description="Region in the signature")
    s3_bucket: str = Field(default="yuanzhen", description="Bucket of packs and staging")
    s3_lock_bucket: str = Field(default="yuanzhen-reports", description="Object lock: signed reports, daily heads")
    report_lock_days: int = Field(default=3650, description="Days a signed report cannot be deleted, by object lock")
    object_lock_mode: str = Field(default="COMPLIANCE", description="COMPLIANCE or GOVERNANCE")

    web_host: str = Field(default="127.0.0.1", description="Address the pages listen on")
    web_port: int = Field(default=8480, description="Port of the pages")
    web_secure_cookies: bool = Field(default=False, description="True behind TLS: cookies are marked Secure")
    ingest_host: str = Field(default="127.0.0.1", description="Address of the gateways' API")
    ingest_port: int = Field(default=8443, description="Port of the gateways' API (mutual TLS)")
    pki_dir: Path = Field(default=Path("var/pki"), description="Certificates and keys: site CA, receipt key, report CA")
    assets_dir: Path = Field(default=Path(".cache/assets"), description="OHIF, fonts and scripts brought by set-up")
    models_dir: Path = Field(default=_PACKAGE_ROOT / "ai_triage" / "models", description="Triage models")
    rules_file: Path = Field(default=_PACKAGE_ROOT / "routing" / "rules.toml", description="Routing rules")
    timezone: str = Field(default="Asia/Shanghai", description="The centre's time zone, for people; rows are UTC")
    centre_name_zh: str = Field(default="示范中心医院", description="Name of the centre on reports")
    centre_name_en: str = Field(default="Demonstration Central Hospital", description="Name of the centre on reports")

    staging_url_life_s: int = Field(default=900, description="Life of a presigned PUT: one pack on a 2 Mbit/s link")
    lease_s: int = Field(default=120, description="A claim without a heartbeat is given back after this")
    triage_deadline_s: int = Field(default=300, description="After this a case says 'not triaged'")
    quiet_complete_s: int = Field(
        default=1800, description="A study without an inventory counts as complete after this silence"
    )
    job_stale_s: int = Field(default=60, description="A published job not finished after this is published again")
    gateway_silent_s: int = Field(default=300, description="A gateway without a heartbeat for this long is an event")
    session_life_s: int = Field(default=12 * 3600, description="A sign-in lasts a shift")


@cache
def settings() -> Settings:
    """The process's settings. Raises ConfigurationError naming every variable that is missing or wrong."""
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(f"YUANZHEN_{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(f"Settings: {faults}") from error
