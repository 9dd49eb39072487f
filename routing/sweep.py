"""What uploads left under `staging/`: packs that were PUT again, or whose study went another way. Nothing else is ever
deleted from the object store (design §4)."""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from storage.database import Database
from storage.objects import Objects
from storage.rows import Upload
from storage.vocabulary import UploadState

_BATCH = 500
ABANDONED_AFTER = timedelta(days=1)
"""Far beyond the life of an address to PUT to: nobody writes there any more."""


def sweep_staging(database: Database, objects: Objects, *, older_than: timedelta = ABANDONED_AFTER) -> int:
    """Delete staging objects whose upload is unknown or receipted (so the archive has the bytes). Returns how many.

    One that is offered or rejected stays: its gateway may commit it yet, or a person may look. Raises ObjectStoreError.
    """
    deleted = 0
    keys = list(objects.list_older("staging/", datetime.now(UTC) - older_than))
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        with database.centre() as session:
            wanted = set(
                session.scalars(
                    sa.select(Upload.staging_key).where(
                        Upload.staging_key.in_(batch), Upload.state != UploadState.RECEIPTED
                    )
                )
            )
        for key in batch:
            if key not in wanted:
                objects.delete(key)
                deleted += 1
    return deleted
