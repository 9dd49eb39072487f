"""Reads the rules file, or refuses it with file, line and reason, so that a bad rule stops the start.

tomllib knows the line of bad syntax only; for what is well written and means nothing, the line is looked up here: the
n-th `[[rule]]` header, then the key.
"""

import hashlib
import re
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from routing.rules import Rules
from storage.errors import ConfigurationError

_SYNTAX_LINE = re.compile(r"\(at line (\d+), column \d+\)")
_SYNTAX_PLACE = re.compile(r"\s*\(at (line \d+, column \d+|end of document)\)")
_RULE_NUMBER = re.compile(r"rule (\d+): ")
_HEADER = re.compile(r"^\s*\[\[?\s*([\w.-]+)\s*\]\]?")


@cache
def load_rules(path: Path) -> Rules:
    """The rules of this process: read once, a change needs a restart. Raises ConfigurationError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_rules(content, str(path))


def parse_rules(content: bytes, name: str) -> Rules:
    """Rules from a file's bytes, called `name` in messages.

    Raises ConfigurationError with a line `name:line: place: reason` for every fault.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{name}:{line}: not UTF-8") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _SYNTAX_LINE.search(str(error))
        line = int(match[1]) if match else len(text.splitlines())
        raise ConfigurationError(f"{name}:{line}: {_SYNTAX_PLACE.sub('', str(error)).strip()}") from error
    if "version" in table:
        raise ConfigurationError(
            f"{name}:{line_of(text, ('version',))}: version: the digest of the file is its version"
        )
    try:
        return Rules.model_validate(table | {"version": hashlib.sha256(content).hexdigest()[:16]})
    except ValidationError as error:
        faults = [_fault(text, name, fault["loc"], fault["msg"]) for fault in error.errors()]
        raise ConfigurationError("\n".join(faults)) from error


def _fault(text: str, name: str, location: Sequence[int | str], message: str) -> str:
    if not location and (match := _RULE_NUMBER.search(message)):
        location = ("rule", int(match[1]) - 1, "name")
    # pydantic counts from 0, people from 1
    where = ".".join(str(part + 1) if isinstance(part, int) else part for part in location)
    reason = message.removeprefix("Value error, ")
    return f"{name}:{line_of(text, location)}: {where}: {reason}"


def line_of(text: str, location: Sequence[int | str]) -> int:
    """The line (from 1) of what `location` names, e.g. ("rule", 2, "then", "minutes"): as deep as it can be found."""
    lines = text.splitlines()
    start, end, rest = 0, len(lines), list(location)
    if rest:
        table = str(rest.pop(0))
        wanted = next((part for part in rest[:1] if isinstance(part, int)), 0)
        headers = [
            (number, match[1]) for number, line in enumerate(lines) if (match := _HEADER.match(line)) is not None
        ]
        own = [number for number, header in headers if header == table]
        if wanted < len(own):
            start = own[wanted]
            # The table goes on through its own sub-tables: [rule.then] belongs to the [[rule]] above it.
            later = [n for n, header in headers if n > start and not header.startswith(f"{table}.")]
            end = min(later, default=end)
        else:
            rest.insert(0, table)  # a key of the file itself, or no table of that name
    for key in rest:
        if isinstance(key, int):
            continue
        pattern = re.compile(rf"(^|[\s{{,.\[\"]){re.escape(key)}\"?\s*[=.\]]")
        found = next((n for n in range(start, end) if pattern.search(lines[n].partition("#")[0])), None)
        if found is None:
            break
        start = found
    return start + 1
