"""Alembic's environment: runs as the owner role; the address comes from storage.database.alembic_config."""

import sqlalchemy as sa
from alembic import context

from storage.rows import Row

target_metadata = Row.metadata


def run() -> None:
    """Apply the migrations in one transaction."""
    engine = sa.create_engine(context.config.attributes["url"])
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=target_metadata, compare_server_default=False)
        with context.begin_transaction():
            # Two starters at once: the second waits, then finds nothing to do.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7203001)"))
            context.run_migrations()
    engine.dispose()


run()
