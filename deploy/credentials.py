"""Passwords and keys of the one-machine stack: made once, kept in `var/secrets.env` (mode 0600), never printed."""

import secrets
from pathlib import Path

# Name and number of random bytes. The demonstration's password and PIN are typed by people.
_NAMES = {
    "POSTGRES_SUPERUSER": 24,
    "POSTGRES_OWNER": 24,
    "POSTGRES_APP": 24,
    "POSTGRES_FILER": 24,
    "S3_ACCESS_KEY": 10,
    "S3_SECRET_KEY": 24,
    "VALKEY": 24,
    "DEMO_PASSWORD": 6,
    "DEMO_PIN": 3,
}


def ensure_credentials(path: Path) -> dict[str, str]:
    """Read the file, adding what it lacks. Values are hexadecimal, so they need no quoting in any address."""
    known: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            name, separator, value = line.partition("=")
            if separator and not name.startswith("#"):
                known[name.strip()] = value.strip()
    missing = {name: secrets.token_hex(size) for name, size in _NAMES.items() if name not in known}
    if missing:
        known |= missing
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text("# Made by `yuanzhen up`.\n" + "".join(f"{name}={value}\n" for name, value in known.items()))
        fresh.replace(path)
    return known
