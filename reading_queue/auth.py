"""Who is there and what they may do: sign in, sign out, language, and the dependency that guards every route.

Passwords are argon2id. An attempt is counted before the password is looked at, so that many attempts at once get no
more tries than one after another; after five failures the account rests for a quarter of an hour. Whether the name,
the password or the lock was the reason, the answer is the same and takes the same work. The cookie holds a random
token whose SHA-256 alone is stored. It is SameSite=Lax and not Strict, because a link to a quality view that a
colleague sends must open; so every changing request also carries the session's CSRF token, and its Origin is ours.
"""

import asyncio
import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from reading_queue.i18n import LANGUAGE_COOKIE, Language, language_of, t
from reading_queue.pages import page
from reading_queue.problems import SignInNeededError
from storage.database import Database
from storage.errors import ForbiddenError
from storage.rows import Account, Site, WebSession
from storage.transitions import account_actor, note_outside_study
from storage.vocabulary import COUNTY_ROLES, Role

SESSION_COOKIE = "yuanzhen_session"
CSRF_HEADER = "x-csrf-token"
MAX_FAILURES = 5
LOCK_FOR = timedelta(minutes=15)
_MAX_PASSWORD = 1024  # characters: more is no password but work for argon2
_LANGUAGE_LIFE_S = 365 * 24 * 3600
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_HASHER = PasswordHasher()  # argon2id, RFC 9106's second recommendation: 64 MiB
_AT_ONCE = threading.BoundedSemaphore(2)  # or forty sign-ins would ask for 2.5 GiB

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Person:
    """Whoever is signed in, for one request."""

    account_id: int
    site_id: int
    role: Role
    username: str
    display_name: str
    csrf_token: str


def hash_password(password: str) -> str:
    """An argon2id hash to store."""
    return _HASHER.hash(password)


@cache
def _nobodys_hash() -> str:
    """Verified when there is no such account, so that the answer takes as long."""
    return _HASHER.hash(secrets.token_urlsafe(16))


def _verify(stored: str, password: str) -> bool:
    with _AT_ONCE:
        try:
            return _HASHER.verify(stored, password[:_MAX_PASSWORD])
        except (VerificationError, InvalidHashError):
            return False


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def sign_in(database: Database, username: str, password: str, *, life_s: int) -> str | None:
    """Make a session. Returns its token, or None for a wrong name, a wrong password or a resting account."""
    now = sa.func.clock_timestamp()
    with database.centre() as session:
        attempt = session.execute(
            sa.update(Account)
            .where(Account.username == username, sa.or_(Account.locked_until.is_(None), Account.locked_until < now))
            .values(
                # A lock that has ended starts the count anew.
                failed_logins=sa.case((Account.locked_until.is_(None), Account.failed_logins + 1), else_=1),
                locked_until=sa.case(
                    (
                        sa.and_(Account.locked_until.is_(None), Account.failed_logins + 1 >= MAX_FAILURES),
                        now + LOCK_FOR,
                    ),
                    else_=None,
                ),
            )
            .returning(Account.id, Account.site_id, Account.password_hash)
        ).one_or_none()
    good = _verify(attempt.password_hash if attempt else _nobodys_hash(), password)
    if attempt is None or not good:
        _note_refusal(database, username)
        return None
    token = secrets.token_urlsafe(32)
    with database.centre() as session:
        session.execute(sa.update(Account).where(Account.id == attempt.id).values(failed_logins=0, locked_until=None))
        session.execute(sa.delete(WebSession).where(WebSession.account_id == attempt.id, WebSession.expires_at < now))
        session.execute(
            sa.insert(WebSession).values(
                token_sha256=_digest(token),
                site_id=attempt.site_id,
                account_id=attempt.id,
                csrf_token=secrets.token_urlsafe(24),
                expires_at=now + timedelta(seconds=life_s),
            )
        )
        note_outside_study(
            session, attempt.site_id, "user.signed_in", subject=Account.__tablename__, subject_id=attempt.id,
            actor=account_actor(attempt.id),
        )  # fmt: skip
    return token


def _note_refusal(database: Database, username: str) -> None:
    """On the account's site; for a name nobody has, the centre's. What was typed is not kept: it may be a password."""
    with database.centre() as session:
        known = session.execute(
            sa.select(Account.id, Account.site_id).where(Account.username == username)
        ).one_or_none()
        centre = sa.select(Site.site_id).where(Site.is_centre).order_by(Site.site_id).limit(1)
        site_id = known.site_id if known else session.execute(centre).scalar_one_or_none()
        if site_id is not None:
            note_outside_study(
                session, site_id, "user.refused", subject=Account.__tablename__, subject_id=known.id if known else 0,
                actor="nobody",
            )  # fmt: skip


def sign_out(database: Database, token: str, person: Person) -> None:
    """End the session."""
    with database.centre() as session:
        session.execute(sa.delete(WebSession).where(WebSession.token_sha256 == _digest(token)))
        note_outside_study(
            session, person.site_id, "user.signed_out", subject=Account.__tablename__, subject_id=person.account_id,
            actor=account_actor(person.account_id),
        )  # fmt: skip


