"""Who is there when a demonstration stack starts: a centre, two county hospitals, people, one enrolled gateway.

Made once and then left alone, so what an administrator changes stays changed. The people are roles, not persons.
"""

from typing import NamedTuple

import sqlalchemy as sa
from argon2 import PasswordHasher
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from deploy.pki import Pki, issue_gateway, issue_reader
from storage.database import Database
from storage.rows import Account, Gateway, ReaderGrant, Site
from storage.vocabulary import Role

GATEWAY_NAME, GATEWAY_SITE = "county-a-gateway", "county-a"

_CENTRE = "centre"
# code: Chinese name, English name, research-only models enabled by name
_SITES: dict[str, tuple[str, str, list[str]]] = {
    _CENTRE: ("示范中心医院", "Demonstration Central Hospital", []),
    "county-a": ("示范甲县医院", "Demonstration County Hospital A", ["cxr_pneumonia", "ecg_rhythm"]),
    "county-b": ("示范乙县医院", "Demonstration County Hospital B", []),
}

# user name, role, site, display name, specialties read
_PEOPLE = (
    ("reader", Role.READER, "centre", "影像医师 Radiologist", ("imaging",)),
    ("reader2", Role.READER, "centre", "影像审核医师 Reviewing radiologist", ("imaging",)),
    ("cardiologist", Role.READER, "centre", "心电医师 Cardiologist", ("ecg", "ultrasound")),
    ("pathologist", Role.READER, "centre", "病理医师 Pathologist", ("pathology",)),
    ("quality", Role.QUALITY, "centre", "质控员 Quality officer", ()),
    ("admin", Role.ADMINISTRATOR, "centre", "管理员 Administrator", ()),
    ("county-a", Role.RADIOGRAPHER, "county-a", "甲县技师 Radiographer A", ()),
    ("clinician-a", Role.CLINICIAN, "county-a", "甲县医师 Clinician A", ()),
    ("county-b", Role.RADIOGRAPHER, "county-b", "乙县技师 Radiographer B", ()),
)


class DemoAccount(NamedTuple):
    """A demonstration account as it is shown to people. `pin` opens a reader's signing key."""

    username: str
    role: str
    site: str
    display_name: str
    password: str
    pin: str


def seed(database: Database, pki: Pki, password: str, pin: str) -> list[DemoAccount]:
    """Make what is missing. Returns the demonstration accounts."""
    with database.centre() as session:
        sites = {code: _site(session, code) for code in _SITES}
        _enrol(session, sites[GATEWAY_SITE], pki)
        for username, role, site, display_name, specialties in _PEOPLE:
            known = session.execute(sa.select(Account.id).where(Account.username == username)).scalar_one_or_none()
            if known is not None:
                continue
            identity = issue_reader(pki, username, display_name, pin) if role is Role.READER else None
            account_id = session.execute(
                sa.insert(Account)
                .values(
                    site_id=sites[site],
                    username=username,
                    display_name=display_name,
                    role=role,
                    password_hash=PasswordHasher().hash(password),
                    signing_identity=identity.name if identity else None,
                )
                .returning(Account.id)
            ).scalar_one()
            # A reader reads for every county.
            for county in (code for code in _SITES if code != _CENTRE):
                for specialty in specialties:
                    grant = {"account_id": account_id, "site_id": sites[county], "specialty": specialty}
                    session.execute(sa.insert(ReaderGrant).values(grant))
    return [
        DemoAccount(username, role.value, site, display_name, password, pin)
        for username, role, site, display_name, _ in _PEOPLE
    ]


def _site(session: Session, code: str) -> int:
    name_zh, name_en, models = _SITES[code]
    session.execute(
        insert(Site)
        .values(code=code, name_zh=name_zh, name_en=name_en, is_centre=code == _CENTRE, enabled_models=models)
        .on_conflict_do_nothing(index_elements=[Site.code])
    )
    return session.execute(sa.select(Site.site_id).where(Site.code == code)).scalar_one()


def _enrol(session: Session, site_id: int, pki: Pki) -> None:
    """Bind the gateway's certificate to its site."""
    fingerprint = issue_gateway(pki, GATEWAY_NAME).fingerprint
    session.execute(
        insert(Gateway)
        .values(site_id=site_id, name=GATEWAY_NAME, certificate_sha256=fingerprint)
        .on_conflict_do_nothing(index_elements=[Gateway.certificate_sha256])
    )
