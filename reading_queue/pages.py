"""Pages from templates: one Jinja2 environment, escaping always on, the words and the person in every page.

Whatever a template puts out passes `visible`: a name that reorders what stands beside it is not a name one can check.
"""

from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reading_queue import i18n
from reading_queue.report_pdf import display_person_name
from storage.visible import visible

_TEMPLATES = Path(__file__).resolve().parent / "templates"

# Scripts, styles and fonts are ours alone. The viewer's pages bring their own policy (reading_queue/ohif_config.py).
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "worker-src 'self'",
        "frame-src 'self' blob:",
        "object-src 'self'",  # the signed PDF
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'self'",
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def _shown(value: Any) -> Any:
    """What a template puts out, with no hidden character in it. Markup stays markup: code points need no escaping."""
    if not isinstance(value, str):
        return value
    return Markup(visible(value)) if isinstance(value, Markup) else visible(value)  # noqa: S704 - it was Markup before


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,  # nothing from a DICOM file or a person is markup
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": i18n.duration,
        "probability": i18n.probability,
        "person_name": lambda name: display_person_name(name) or "—",
    }
    return environment


def page(
    request: Request, template: str, *, status: int = 200, headers: dict[str, str] | None = None, **values: Any
) -> HTMLResponse:
    """Render a template for this request. `person` is whoever `require` let in, or None."""
    language = i18n.language_of(request)
    time_zone = request.app.state.settings.timezone
    person = getattr(request.state, "person", None)
    html = (
        _environment()
        .get_template(template)
        .render(
            request=request,
            person=person,
            csrf=person.csrf_token if person else "",
            language=language,
            time_zone=time_zone,
            path=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
            now=datetime.now(UTC),
            t=partial(_text, language),
            minute=partial(i18n.local_minute, time_zone=time_zone),
            clock=partial(i18n.local_clock, time_zone=time_zone),
            second=partial(i18n.local_second, time_zone=time_zone),
            event_name=partial(i18n.event_name, language=language),
            age=partial(i18n.age, language=language),
            date_time=i18n.dicom_date_time,
            in_language=lambda zh, en: (zh if language == "zh" else en) or zh or en,
            **values,
        )
    )
    # A reading room's computer is shared: nothing with a patient in it stays in the browser's cache.
    return HTMLResponse(html, status, {"Cache-Control": "no-store", "Vary": "Cookie"} | (headers or {}))


def _text(language: i18n.Language, key: str, **values: object) -> str:
    return i18n.t(key, language, **values)
