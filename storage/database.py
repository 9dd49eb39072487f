"""Connections to PostgreSQL, always as the application role and always inside a scope of sites.

Row-level security denies by default: a session sees rows of one site (`Database.county`) or of all (`Database.centre`).
The scope is set with SET LOCAL, so it ends with the transaction and cannot leak through the pool.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from storage.errors import ConfigurationError

_STATEMENT_TIMEOUT_MS = 30_000
_LOCK_TIMEOUT_MS = 10_000


class Database:
    """A pool of connections of the application role. One per process; close() at its end."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self.engine = sa.create_engine(
            url,
            pool_size=pool_size,
            max_overflow=10,
            pool_pre_ping=True,  # the supervisor may have restarted the server
            hide_parameters=True,  # an error's text ends in logs, and the values are patient data
            connect_args={
                "options": f"-c statement_timeout={_STATEMENT_TIMEOUT_MS}"
                f" -c lock_timeout={_LOCK_TIMEOUT_MS} -c timezone=UTC"
            },
        )

    @contextmanager
    def _scope(self, site: str) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            session.execute(sa.text("SELECT set_config('app.site', :site, true)"), {"site": site})
            yield session

    @contextmanager
    def centre(self) -> Iterator[Session]:
        """One transaction that sees every site. Commits at the end, rolls back on any exception."""
        with self._scope("all") as session:
            yield session

    @contextmanager
    def county(self, site_id: int) -> Iterator[Session]:
        """One transaction that sees the rows of one site and no other."""
        with self._scope(str(site_id)) as session:
            yield session

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def psycopg_dsn(url: str) -> str:
    """The same address for psycopg itself (LISTEN needs its own connection)."""
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def alembic_config(owner_url: str) -> Any:
    """Alembic's configuration for our migrations, as the owner role."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = owner_url
    return config


def upgrade(owner_url: str) -> None:
    """Bring the schema up to the newest migration. Raises ConfigurationError if no owner address is set."""
    if not owner_url:
        raise ConfigurationError("YUANZHEN_DATABASE_OWNER_URL is not set: migrations run as the owner role")
    from alembic import command

    command.upgrade(alembic_config(owner_url), "head")
