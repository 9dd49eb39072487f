"""The one transition table: every way a row may change state, its letter in docs/lifecycle.md, and its sentence.

Pure. `storage/transitions.py` applies it in SQL; nothing else writes a `state` column. Only what is listed is legal.
"""

from dataclasses import dataclass
from enum import Enum, StrEnum

from storage.vocabulary import CaseState, ReportState, RunState, StudyState, TriageState, UploadState


class Subject(StrEnum):
    """The tables that have a state, by table name (and column, where it is not `state`)."""

    STUDY = "study"
    CASE = "reading_case"
    TRIAGE = "reading_case.triage"
    RUN = "triage_run"
    REPORT = "report"
    UPLOAD = "upload"


@dataclass(frozen=True, slots=True)
class Edge:
    """One arrow of the lifecycle. `sources` empty: the row is born by this transition."""

    letter: str
    subject: Subject
    sources: frozenset[StrEnum]
    target: StrEnum
    sentence: str


def _edge(letter: str, subject: Subject, sources: tuple[StrEnum, ...], target: StrEnum, sentence: str) -> Edge:
    return Edge(letter, subject, frozenset(sources), target, sentence)


_S, _C, _T, _R, _P, _U = StudyState, CaseState, TriageState, RunState, ReportState, UploadState


class Transition(Enum):
    """Name of the transition; its lower-case dotted form is the event's name (`study.completed`)."""

    STUDY_ANNOUNCED = _edge("a", Subject.STUDY, (), _S.RECEIVING, "The first offer names a new study.")
    STUDY_COMPLETED = _edge(
        "b", Subject.STUDY, (_S.RECEIVING,), _S.COMPLETE, "Every announced instance is verified and archived."
    )
    STUDY_EXTENDED = _edge(
        "c", Subject.STUDY, (_S.COMPLETE,), _S.RECEIVING, "More instances arrive for a complete study."
    )
    STUDY_HELD = _edge(
        "d", Subject.STUDY, (_S.RECEIVING, _S.COMPLETE), _S.HELD, "Two patients share this Study Instance UID."
    )
    STUDY_RELEASED = _edge("e", Subject.STUDY, (_S.HELD,), _S.RECEIVING, "A person settled whose study it is.")

    CASE_QUEUED = _edge("f", Subject.CASE, (), _C.QUEUED, "The complete study is routed to a specialty's queue.")
    CASE_CLAIMED = _edge("g", Subject.CASE, (_C.QUEUED,), _C.CLAIMED, "One reader takes the lease.")
    CASE_HANDED_BACK = _edge("h", Subject.CASE, (_C.CLAIMED,), _C.QUEUED, "The reader gives the case back.")
    CASE_LEASE_EXPIRED = _edge("i", Subject.CASE, (_C.CLAIMED,), _C.QUEUED, "The reader's heartbeat stopped.")
    CASE_REPORTED = _edge("j", Subject.CASE, (_C.CLAIMED,), _C.REPORTED, "The reader signed the report.")
    CASE_REOPENED = _edge("k", Subject.CASE, (_C.REPORTED,), _C.QUEUED, "Images arrived after the signature.")
    CASE_SUSPENDED = _edge(
        "l", Subject.CASE, (_C.QUEUED, _C.CLAIMED, _C.REPORTED), _C.SUSPENDED, "The study is held: nobody reads on."
    )
    CASE_RESUMED = _edge("m", Subject.CASE, (_C.SUSPENDED,), _C.QUEUED, "The held study was released.")

    TRIAGE_DONE = _edge(
        "n", Subject.TRIAGE, (_T.PENDING, _T.NOT_TRIAGED), _T.DONE, "A model answered; late answers still count."
    )
    TRIAGE_NOT_FOR_MODEL = _edge(
        "o", Subject.TRIAGE, (_T.PENDING, _T.NOT_TRIAGED), _T.NOT_FOR_MODEL, "Outside the evidence of every model."
    )
    TRIAGE_EXPIRED = _edge("p", Subject.TRIAGE, (_T.PENDING,), _T.NOT_TRIAGED, "No answer by the deadline.")
    TRIAGE_RENEWED = _edge(
        "q",
        Subject.TRIAGE,
        (_T.DONE, _T.NO_MODEL, _T.NOT_FOR_MODEL, _T.NOT_TRIAGED),
        _T.PENDING,
        "The study grew: models are asked again.",
    )

    RUN_DONE = _edge("r", Subject.RUN, (_R.PENDING,), _R.DONE, "The model's findings are stored.")
    RUN_UNSUITABLE = _edge("s", Subject.RUN, (_R.PENDING,), _R.UNSUITABLE, "The model says the study is not for it.")
    RUN_FAILED = _edge("t", Subject.RUN, (_R.PENDING,), _R.FAILED, "The model failed, or was parked.")

    REPORT_DRAFTED = _edge("u", Subject.REPORT, (), _P.DRAFT, "The reader starts to write.")
    REPORT_SIGNED = _edge("v", Subject.REPORT, (_P.DRAFT,), _P.SIGNED, "Signed, locked, on the county's feed.")
    REPORT_RECEIVED = _edge(
        "w", Subject.REPORT, (_P.SIGNED,), _P.RECEIVED, "The gateway has it, and its signature verified there."
    )
    REPORT_DELIVERED = _edge(
        "x", Subject.REPORT, (_P.RECEIVED,), _P.DELIVERED, "The county PACS stored it with Success."
    )
    REPORT_SUPERSEDED = _edge(
        "y",
        Subject.REPORT,
        (_P.SIGNED, _P.RECEIVED, _P.DELIVERED),
        _P.SUPERSEDED,
        "A later version of the report was signed.",
    )

    UPLOAD_RECEIPTED = _edge("z", Subject.UPLOAD, (_U.OFFERED,), _U.RECEIPTED, "The pack is verified and archived.")
    UPLOAD_REJECTED = _edge("A", Subject.UPLOAD, (_U.OFFERED,), _U.REJECTED, "The bytes are not those announced.")
    UPLOAD_RENEWED = _edge("B", Subject.UPLOAD, (_U.REJECTED,), _U.OFFERED, "The gateway offers the pack again.")

    @property
    def event_name(self) -> str:
        """The name of the event row: `case.lease_expired` for CASE_LEASE_EXPIRED."""
        entity, _, verb = self.name.lower().partition("_")
        return f"{entity}.{verb}"

    def allows(self, source: StrEnum | None) -> bool:
        """Whether a row in state `source` (None: not born) may take this transition."""
        return source in self.value.sources if source is not None else not self.value.sources


ENUM_OF_SUBJECT: dict[Subject, type[StrEnum]] = {
    Subject.STUDY: StudyState,
    Subject.CASE: CaseState,
    Subject.TRIAGE: TriageState,
    Subject.RUN: RunState,
    Subject.REPORT: ReportState,
    Subject.UPLOAD: UploadState,
}
