"""The actor `triage_case` on a real database, object store and models: what it stores, moves, and leaves alone.

Left out: the broker and the death of a worker (test_worker_processes.py), and where a case goes when it is moved
(the routing tests). Held-out children need the shared data.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import sqlalchemy as sa
from PIL import Image
from pydicom.dataset import Dataset

import ai_triage.actors
from ai_triage.actors import triage_case
from ai_triage.interface import Suitability
from storage import jobs, transitions
from storage.actors import Context, Outcome
from storage.database import Database
from storage.errors import ObjectStoreError
from storage.objects import Objects
from storage.rows import Case, Event, Job, Pack, Site, Study, TriageRun
from storage.settings import Settings
from storage.states import Transition
from storage.vocabulary import RunMode, RunState, StudyState, TriageState
from tests.archive_material import archive_files, real_file, saved
from tests.centre import Sites, add_case
from tests.triage_material import CXR, computed_radiograph, demonstration_ecg, held_out


@dataclass(frozen=True)
class Centre:
    """What a test of the actor works with."""

    context: Context
    sites: Sites

    def case_of(self, files: Sequence[Path], *, enabled: tuple[str, ...] = ("cxr_pneumonia", "ecg_rhythm")) -> int:
        """A queued case of these files at county A, triage pending, with those models enabled."""
        with self.context.database.centre() as session:
            session.execute(
                sa.update(Site).where(Site.site_id == self.sites.county).values(enabled_models=list(enabled))
            )
            study_id = archive_files(session, self.context.objects, self.sites.county, files)
            age = str(pydicom.dcmread(files[0], stop_before_pixels=True).get("PatientAge") or "")
            session.execute(sa.update(Study).where(Study.id == study_id).values(patient_age=age))
            return add_case(session, study_id, triage=TriageState.PENDING)

    def triage(self, case_id: int) -> Outcome:
        """Enqueue and perform."""
        return self.perform(self.enqueue(case_id))

    def enqueue(self, case_id: int) -> int:
        """A job for the case."""
        with self.context.database.centre() as session:
            return jobs.enqueue(
                session, site_id=self.sites.county, queue="triage", actor="triage_case", subject_id=case_id
            )

    def perform(self, job_id: int) -> Outcome:
        """As a worker would."""
        return triage_case.perform(self.context, job_id)

    def runs(self, case_id: int) -> list[TriageRun]:
        """The runs on a case."""
        with self.context.database.centre() as session:
            return list(
                session.scalars(sa.select(TriageRun).where(TriageRun.case_id == case_id).order_by(TriageRun.id))
            )

    def state(self, case_id: int) -> TriageState:
        """What triage says of the case."""
        with self.context.database.centre() as session:
            return session.get_one(Case, case_id).triage

    def jobs_of(self, actor: str) -> list[int]:
        """Subjects of the jobs of an actor."""
        with self.context.database.centre() as session:
            return list(session.scalars(sa.select(Job.subject_id).where(Job.actor == actor)))

    def event(self, name: str) -> Event:
        """The one event of that name."""
        with self.context.database.centre() as session:
            return session.scalars(sa.select(Event).where(Event.name == name)).one()

    def object(self, key: str | None) -> Dataset:
        """A stored DICOM object."""
        assert key is not None
        return pydicom.dcmread(io.BytesIO(self.context.objects.get(key)))


@pytest.fixture
def centre(database: Database, objects: Objects, configuration: Settings, sites: Sites) -> Centre:
    return Centre(Context(database, objects, configuration), sites)


@pytest.fixture
def sick_child(tmp_path: Path) -> Path:
    return saved(computed_radiograph(held_out(1, 1)[0].pixels), tmp_path / "child.dcm")


def test_an_adult_chest_is_outside_the_evidence_and_moves_nothing(centre: Centre) -> None:
    case_id = centre.case_of([real_file("RG1_UNCR.dcm")])
    assert centre.triage(case_id) is Outcome.DONE
    (run,) = centre.runs(case_id)
    assert run.state is RunState.UNSUITABLE
    assert run.mode is RunMode.ACTIVE
    assert "age outside the evidence" in run.reason
    assert (run.findings, run.sr_key, run.heat_map_key) == ([], None, None)
    assert centre.state(case_id) is TriageState.NOT_FOR_MODEL
    assert centre.jobs_of("reprioritise_case") == []
    assert "age outside" in centre.event("triage.not_for_model").details["reason"]


def test_a_sinus_ecg_is_triaged_without_a_flag_and_moves_nothing(centre: Centre) -> None:
    case_id = centre.case_of([real_file("waveform_ecg.dcm")])
    assert centre.triage(case_id) is Outcome.DONE
    (run,) = centre.runs(case_id)
    assert run.state is RunState.DONE
    assert run.model_name == "ecg_rhythm"
    assert len(run.model_sha256) == 64
    assert run.inference_ms is not None
    assert not any(finding["positive"] for finding in run.findings)
    assert centre.state(case_id) is TriageState.DONE
    assert centre.jobs_of("reprioritise_case") == []
    report = centre.object(run.sr_key)
    assert report.StudyInstanceUID in (run.sr_key or "")
    assert run.heat_map_key is None
    assert run.input_uids == [
        report.CurrentRequestedProcedureEvidenceSequence[0]
        .ReferencedSeriesSequence[0]
        .ReferencedSOPSequence[0]
        .ReferencedSOPInstanceUID
    ]


def test_fibrillation_is_flagged_and_asks_for_an_earlier_place(centre: Centre) -> None:
    case_id = centre.case_of([demonstration_ecg(2)])
    assert centre.triage(case_id) is Outcome.DONE
    (run,) = centre.runs(case_id)
    (positive,) = (finding for finding in run.findings if finding["positive"])
    assert positive["code"] == "atrial_fibrillation"
    assert positive["minutes_earlier"] == 15
    assert positive["text_zh"]
    assert centre.state(case_id) is TriageState.DONE
    assert centre.jobs_of("reprioritise_case") == [case_id]
    details = centre.event("run.done").details
    assert details["model"] == "ecg_rhythm"
    assert details["positive"] == ["atrial_fibrillation"]


def test_a_child_with_pneumonia_is_flagged_with_a_heat_map(centre: Centre, sick_child: Path) -> None:
    case_id = centre.case_of([sick_child])
    assert centre.triage(case_id) is Outcome.DONE
    (run,) = centre.runs(case_id)
    assert run.findings[0]["positive"]
    assert run.findings[0]["minutes_earlier"] == 60
    heat_map = centre.object(run.heat_map_key)
    assert heat_map.SourceImageSequence[0].ReferencedSOPInstanceUID == run.input_uids[0]
    assert heat_map.StudyInstanceUID == centre.object(run.sr_key).StudyInstanceUID
    assert Image.fromarray(heat_map.pixel_array).size == (224, 224)


def test_a_model_that_is_not_enabled_for_the_site_runs_in_shadow_and_moves_nothing(
    centre: Centre, sick_child: Path
) -> None:
    case_id = centre.case_of([sick_child], enabled=())
    assert centre.triage(case_id) is Outcome.DONE
    (run,) = centre.runs(case_id)
    assert run.mode is RunMode.SHADOW
    assert run.state is RunState.DONE
    assert run.findings[0]["positive"]
    assert centre.state(case_id) is TriageState.NOT_FOR_MODEL
    assert centre.jobs_of("reprioritise_case") == []


@pytest.mark.parametrize("name", ["693_UNCR.dcm", "RG3_UNCR.dcm"])
def test_a_study_that_no_model_reads_is_said_to_be_so(centre: Centre, name: str) -> None:
    case_id = centre.case_of([real_file(name)])
    assert centre.triage(case_id) is Outcome.DONE
    assert centre.runs(case_id) == []
    assert centre.state(case_id) is TriageState.NOT_FOR_MODEL
    assert "no model reads this" in centre.event("triage.not_for_model").details["reason"]


def test_a_file_that_cannot_be_decoded_fails_its_run_and_the_case_is_not_triaged(
    centre: Centre, tmp_path: Path
) -> None:
    bomb = computed_radiograph(np.zeros((64, 64), np.uint8))
    bomb.Rows = bomb.Columns = 46341
    case_id = centre.case_of([saved(bomb, tmp_path / "bomb.dcm")])
    assert centre.triage(case_id) is Outcome.DONE
    (run,) = centre.runs(case_id)
    assert run.state is RunState.FAILED
    assert "46341 x 46341" in run.reason
    assert centre.state(case_id) is TriageState.NOT_TRIAGED


def test_run_twice_has_the_effect_of_once(centre: Centre) -> None:
    case_id = centre.case_of([demonstration_ecg(2)])
    job_id = centre.enqueue(case_id)
    assert centre.perform(job_id) is Outcome.DONE
    assert centre.perform(job_id) is Outcome.NOTHING_TO_DO
    assert centre.triage(case_id) is Outcome.DONE  # a second job for the same version of the study
    assert len(centre.runs(case_id)) == 1
    assert centre.event("run.done").subject_id == centre.runs(case_id)[0].id
    assert centre.event("triage.done").subject_id == case_id


def test_an_object_store_that_is_away_is_tried_again_and_the_run_goes_on(
    centre: Centre, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_id = centre.case_of([real_file("waveform_ecg.dcm")])
    job_id = centre.enqueue(case_id)

    def away(*_: object, **__: object) -> bytes:
        raise ObjectStoreError("away")

    with monkeypatch.context() as patched:
        patched.setattr(centre.context.objects, "get", away)
        assert centre.perform(job_id) is Outcome.RETRY
    assert [run.state for run in centre.runs(case_id)] == [RunState.PENDING]
    assert centre.state(case_id) is TriageState.PENDING
    assert centre.perform(job_id) is Outcome.DONE
    assert [run.state for run in centre.runs(case_id)] == [RunState.DONE]


def test_an_answer_after_the_deadline_still_counts(centre: Centre) -> None:
    case_id = centre.case_of([demonstration_ecg(2)])
    with centre.context.database.centre() as session:
        transitions.move(session, Transition.TRIAGE_EXPIRED, case_id, actor="system")
    assert centre.triage(case_id) is Outcome.DONE
    assert centre.state(case_id) is TriageState.DONE
    assert centre.jobs_of("reprioritise_case") == [case_id]


def test_a_study_that_grew_is_asked_about_again(centre: Centre) -> None:
    case_id = centre.case_of([real_file("waveform_ecg.dcm")])
    assert centre.triage(case_id) is Outcome.DONE
    with centre.context.database.centre() as session:
        study_id = session.get_one(Case, case_id).study_id
        session.execute(sa.update(Study).where(Study.id == study_id).values(instance_count=2))
        transitions.move(session, Transition.TRIAGE_RENEWED, case_id, actor="system")
    assert centre.triage(case_id) is Outcome.DONE
    assert [run.study_version for run in centre.runs(case_id)] == [1, 2]
    assert centre.state(case_id) is TriageState.DONE


def _hold(session: sa.orm.Session, case_id: int) -> None:
    case = session.get_one(Case, case_id)
    session.execute(sa.update(Study).where(Study.id == case.study_id).values(state=StudyState.HELD))


def test_a_held_study_and_a_case_that_is_gone_are_nothing_to_do(centre: Centre) -> None:
    case_id = centre.case_of([real_file("waveform_ecg.dcm")])
    with centre.context.database.centre() as session:
        _hold(session, case_id)
    assert centre.triage(case_id) is Outcome.DONE
    assert centre.triage(10**9) is Outcome.DONE
    assert centre.runs(case_id) == []
    assert centre.state(case_id) is TriageState.PENDING


def test_bytes_that_are_gone_from_the_store_fail_the_run_not_the_worker(centre: Centre) -> None:
    case_id = centre.case_of([real_file("waveform_ecg.dcm")])
    with centre.context.database.centre() as session:
        session.execute(sa.update(Pack).values(pack_key="packs/test/none.pack"))
    assert centre.triage(case_id) is Outcome.DONE
    (run,) = centre.runs(case_id)
    assert run.state is RunState.FAILED
    assert centre.state(case_id) is TriageState.NOT_TRIAGED


def test_a_bug_in_a_model_counts_as_a_start_and_leaves_the_case_on_the_worklist(
    centre: Centre, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Buggy:
        card = replace(CXR.card, name="buggy")

        def suits(self, *_: object) -> Suitability:
            return Suitability(True)

        def run(self, *_: object) -> None:
            raise ZeroDivisionError

    found: Callable[[Path], tuple[object, ...]] = lambda directory: (Buggy(),)  # noqa: E731 - a stand-in
    monkeypatch.setattr(ai_triage.actors, "models", found)
    case_id = centre.case_of([real_file("RG1_UNCR.dcm")])
    assert centre.triage(case_id) is Outcome.FAILED
    assert [run.state for run in centre.runs(case_id)] == [RunState.PENDING]
    assert centre.state(case_id) is TriageState.PENDING
