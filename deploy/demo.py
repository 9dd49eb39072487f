"""The demonstration: real studies go the whole way, and every fact about them is checked and shown.

Sends by C-STORE to the gateway of a running stack (or of a temporary one), waits until each study has its place in a
queue, lets a reader fetch the images, write and sign one report, and waits until the county PACS has it. Exit status 1
if a digest, a receipt, a chain, a signature or a state is not what it must be. With chaos, processes of the stack are
killed at random moments meanwhile; the outcome must be the same.
"""

import json
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pydicom
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from deploy import assets, demo_watch, stack
from deploy.chaos import Chaos
from deploy.demo_reader import DemoReader
from deploy.demo_send import store_until_success
from deploy.demo_studies import Prepared, prepare
from deploy.seed import GATEWAY_SITE
from dicom_gateway.verify import SignatureReport, verify_pdf
from storage.database import Database
from storage.errors import RetryableError, YuanzhenError
from storage.receipts import load_public_key
from storage.rows import Account, ReaderGrant, Site
from storage.vocabulary import Conclusion, ReportState, StudyState

PATIENCE_S = 120.0
CHAOS_PATIENCE_S = 300.0
CHAOS_SERVICES = ("gateway", "worker", "triage", "web", "ingest", "s3", "clock")
_PAUSE_S = 0.2
_PRINTED_WIDTH = 150  # where there is no terminal: wide enough for the table
_ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"
_TEXT = {
    "findings": "演示报告：由远诊演示程序写入，仅用于核对流程。\nWritten by the demonstration: proves the way only.",
    "impression": "演示用，不作临床依据。 For demonstration only.",
    "conclusion": Conclusion.POSITIVE.value,
    "language": "both",
}
Say = Callable[[str], None]


def run(*, as_json: bool, chaos: bool = False) -> int:
    """Run against the stack of this directory, or a temporary one. Returns the exit status."""
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console = Console(stderr=as_json, width=_PRINTED_WIDTH)
    say: Say = console.print if not as_json else lambda text: console.print(text, highlight=False)
    began = time.monotonic()
    with ExitStack() as cleanup:
        var = stack.var_directory()
        if stack.holder(var) is None:
            var = cleanup.enter_context(_temporary_stack(say))
        result = _Demonstration(var, say, chaos).run()
    result["took_s"] = round(time.monotonic() - began, 1)
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=1))
    else:
        _show(console, result)
    return 0 if result["ok"] else 1


@contextmanager
def _temporary_stack(say: Say) -> Iterator[Path]:
    assets.setup(say=say)
    with tempfile.TemporaryDirectory(prefix="yuanzhen-demo-") as folder:
        var = Path(folder) / "var"
        say("no stack runs here: starting a temporary one")
        with redirect_stdout(sys.stderr):  # stdout is for the facts alone
            stack.up(var, lambda: None)
        try:
            yield var
        finally:
            say(stack.down(var))
            stack.clean(var)


