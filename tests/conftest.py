"""Fixtures that every test may ask for."""

from tests.centre import configuration, database, migrated, objects, sites
from tests.rabbitmq import rabbitmq_url
from tests.servers import postgres_server, s3_server, valkey_server

__all__ = [
    "configuration",
    "database",
    "migrated",
    "objects",
    "postgres_server",
    "rabbitmq_url",
    "s3_server",
    "sites",
    "valkey_server",
]
