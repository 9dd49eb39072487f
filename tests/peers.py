"""Programs from Debian that tests talk to: real peers, not mocks. `python -m tests.peers` brings the missing ones.

As root it installs them; otherwise it says what is missing. Where `CI` is `true`, something missing is a failure;
elsewhere the tests that need it skip, saying so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Debian package: a program of it. Absolute paths, because pynetdicom puts its own storescu and echoscu on PATH.
PEERS = {
    "dcmtk": "/usr/bin/storescu",
    "orthanc": "/usr/sbin/Orthanc",
    "chromium": "/usr/bin/chromium",
    "rabbitmq-server": "/usr/sbin/rabbitmq-server",
    "strace": "/usr/bin/strace",
    "poppler-utils": "/usr/bin/pdfsig",
    "libnss3-tools": "/usr/bin/certutil",
}


def missing() -> list[str]:
    """Debian packages whose program is not there."""
    return [package for package, program in PEERS.items() if not Path(program).exists()]


def peer(package: str) -> str:
    """The program of a peer; skips the test when it is missing, or fails it in CI."""
    program = PEERS[package]
    if not Path(program).exists():
        message = f"{program} is missing: apt-get install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return program


def install(packages: list[str]) -> None:
    """Install Debian packages without starting the services they bring."""
    # RUNLEVEL=1 keeps invoke-rc.d from starting Orthanc and RabbitMQ on their fixed ports.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for arguments in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *arguments], env=environment, check=True, stdout=sys.stderr)


def main() -> int:
    """Returns the exit status."""
    wanted = missing()
    if not wanted:
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {', '.join(wanted)}", flush=True)
        install(wanted)
        wanted = missing()
    if wanted:
        print(f"missing peers: {', '.join(wanted)} (Debian: apt-get install {' '.join(wanted)})")
        return 1 if os.environ.get("CI") == "true" else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
