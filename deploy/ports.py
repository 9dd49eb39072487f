"""Which TCP ports the one-machine stack listens on: asked for, remembered, a pleasant default, or any free one.

A port asked for in the environment is a demand: if somebody else has it, the start fails and names who. A default is
a wish: the stack takes another and says so. What was chosen is remembered, so addresses stay the same.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.process import StackError, free_ports, is_free, port_holder

# Environment variable and default; 0 means any. The names are those of stack.json.
_PORTS: dict[str, tuple[str, int]] = {
    "web": ("YUANZHEN_WEB_PORT", 8480),
    "ingest": ("YUANZHEN_INGEST_PORT", 8443),
    "dicom": ("YUANZHEN_GATEWAY_PORT", 11112),
    "county_pacs": ("YUANZHEN_GATEWAY_PACS_PORT", 11113),
    "postgres": ("YUANZHEN_STACK_POSTGRES_PORT", 0),
    "valkey": ("YUANZHEN_STACK_VALKEY_PORT", 0),
    "s3": ("YUANZHEN_STACK_S3_PORT", 0),
    "s3_grpc": ("", 0),
    "s3_master": ("", 0),
    "s3_master_grpc": ("", 0),
    "s3_volume": ("", 0),
    "s3_volume_grpc": ("", 0),
    "s3_filer": ("", 0),
    "s3_filer_grpc": ("", 0),
}


def stack_settings() -> list[tuple[str, str, str]]:
    """Variables that only the one-machine stack reads: name, default, meaning."""
    return [
        ("YUANZHEN_VAR_DIR", "`var`", "Where the one-machine stack keeps everything"),
        *(
            (variable, f"`{default}`" if default else "any free one", f"Port of the embedded {name} server")
            for name, (variable, default) in _PORTS.items()
            if variable.startswith("YUANZHEN_STACK_")
        ),
    ]


def choose_ports(path: Path, environ: Mapping[str, str], say: Callable[[str], None]) -> dict[str, int]:
    """Choose every port and remember the choice in `path`. Raises `StackError` naming a port in conflict."""
    remembered: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    chosen: dict[str, int] = {}
    for name, (variable, default) in _PORTS.items():
        if variable and (asked := environ.get(variable)):
            chosen[name] = _asked(variable, asked)
            continue
        wished = remembered.get(name, default)
        taken = frozenset(chosen.values())
        if wished and wished not in taken and is_free(wished):
            chosen[name] = wished
            continue
        chosen[name] = free_ports(1, avoid=taken | {default for _, default in _PORTS.values()})[0]
        if wished:
            say(f"port {wished} is taken by {port_holder(wished)}: {name} listens on {chosen[name]} instead")
    path.write_text(json.dumps(chosen, indent=1))
    return chosen


def _asked(variable: str, text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise StackError(f"{variable}={text} is not a port number")
    port = int(text)
    if not is_free(port):
        raise StackError(f"{variable}={port}: port {port} is taken by {port_holder(port)}. Stop it or choose another.")
    return port
