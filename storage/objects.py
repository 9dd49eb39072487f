"""Objects: an S3 server through the `minio` SDK. No server's name is known here (design §3, facts §5).

A port of few methods over two buckets: packs, staging and results in one; in another, with object lock, signed reports
and the audit trail's daily heads. Uses only what MinIO documents. Every read gives bytes whose digest is checked by
who asked.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import BinaryIO
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import COMPLIANCE, GOVERNANCE
from minio.error import MinioException, S3Error
from minio.retention import Retention

from storage.errors import ConfigurationError, ObjectMissingError, ObjectStoreError, PermanentError
from storage.settings import Settings

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
_MISSING = {"NoSuchKey", "NoSuchObject", "NoSuchBucket", "NoSuchUpload"}
_COPY_BYTES = 1024 * 1024
_PART_BYTES = 32 * 1024 * 1024


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if error.code in _MISSING:
            raise ObjectMissingError(f"No object {key}") from error
        raise ObjectStoreError(f"Object store answered {error.code} for {key}") from error
    except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
        raise ObjectStoreError(f"Object store did not answer for {key}: {type(error).__name__}") from error
    except ValueError as error:  # minio-py refuses a key before it asks the server
        raise PermanentError(f"{key} cannot be an object's key") from error


def _client(url: str, configuration: Settings) -> Minio:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise ConfigurationError(f"Object store address {url!r} is not http(s)://host:port")
    return Minio(
        endpoint=parts.netloc,
        access_key=configuration.s3_access_key,
        secret_key=configuration.s3_secret_key.get_secret_value(),
        secure=parts.scheme == "https",
        region=configuration.s3_region,
        http_client=urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_READ_TIMEOUT_S),
            maxsize=20,
            retries=False,  # jobs and gateways retry; one layer per hop
        ),
    )


@dataclass(frozen=True, slots=True)
class LockedVersion:
    """One version of an object. Object lock keeps each: a later PUT or delete only hides it."""

    key: str
    version_id: str
    is_delete_marker: bool


class Objects:
    """The two buckets. Thread-safe; one per process."""

    def __init__(self, configuration: Settings) -> None:
        self._client = _client(configuration.s3_url, configuration)
        self._public = _client(configuration.s3_public_url or configuration.s3_url, configuration)
        self._bucket = configuration.s3_bucket
        self._lock_bucket = configuration.s3_lock_bucket
        self._lock_days = configuration.report_lock_days
        self._lock_mode = COMPLIANCE if configuration.object_lock_mode == "COMPLIANCE" else GOVERNANCE

    def ensure_buckets(self) -> None:
        """Make both buckets if they are missing. Raises ObjectStoreError."""
        for bucket, lock in ((self._bucket, False), (self._lock_bucket, True)):
            with _translated(bucket):
                if not self._client.bucket_exists(bucket):
                    self._client.make_bucket(bucket, object_lock=lock)

    def put(self, key: str, data: bytes | BinaryIO, size_bytes: int | None = None) -> None:
        """Write an object. A key is written once; callers name keys by content or by a fresh id."""
        stream = io.BytesIO(data) if isinstance(data, bytes) else data
        length = len(data) if isinstance(data, bytes) else size_bytes
        if length is None:
            raise ValueError("size_bytes is needed for a stream")
        with _translated(key):
            # A pack of usual size is one plain PUT; a larger one goes in parts, for minio-py holds each part in memory.
            self._client.put_object(self._bucket, key, stream, length, part_size=_PART_BYTES)

    def put_locked(self, key: str, data: bytes) -> None:
        """Write an object that nobody can delete before its retention ends (S3 object lock)."""
        until = datetime.now(UTC) + timedelta(days=self._lock_days)
        with _translated(key):
            self._client.put_object(
                self._lock_bucket,
                key,
                io.BytesIO(data),
                len(data),
                retention=Retention(self._lock_mode, until),
            )

    def locked_versions(self, prefix: str) -> Iterator[LockedVersion]:
        """Every version under a prefix of the bucket with object lock, by key and then newest first."""
        with _translated(prefix):
            for found in self._client.list_objects(
                self._lock_bucket, prefix=prefix, recursive=True, include_version=True
            ):
                yield LockedVersion(found.object_name, found.version_id, found.is_delete_marker)

    def get(
        self, key: str, *, offset: int = 0, length: int = 0, locked: bool = False, version_id: str | None = None
    ) -> bytes:
        """Read `length` bytes from `offset`; 0 means to the end. Without `version_id`, of the newest version. Raises
        ObjectMissingError, ObjectStoreError."""
        bucket = self._lock_bucket if locked else self._bucket
        with _translated(key):
            response = self._client.get_object(bucket, key, offset=offset, length=length, version_id=version_id)
            try:
                data: bytes = response.read()
            finally:
                response.close()
                response.release_conn()
        if length and len(data) != length:
            raise ObjectStoreError(f"Object store gave {len(data)} bytes of {key} where {length} were asked for")
        return data

    def stream(self, key: str) -> Iterator[bytes]:
        """Read a whole object in blocks of at most 1 MiB. Raises as `get`."""
        with _translated(key):
            response = self._client.get_object(self._bucket, key)
            try:
                yield from response.stream(_COPY_BYTES)
            finally:
                response.close()
                response.release_conn()

    def size(self, key: str) -> int:
        """Size in bytes. Raises ObjectMissingError, ObjectStoreError."""
        with _translated(key):
            size: int | None = self._client.stat_object(self._bucket, key).size
        return size or 0

    def delete(self, key: str) -> None:
        """Remove a staging object. Nothing else is ever deleted by this project without two people."""
        if not key.startswith("staging/"):
            raise ValueError(f"{key} is not under staging/")
        with _translated(key):
            self._client.remove_object(self._bucket, key)

    def list(self, prefix: str) -> Iterator[str]:
        """Keys under a prefix, in order."""
        with _translated(prefix):
            for found in self._client.list_objects(self._bucket, prefix=prefix, recursive=True):
                yield found.object_name

    def list_older(self, prefix: str, than: datetime) -> Iterator[str]:
        """Keys under a prefix that were last written before `than`, by the object store's clock."""
        with _translated(prefix):
            for found in self._client.list_objects(self._bucket, prefix=prefix, recursive=True):
                if found.last_modified is not None and found.last_modified < than:
                    yield found.object_name

    def presigned_put(self, key: str, life_s: int) -> str:
        """An address good for one PUT of this key, under staging/ only, for `life_s` seconds.

        It binds the host, the key and the time; the bytes are proved at commit (minio-py signs no checksum).
        """
        if not key.startswith("staging/"):
            raise ValueError(f"{key} is not under staging/")
        url: str = self._public.presigned_put_object(self._bucket, key, expires=timedelta(seconds=life_s))
        return url