class _Demonstration:
    """One run; `problems` collects what differs."""

    def __init__(self, var: Path, say: Say, chaos: bool) -> None:
        self.var, self.say = var, say
        self.patience_s = CHAOS_PATIENCE_S if chaos else PATIENCE_S
        self.state = stack.read_state(var)
        environment = self.state["environment"]
        self.database = Database(environment["YUANZHEN_DATABASE_URL"], pool_size=2)
        self.pki = Path(environment["YUANZHEN_PKI_DIR"])
        self.receipt_key = load_public_key((self.pki / "receipt.pub").read_bytes())
        self.report_ca = (self.pki / "report-ca.pem").read_bytes()
        self.chaos = Chaos(var, CHAOS_SERVICES, say) if chaos else None
        self.problems: list[str] = []

    def run(self) -> dict[str, Any]:
        """Send, wait, read, sign, wait, compare. Returns the facts."""
        try:
            with tempfile.TemporaryDirectory(prefix="yuanzhen-demo-") as folder, self.chaos or nullcontext():
                files = prepare(Path(folder), secrets.token_hex(8), assets.demo_data(say=self.say))
                site_id = self._site_id()
                gateway = self.state["gateway"]
                self.say(f"sending {len(files)} studies by C-STORE to {gateway['ae_title']}")
                attempts = store_until_success(
                    files,
                    gateway["host"],
                    gateway["port"],
                    gateway["ae_title"],
                    patience_s=self.patience_s,
                    say=self.say,
                )
                self.say("every C-STORE was answered with Success; waiting for triage and routing")
                for file in files:
                    ordered = partial(demo_watch.is_ordered, self.database, site_id, file.study_instance_uid)
                    self._wait(ordered, f"{file.label} has its place in a queue")
                studies = {file.study_instance_uid: self._facts(site_id, file) for file in files}
                report = self._report(files, studies)
                for file in files:
                    studies[file.study_instance_uid] |= self._facts(site_id, file, again=True)
                    self._compare(file, studies[file.study_instance_uid])
        except YuanzhenError as error:
            self.problems.append(error.reason)
            studies, report, attempts = {}, {}, 0
        finally:
            self.database.close()
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "associations": attempts,
            "killed": self.chaos.kills if self.chaos else {},
            "studies": list(studies.values()),
            "report": report,
        }

    def _site_id(self) -> int:
        with self.database.centre() as session:
            return session.execute(sa.select(Site.site_id).where(Site.code == GATEWAY_SITE)).scalar_one()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.patience_s
        while not condition():
            if time.monotonic() > deadline:
                raise RetryableError(f"Waited {self.patience_s:.0f} s in vain until {what}")
            time.sleep(_PAUSE_S)
        self.say(f"  {what}")

    def _facts(self, site_id: int, file: Prepared, *, again: bool = False) -> dict[str, Any]:
        found = demo_watch.facts(self.database, site_id, file.study_instance_uid, self.receipt_key)
        if again:  # the place in the queue is told as it was when the case was ordered
            found.pop("case", None)
            return found
        return {
            "label": file.label,
            "study_instance_uid": file.study_instance_uid,
            "sop_instance_uid": file.sop_instance_uid,
            "sha256_sent": file.sha256,
            **found,
        }

    def _reader_for(self, site_id: int, specialty: str) -> dict[str, str]:
        with self.database.centre() as session:
            name = session.execute(
                sa.select(Account.username)
                .join(ReaderGrant, ReaderGrant.account_id == Account.id)
                .where(ReaderGrant.site_id == site_id, ReaderGrant.specialty == specialty)
                .order_by(Account.id)
                .limit(1)
            ).scalar_one()
        return next(account for account in self.state["accounts"] if account["username"] == name)

    def _report(self, files: list[Prepared], studies: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Read the case that triage moved forward most (or the first), and follow its report home."""
        chosen = min(files, key=lambda file: _advance(studies[file.study_instance_uid]))
        site_id = self._site_id()
        for file in files:
            facts = studies[file.study_instance_uid]
            account = self._reader_for(site_id, facts["case"]["specialty"])
            reader = DemoReader(
                self.state["urls"]["web"], account["username"], account["password"], patience_s=self.patience_s
            )
            try:
                digests = reader.data_set_digests(facts["case_id"], file.study_instance_uid)
                facts["sha256_retrieved"] = digests.get(file.sop_instance_uid, "")
                if file is chosen:
                    self._sign(reader, facts["case_id"], len(digests), account["pin"], file.label)
            finally:
                reader.close()
        case_id = studies[chosen.study_instance_uid]["case_id"]
        self._wait(
            lambda: demo_watch.report_state(self.database, case_id) == ReportState.DELIVERED,
            f"the signed report of the {chosen.label} is in the county PACS",
        )
        signature = self._at_the_county(chosen.study_instance_uid)
        if signature is None or not signature.valid:
            self.problems.append("The report in the county PACS has no valid signature")
        return {
            "study_instance_uid": chosen.study_instance_uid,
            "label": chosen.label,
            "signature_valid": signature is not None and signature.valid,
            "signer": signature.signer if signature else "",
            "covers_whole_document": signature is not None and signature.covers_whole_document,
        }

    def _sign(self, reader: DemoReader, case_id: int, images: int, pin: str, label: str) -> None:
        lease = reader.claim(case_id)
        revision = reader.draft(case_id, lease, _TEXT)
        first = reader.sign(case_id, lease, revision, images, pin)
        if first and reader.sign(case_id, lease, revision, images, pin):
            self.problems.append("The report could be signed twice")
        if not demo_watch.report_state(self.database, case_id):
            self.problems.append(f"The report of the {label} was not signed")
        self.say(f"  the reader claimed, wrote and signed the {label}")

    def _at_the_county(self, study_instance_uid: str) -> SignatureReport | None:
        """The signature of the report as it lies in the county PACS."""
        for path in sorted(Path(self.state["county_pacs"]["directory"]).rglob("*.dcm")):
            found = pydicom.dcmread(path)
            if found.StudyInstanceUID == study_instance_uid and found.SOPClassUID == _ENCAPSULATED_PDF:
                pdf = found.EncapsulatedDocument[: found.get("EncapsulatedDocumentLength")]
                return verify_pdf(bytes(pdf), self.report_ca)
        return None

    def _compare(self, file: Prepared, facts: dict[str, Any]) -> None:
        expected = {
            "state": StudyState.COMPLETE.value,
            "instances": 1,
            "sha256_retrieved": file.sha256,
            "archived_sha256": {file.sop_instance_uid: file.sha256},
        }
        for name, value in expected.items():
            if facts.get(name) != value:
                self.problems.append(f"{file.label}: {name} is {facts.get(name)!r}, expected {value!r}")
        if not facts.get("receipts_valid") or not all(facts["receipts_valid"]):
            self.problems.append(f"{file.label}: no valid receipt of the centre")
        facts["digests_equal"] = facts.get("sha256_retrieved") == file.sha256


def _advance(facts: dict[str, Any]) -> float:
    """Seconds by which the due time was moved, negative for earlier; for choosing the case to read."""
    case = facts["case"]
    due, contract = (datetime.fromisoformat(case[name]) for name in ("due_at", "contract_due_at"))
    return (due - contract).total_seconds()


# Columns of the table: from one milestone to the next, in seconds.
_COLUMNS = {
    "to centre": ("gateway.received", "study.announced"),
    "complete": ("study.announced", "study.completed"),
    "queued": ("study.completed", "case.queued"),
    "triaged": ("case.queued", "triage.done"),
    "read": ("case.claimed", "report.signed"),
    "home": ("report.signed", "report.delivered"),
}


def _show(console: Console, result: dict[str, Any]) -> None:
    table = Table(title="seconds from step to step")
    for name in ("study", "bytes", "queue", "due UTC"):
        table.add_column(name, no_wrap=True)
    table.add_column("triage")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for facts in result["studies"]:
        case = facts.get("case") or {}
        runs = "; ".join(_run_in_words(run) for run in facts.get("triage", []))
        table.add_row(
            facts["label"],
            "equal" if facts.get("digests_equal") else "[red]DIFFER[/red]",
            f"{case.get('specialty', '')} {case.get('queue_position') or ''}",
            case.get("due_at", "")[11:16],
            runs or case.get("triage", "").replace("_", " "),
            *(_seconds(facts.get("milestones", {}), *ends) for ends in _COLUMNS.values()),
        )
    console.print(table)
    report = result["report"]
    if report:
        words = "valid" if report["signature_valid"] else "[red]NOT VALID[/red]"
        console.print(f"report of the {report['label']}: in the county PACS, signature {words}, by {report['signer']}")
    for problem in result["problems"]:
        console.print(f"[red]differs:[/red] {problem}")
    console.print(f"{'as it must be' if result['ok'] else 'NOT as it must be'}, after {result['took_s']} s")


def _seconds(milestones: dict[str, str], start: str, end: str) -> str:
    if start not in milestones or end not in milestones:
        return ""
    took = datetime.fromisoformat(milestones[end]) - datetime.fromisoformat(milestones[start])
    return f"{took.total_seconds():.1f}"


def _run_in_words(run: dict[str, Any]) -> str:
    positive = [
        f"{finding['text_en']} {finding['probability']:.3f}" for finding in run["findings"] if finding.get("positive")
    ]
    reason = run["reason"].rpartition(" / ")[2]  # "中文 / English"
    outcome = ", ".join(positive) or reason or ("no flag" if run["state"] == "done" else run["state"])
    return f"{run['model']} {run['version']}: {outcome}"
