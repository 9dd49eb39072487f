"""The table of settings in `docs/settings.md`, made from the settings classes, so that it cannot be wrong.

The centre's fields carry descriptions; the gateway's carry their reason as a comment on the field's line, which is
read from the source.
"""

import inspect
import re

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from deploy.ports import stack_settings
from dicom_gateway.settings import GatewaySettings
from storage.settings import Settings

_HEAD = """# Settings

Environment variables, read once at start. Made by `yuanzhen settings > docs/settings.md`; a test compares the two.
"""
_FIELD = re.compile(r"^    (?P<name>\w+): .*?  # (?P<why>.+)$")


def render() -> str:
    """The whole document, in Markdown."""
    parts = [
        _HEAD,
        _section("Centre", Settings),
        _section("Gateway", GatewaySettings),
        "## One machine\n\n| variable | default | meaning |\n| --- | --- | --- |\n"
        + "".join(f"| `{name}` | {default} | {meaning} |\n" for name, default, meaning in stack_settings()),
    ]
    return "\n".join(parts)


def names() -> set[str]:
    """Every environment variable that some part reads."""
    classes = (Settings, GatewaySettings)
    known = {_variable(kind, field) for kind in classes for field in kind.model_fields}
    return known | {name for name, _, _ in stack_settings()}


def _variable(kind: type[BaseSettings], field: str) -> str:
    return f"{kind.model_config.get('env_prefix', '')}{field}".upper()


def _section(title: str, kind: type[BaseSettings]) -> str:
    comments = {
        match["name"]: match["why"] for line in inspect.getsource(kind).splitlines() if (match := _FIELD.match(line))
    }
    rows = [
        f"| `{_variable(kind, name)}` | {_default(field)} | {field.description or comments.get(name, '')} |"
        for name, field in kind.model_fields.items()
    ]
    return f"## {title}\n\n| variable | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default in ("", None, ()):
        return "none"
    text = str(field.default)
    # A path inside the package is shown from its root: the document is the same on every machine.
    inside = re.search(r"/((?:ai_triage|routing|reading_queue)/.*)$", text)
    return f"`{inside[1] if inside else text}`"
