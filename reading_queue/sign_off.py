"""Signing: the saved draft becomes a signed PDF, an Encapsulated PDF and an SR under object lock, on the county's feed.

Order: check, set, sign, wrap (no transaction open: half a second of work), write the three objects under fresh keys,
then one transaction: report signed (guard: this revision), earlier versions superseded, case reported (guard: this
lease), feed entry, events (lifecycle v, y, j). If that fails nobody sees the objects; if it succeeds all is true at
once. What is signed is what was seen: the study must have the images that the page showed, looked at again in the last
transaction. A PIN is counted before it is tried; five wrong ones and signing rests for a quarter of an hour.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from reading_queue import claims
from reading_queue.auth import Person
from reading_queue.i18n import Language, t
from reading_queue.problems import BadRequestError, ConflictError
from reading_queue.report_dicom import (
    ReportedInstance,
    ReportIdentity,
    StudyIdentity,
    encapsulate,
    structured_report,
)
from reading_queue.report_pdf import SIGNATURE_BOXES, ReportContent, render_pdf, unprintable_characters
from reading_queue.signing import Pkcs12Signer, SigningFailedError, WrongPinError
from storage.database import Database
from storage.errors import IllegalTransitionError, LeaseLostError, NotFoundError, ObjectMissingError, ObjectStoreError
from storage.objects import Objects
from storage.rows import Account, Case, Event, FeedEntry, Instance, Report, Series, Site, Study
from storage.settings import Settings
from storage.states import Transition
from storage.transitions import account_actor, move, note, note_outside_study
from storage.vocabulary import Conclusion, ReportState, StudyState

_LOG = structlog.get_logger()
_MAX_PIN_FAILURES = 5
_PIN_REST = timedelta(minutes=15)
_PIN_TRIED, _PIN_ACCEPTED = "pin.tried", "pin.accepted"
_NO_IMAGES = frozenset({"SR", "PR", "KO", "DOC", "OT"})  # what comes along is not what was read
_SENT_HOME = (ReportState.SIGNED, ReportState.RECEIVED, ReportState.DELIVERED)


@dataclass(frozen=True, slots=True)
class Order:
    """What the reader asks to sign."""

    case_id: int
    lease_token: str
    revision: int
    images: int  # instances of the study when the page showed it
    incomplete: bool  # the reader has confirmed to sign although not all announced images are here
    language: Language  # of the messages


@dataclass(frozen=True, slots=True)
class _Draft:
    """All that goes into the objects, read in one transaction."""

    content: ReportContent
    study: StudyIdentity
    study_id: int
    site_code: str
    character_set: str
    instances: list[ReportedInstance]
    predecessor: ReportIdentity | None
    signing_identity: str | None


def sign(database: Database, objects: Objects, configuration: Settings, person: Person, order: Order, pin: str) -> int:
    """Sign. Returns the report's id.

    Raises BadRequestError (something to write is missing, or the PIN is wrong), LeaseLostError, ConflictError `signed`,
    `revision` or `new-images`, NotFoundError, ObjectStoreError. Nothing has changed then.
    """
    with database.centre() as session:
        draft = _read(session, configuration, person, order)
    report_id, content = draft.content.report_id, draft.content
    fonts_dir = configuration.assets_dir / "fonts"
    container = _container(configuration.pki_dir, draft.signing_identity, order.language)
    _count_pin_try(database, person, order.language)
    try:
        signer = Pkcs12Signer(container, pin, fonts_dir=fonts_dir, time_zone=configuration.timezone)
    except WrongPinError as error:
        _note_wrong_pin(database, draft, person)
        raise BadRequestError(t("reports.wrong_pin", order.language)) from error
    with database.centre() as session:
        _note_pin(session, person, _PIN_ACCEPTED)
    try:
        pdf = signer.sign(
            render_pdf(content, fonts_dir),
            field="Author",
            name=content.author_name,
            at=content.signed_at,
            box=SIGNATURE_BOXES["Author"],
        )
    except SigningFailedError as error:
        raise BadRequestError(error.reason) from error
    encapsulated = encapsulate(pdf, draft.study, content, character_set=draft.character_set, instances=draft.instances)
    sr = structured_report(
        draft.study, content, draft.instances, character_set=draft.character_set, predecessor=draft.predecessor
    )
    values: dict[str, object] = {"signed_at": content.signed_at}
    for kind, suffix, data in (
        ("pdf", "pdf", pdf),
        ("encapsulated", "encapsulated.dcm", encapsulated),
        ("sr", "sr.dcm", sr),
    ):
        digest = hashlib.sha256(data)
        key = f"reports/{draft.site_code}/{report_id}/v{content.version}-{digest.hexdigest()[:16]}.{suffix}"
        objects.put_locked(key, data)
        values |= {f"{kind}_key": key, f"{kind}_sha256": digest.digest()}
    with database.centre() as session:
        _settle(session, draft, person, order, values)
    _LOG.info("report.signed", report_id=report_id, case_id=order.case_id)
    return report_id


def _read(session: Session, configuration: Settings, person: Person, order: Order) -> _Draft:
    row = session.execute(
        sa.select(Case, Study, Site)
        .join(Study, Study.id == Case.study_id)
        .join(Site, Site.site_id == Case.site_id)
        .where(Case.id == order.case_id, claims.granted(person))
    ).one_or_none()
    if row is None:
        raise NotFoundError("No such case here")
    _, study, site = row
    report = session.scalars(
        sa.select(Report).where(Report.case_id == order.case_id, Report.state == ReportState.DRAFT)
    ).one_or_none()
    predecessor = session.scalars(
        sa.select(Report)
        .where(Report.case_id == order.case_id, Report.state.in_(_SENT_HOME))
        .order_by(Report.version.desc())
        .limit(1)
    ).one_or_none()
    if report is None and predecessor is not None:
        raise _signed_already(session, predecessor, order.language)
    if session.scalar(sa.select(Case.id).where(claims.held(order.case_id, person, order.lease_token))) is None:
        raise LeaseLostError("The case is not in your hands any more")
    if report is None or not report.impression.strip():
        raise BadRequestError(t("reports.no_impression", order.language))
    if report.conclusion is None:
        raise BadRequestError(t("reports.no_conclusion", order.language))
    if report.revision != order.revision:
        raise ConflictError("The draft was saved elsewhere since", "revision")
    _check_images(study, order)
    content = _content(session, configuration, person, report, study, site, report.conclusion, predecessor)
    before = None
    if predecessor is not None and predecessor.signed_at is not None:
        before = ReportIdentity(predecessor.id, predecessor.version, study.study_instance_uid, predecessor.signed_at)
    identity = session.execute(sa.select(Account.signing_identity).where(Account.id == person.account_id)).scalar_one()
    return _Draft(
        content=content,
        study=_identity(study),
        study_id=study.id,
        site_code=site.code,
        # PS3.3 C.12.1.1.2: home in the character set it came in, as far as that can write Chinese.
        character_set="ISO_IR 192" if "ISO_IR 192" in study.specific_character_set else "GB18030",
        instances=_instances(session, study.id),
        predecessor=before,
        signing_identity=identity,
    )


def _check_images(study: Study, order: Order) -> None:
    """The reader signs for the images that the page showed: no other, and not fewer than announced unless confirmed.

    Raises ConflictError `new-images`, with how many are here now.
    """
    now = {"images": study.instance_count, "complete": study.state is StudyState.COMPLETE}
    if study.instance_count != order.images:
        raise ConflictError(t("reports.new_images", order.language), "new-images", **now)
    arriving = study.state is StudyState.RECEIVING and order.incomplete
    if study.state is not StudyState.COMPLETE and not arriving:
        raise ConflictError(t("reports.images_arriving", order.language), "new-images", **now)


def unprintable_in_draft(session: Session, configuration: Settings, person: Person, case_id: int) -> list[str]:
    """Characters that the report of the case's draft would print as code points; [] without a draft."""
    row = session.execute(
        sa.select(Report, Study, Site)
        .join(Study, Study.id == Report.study_id)
        .join(Site, Site.site_id == Report.site_id)
        .where(Report.case_id == case_id, Report.state == ReportState.DRAFT)
    ).one_or_none()
    if row is None:
        return []
    report, study, site = row
    conclusion = report.conclusion or Conclusion.NEGATIVE  # not chosen yet; its own words can all be printed
    content = _content(session, configuration, person, report, study, site, conclusion, None)
    return unprintable_characters(content, configuration.assets_dir / "fonts")