def person_of(database: Database, token: str | None) -> Person | None:
    """Whose session this token is, if it has not ended."""
    if not token:
        return None
    with database.centre() as session:
        row = session.execute(
            sa.select(
                Account.id, Account.site_id, Account.role, Account.username, Account.display_name, WebSession.csrf_token
            )
            .join(Account, Account.id == WebSession.account_id)
            .where(WebSession.token_sha256 == _digest(token), WebSession.expires_at > sa.func.clock_timestamp())
        ).one_or_none()
    return None if row is None else Person(*row)


def _check_origin(request: Request) -> None:
    """Refuse a changing request that another site's page sent (Fetch standard: `null` is nobody's)."""
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site") == "cross-site" or (
        origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    ):
        raise ForbiddenError("This request came from another site's page")


async def _check_csrf(request: Request, person: Person) -> None:
    _check_origin(request)
    given: Any = request.headers.get(CSRF_HEADER)
    if given is None and request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        given = (await request.form()).get("csrf")
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), person.csrf_token.encode()):
        raise ForbiddenError("The page was too old, or this request did not come from it (CSRF token)")


@dataclass(frozen=True)
class Guard:
    """FastAPI dependency: lets in people of `roles`. Raises SignInNeededError, ForbiddenError."""

    roles: frozenset[Role]

    async def __call__(self, request: Request) -> Person:
        """The person signed in. A request that changes something must carry the session's CSRF token."""
        token = request.cookies.get(SESSION_COOKIE)
        person = await asyncio.to_thread(person_of, request.app.state.database, token)
        if person is None:
            raise SignInNeededError(t("auth.needed", language_of(request)))
        request.state.person = person
        if person.role not in self.roles:
            raise ForbiddenError(t("auth.not_your_role", language_of(request)))
        if request.method not in _SAFE_METHODS:
            await _check_csrf(request, person)
        return person


def require(*roles: Role) -> Guard:
    """The guard of a route: who may call it. No role named means everybody who is signed in."""
    return Guard(frozenset(roles or Role))


def anyone(request: Request) -> None:
    """The guard of a route that needs no sign-in: says so, and refuses other sites' forms."""
    if request.method not in _SAFE_METHODS:
        _check_origin(request)


def home_of(person: Person) -> str:
    """The page a person starts on."""
    if person.role in COUNTY_ROLES:
        return "/county"
    return "/worklist" if person.role is Role.READER else "/quality"


def local_path(target: str) -> str:
    """`target` if it is a path of ours, else "/": a sign-in must not send people to another site."""
    plain = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if plain else "/"


@router.get("/")
def home(person: Person = Depends(require())) -> Response:
    """To the page of the person's work."""
    return RedirectResponse(home_of(person), 303)


@router.get("/sign-in", dependencies=[Depends(anyone)])
def sign_in_page(request: Request, next: str = "/") -> Response:
    """The sign-in form."""
    return page(request, "sign_in.html", next=local_path(next), username="", refused=False)


@router.post("/sign-in", dependencies=[Depends(anyone)])
def do_sign_in(
    request: Request,
    username: str = Form("", max_length=64),
    password: str = Form("", max_length=_MAX_PASSWORD),
    next: str = Form("/"),
) -> Response:
    """Sign in. 401 with the form again when refused."""
    state = request.app.state
    name = username.strip().replace("\0", "")
    token = sign_in(state.database, name, password, life_s=state.settings.session_life_s)
    if token is None:
        return page(request, "sign_in.html", status=401, next=local_path(next), username=name, refused=True)
    before = request.cookies.get(SESSION_COOKIE)
    person = person_of(state.database, before)
    if before is not None and person is not None:
        sign_out(state.database, before, person)  # the cookie is about to be forgotten: its session with it
    answer = RedirectResponse(local_path(next), 303)
    answer.set_cookie(
        SESSION_COOKIE,
        token,
        max_age=state.settings.session_life_s,
        httponly=True,
        secure=state.settings.web_secure_cookies,
        samesite="lax",
    )
    return answer


@router.post("/sign-out")
def do_sign_out(request: Request, person: Person = Depends(require())) -> Response:
    """Sign out."""
    sign_out(request.app.state.database, request.cookies[SESSION_COOKIE], person)
    answer = RedirectResponse("/sign-in", 303)
    answer.delete_cookie(SESSION_COOKIE)
    return answer


@router.get("/session")
def session_facts(person: Person = Depends(require())) -> Response:
    """For a page whose sign-in ended while somebody typed: who is signed in now, and the token to go on with."""
    return JSONResponse(
        {"account_id": person.account_id, "csrf": person.csrf_token}, headers={"Cache-Control": "no-store"}
    )


@router.get("/language/{language}", dependencies=[Depends(anyone)])
def choose_language(request: Request, language: Language, next: str = "/") -> Response:
    """Remember the language. It changes nothing but this browser's cookie, so a plain link will do."""
    answer = RedirectResponse(local_path(next), 303)
    secure = request.app.state.settings.web_secure_cookies
    answer.set_cookie(LANGUAGE_COOKIE, language, max_age=_LANGUAGE_LIFE_S, httponly=True, secure=secure, samesite="lax")
    return answer
