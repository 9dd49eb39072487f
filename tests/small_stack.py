"""A stack of the three embedded servers and one plain program, for the tests of the supervisor.

Run as the detached supervisor's program, like `deploy.stack`; the whole system has tests of its own.
"""

import http.client
import os
import sys
from pathlib import Path

from deploy.credentials import ensure_credentials
from deploy.ports import choose_ports
from deploy.postgres import FILER, FILER_DATABASE, Passwords, Postgres
from deploy.process import Command, end_leftovers
from deploy.seaweedfs import FilerStore, Ports, SeaweedFS
from deploy.services import Program
from deploy.stack import Say, main
from deploy.supervisor import Supervisor
from deploy.valkey import Valkey


def start(var: Path, supervisor: Supervisor, say: Say) -> None:
    """As `deploy.stack.start_all`, without our own programs."""
    end_leftovers(str(var))
    ports = choose_ports(var / "ports.json", os.environ, say)
    secrets = ensure_credentials(var / "secrets.env")
    postgres = Postgres(var / "postgres", ports["postgres"], Passwords("a", "b", "c", "d"))
    filer = FilerStore(ports["postgres"], FILER_DATABASE, FILER, "d")
    keys = secrets["S3_ACCESS_KEY"], secrets["S3_SECRET_KEY"]
    s3 = SeaweedFS(var / "s3", Ports.of(ports), *keys, filer)
    valkey = Valkey(var / "valkey", ports["valkey"], secrets["VALKEY"])
    port = ports["web"]

    def probe() -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
        try:
            connection.request("GET", "/")
            connection.getresponse()
        except OSError as error:
            return str(error)
        finally:
            connection.close()
        return None

    argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    web = Program("web", port, Command("web", argv, var / "log"), probe)
    facts = {"postgres_url": postgres.app_url, "s3_url": s3.url, "s3_keys": keys, "valkey_url": valkey.url}
    supervisor.describe({"supervisor_pid": os.getpid(), "ports": ports, **facts})
    supervisor.start_group([postgres])
    supervisor.start_group([s3, valkey])
    supervisor.start_group([web])


if __name__ == "__main__":
    main(start)