def _content(
    session: Session,
    configuration: Settings,
    person: Person,
    report: Report,
    study: Study,
    site: Site,
    conclusion: Conclusion,
    predecessor: Report | None,
) -> ReportContent:
    """All that the report prints, if `person` signed it now."""
    now: datetime = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    centre = session.scalars(sa.select(Site).where(Site.site_id == person.site_id)).one()
    return ReportContent(
        report_id=report.id,
        version=report.version,
        language=report.language,
        county_name_zh=site.name_zh,
        county_name_en=site.name_en,
        centre_name_zh=centre.name_zh or configuration.centre_name_zh,
        centre_name_en=centre.name_en or configuration.centre_name_en,
        patient_name=study.patient_name,
        patient_id=study.patient_id,
        patient_sex=study.patient_sex,
        patient_age=study.patient_age,
        accession_number=study.accession_number,
        modality=main_modality(study.modalities),
        study_description=study.study_description or study.body_part_examined,
        study_datetime=_naive(study.study_date, study.study_time),
        study_instance_uid=study.study_instance_uid,
        clinical_question=study.clinical_question,
        findings=report.findings,
        impression=report.impression,
        conclusion=conclusion,
        author_name=person.display_name,
        signed_at=now.replace(microsecond=0),
        replaces_version=predecessor.version if predecessor is not None else 0,
        time_zone=configuration.timezone,
    )


