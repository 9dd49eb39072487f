"""A private RabbitMQ from Debian's package for the tests: own ports, own node name, own folder, own epmd.

The distribution's wrapper would switch to a system user and to /var/lib/rabbitmq; the script behind it does not.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pika
import pika.exceptions
import pytest

from deploy.process import Child, Command, free_ports, wait_until_healthy

_SCRIPT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def _problem(url: str) -> str | None:
    try:
        pika.BlockingConnection(pika.URLParameters(url)).close()
    except (pika.exceptions.AMQPError, OSError) as error:
        return repr(error)
    return None


@pytest.fixture(scope="session")
def rabbitmq_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running RabbitMQ; skips where Debian's rabbitmq-server is not installed."""
    epmd_path = shutil.which("epmd")
    if not _SCRIPT.exists() or epmd_path is None:
        pytest.skip("Debian's rabbitmq-server is not installed")
    home = tmp_path_factory.mktemp("rabbitmq")
    port, distribution, epmd_port = free_ports(3)
    (home / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{port}\nvm_memory_high_watermark.relative = 0.2\n"
        "disk_free_limit.absolute = 50MB\nlog.file.level = warning\n"
    )
    (home / "enabled_plugins").write_text("[].\n")
    (home / "environment").write_text("")
    environment = {
        "HOME": str(home),  # the Erlang cookie
        "RABBITMQ_CONF_ENV_FILE": str(home / "environment"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_PID_FILE": str(home / "pid"),
        "RABBITMQ_NODENAME": f"yuanzhen-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    url = f"amqp://guest:guest@127.0.0.1:{port}/%2F"
    epmd = subprocess.Popen(
        [epmd_path, "-port", str(epmd_port), "-address", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    log = home / "output.log"
    server = Child(Command("rabbitmq", [str(_SCRIPT)], home, environment, stop_seconds=30), log)
    try:
        wait_until_healthy(server, lambda: _problem(url), log, seconds=90)
        yield url
    finally:
        server.stop()
        epmd.send_signal(signal.SIGKILL)
        epmd.wait()