def _identity(study: Study) -> StudyIdentity:
    return StudyIdentity(
        study_instance_uid=study.study_instance_uid,
        patient_name=study.patient_name,
        patient_id=study.patient_id,
        issuer_of_patient_id=study.issuer_of_patient_id,
        patient_birth_date=study.patient_birth_date,
        patient_sex=study.patient_sex,
        patient_age=study.patient_age,
        accession_number=study.accession_number,
        study_date=study.study_date,
        study_time=study.study_time,
        study_description=study.study_description,
    )


def _instances(session: Session, study_id: int) -> list[ReportedInstance]:
    rows = session.execute(
        sa.select(Series.series_instance_uid, Instance.sop_class_uid, Instance.sop_instance_uid)
        .join(Series, Series.id == Instance.series_id)
        .where(Instance.study_id == study_id, Instance.is_variant.is_(False))
        .order_by(Series.series_number, Series.id, Instance.instance_number, Instance.id)
    )
    return [ReportedInstance(*row) for row in rows]


def main_modality(modalities: list[str]) -> str:
    """The modality that a report names: the first that makes images."""
    return next((m for m in modalities if m not in _NO_IMAGES), modalities[0] if modalities else "")


def _naive(date: str, time: str) -> datetime | None:
    """DA and TM as the modality's clock has them; None when they are not what PS3.5 6.2 says."""
    digits = time.partition(".")[0].replace(":", "").ljust(6, "0")[:6]
    try:
        return datetime.strptime(date.replace(".", "") + digits, "%Y%m%d%H%M%S")
    except ValueError:
        return None


def _container(pki_dir: Path, identity: str | None, language: Language) -> bytes:
    """The reader's PKCS#12 file. Its name is a plain name in the readers' folder."""
    path = pki_dir / "readers" / Path(identity or "").name
    if not identity or not path.is_file():
        raise BadRequestError(t("reports.no_signing_key", language))
    return path.read_bytes()


def _count_pin_try(database: Database, person: Person, language: Language) -> None:
    """Count a try before the PIN is looked at, so that many at once get no more than one after another.

    Raises BadRequestError after five tries since the last right PIN, within the rest. Outside the study's chain: only
    what came of it belongs there.
    """
    mine = (Event.actor == account_actor(person.account_id), Event.at > sa.func.clock_timestamp() - _PIN_REST)
    last_good = sa.select(sa.func.max(Event.id)).where(Event.name == _PIN_ACCEPTED, *mine)
    since = sa.func.coalesce(last_good.scalar_subquery(), 0)
    with database.centre() as session:
        # Not FOR UPDATE: that would make a draft saved by the same person wait (its row names the account).
        session.execute(sa.select(Account.id).where(Account.id == person.account_id).with_for_update(key_share=True))
        tries = session.execute(
            sa.select(sa.func.count()).where(Event.name == _PIN_TRIED, *mine, Event.id > since)
        ).scalar_one()
        if tries >= _MAX_PIN_FAILURES:
            raise BadRequestError(t("reports.pin_rests", language))
        _note_pin(session, person, _PIN_TRIED)


def _note_pin(session: Session, person: Person, name: str) -> None:
    note_outside_study(
        session, person.site_id, name, subject=Account.__tablename__, subject_id=person.account_id,
        actor=account_actor(person.account_id),
    )  # fmt: skip


def _note_wrong_pin(database: Database, draft: _Draft, person: Person) -> None:
    with database.centre() as session:
        note(
            session,
            draft.study_id,
            "report.pin_refused",
            subject=Report.__tablename__,
            subject_id=draft.content.report_id,
            actor=account_actor(person.account_id),
        )


def _settle(session: Session, draft: _Draft, person: Person, order: Order, values: dict[str, object]) -> None:
    """The one transaction that makes it true."""
    actor = account_actor(person.account_id)
    report_id = draft.content.report_id
    study_id = claims.lock_study_of(session, order.case_id)
    # Whoever archives an image locks the study's row first: from here on none can land unseen.
    _check_images(session.get_one(Study, study_id, populate_existing=True), order)
    values = values | {"author_id": person.account_id}  # who signs, whoever saved the text last
    details = {"version": draft.content.version, "conclusion": draft.content.conclusion.value}
    try:
        move(
            session, Transition.REPORT_SIGNED, report_id, actor=actor, details=details, values=values,
            guard=Report.revision == order.revision,
        )  # fmt: skip
    except IllegalTransitionError as error:
        raise _why_not(session, report_id, order) from error
    earlier = session.scalars(
        sa.select(Report.id).where(
            Report.case_id == order.case_id, Report.state.in_(_SENT_HOME), Report.id != report_id
        )
    ).all()
    for earlier_id in earlier:
        move(session, Transition.REPORT_SUPERSEDED, earlier_id, actor=actor, details={"by_report": report_id})
    freed = {"claimed_by": None, "lease_token": None, "lease_expires_at": None, "new_images": False}
    try:
        move(
            session, Transition.CASE_REPORTED, order.case_id, actor=actor, values=freed,
            guard=claims.held(order.case_id, person, order.lease_token),
        )  # fmt: skip
    except IllegalTransitionError as error:
        raise LeaseLostError("The case left your hands while you signed") from error
    site_id = session.execute(sa.select(Case.site_id).where(Case.id == order.case_id)).scalar_one()
    session.execute(sa.insert(FeedEntry).values(site_id=site_id, report_id=report_id))


def _why_not(session: Session, report_id: int, order: Order) -> ConflictError:
    report = session.scalars(sa.select(Report).where(Report.id == report_id)).one()
    if report.state is ReportState.DRAFT:
        return ConflictError("The draft was saved elsewhere since", "revision")
    return _signed_already(session, report, order.language)


def _signed_already(session: Session, report: Report, language: Language) -> ConflictError:
    author = session.execute(sa.select(Account.display_name).where(Account.id == report.author_id)).scalar_one()
    return ConflictError(t("reports.signed_already", language, author=author, version=report.version), "signed")


def signed_object(objects: Objects, key: str | None, sha256: bytes | None) -> bytes:
    """One object of a signed report, its digest checked. Raises ObjectStoreError if it is not what was signed."""
    if key is None:
        raise ObjectMissingError("The report has no such object")
    data = objects.get(key, locked=True)
    if hashlib.sha256(data).digest() != sha256:
        _LOG.error("report.damaged", key=key)
        raise ObjectStoreError("The stored report does not have the digest it was signed with")
    return data
