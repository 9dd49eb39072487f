"""A study's way from a gateway into the archive: offer, PUT, commit, receipt, inventory, completion; and duplicates.

Real PostgreSQL, S3 and TLS. What a killed server leaves behind is in test_ingest_faults.py.
"""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from storage import archive, receipts, transitions, wire
from storage.database import Database
from storage.dicomweb import library, queries
from storage.errors import PermanentError
from storage.objects import Objects
from storage.packs import index_of
from storage.rows import Case, Event, Instance, Job, Pack, Series, Study, Upload
from storage.sidecar import read_sidecar
from storage.states import Transition
from storage.transitions import SYSTEM, verify_chain
from storage.vocabulary import CaseState, Priority, StudyState, UploadState
from tests.centre import Sites, add_case
from tests.ingest_peer import Ingest, Peer, county, facts_of, image, ingest, ingest_server, of_data, other_county, pack

__all__ = ["county", "ingest", "ingest_server", "other_county"]


def names(database: Database, study_id: int) -> list[str]:
    with database.centre() as session:
        assert verify_chain(session, study_id) > 0
        return list(session.scalars(sa.select(Event.name).where(Event.study_id == study_id).order_by(Event.sequence)))


def studies(database: Database) -> list[Study]:
    with database.centre() as session:
        return list(session.scalars(sa.select(Study).order_by(Study.id)))


def instances(database: Database) -> list[Instance]:
    with database.centre() as session:
        return list(session.scalars(sa.select(Instance).order_by(Instance.id)))


def test_a_study_is_archived_bit_for_bit_receipted_completed_and_routed(
    county: Peer, ingest: Ingest, database: Database, objects: Objects, tmp_path: Path
) -> None:
    images = [image(f"1.2.3.1.{n}", fill=n) for n in range(1, 4)]
    packed = pack(tmp_path, facts_of(), images)
    answer = county.send(packed)
    assert answer.status == "receipted" and answer.receipt is not None
    receipts.verify(
        answer.receipt, receipts.load_public_key(ingest.pki.receipt_public_key.read_bytes()), site="county-a"
    )
    assert [(line.sop_instance_uid, line.sha256) for line in answer.receipt.instances] == [
        (i.facts.sop_instance_uid, i.facts.sha256) for i in images
    ]
    study = studies(database)[0]
    assert (study.state, study.instance_count, study.series_count) == (StudyState.RECEIVING, 3, 1)
    assert (study.patient_name, study.modalities, study.body_part_examined) == ("Zhang^San=张^三", ["CR"], "CHEST")
    assert county.inventory(images).complete
    assert names(database, study.id) == ["study.announced", "upload.receipted", "study.completed"]
    with database.county(study.site_id) as session:
        for row, sent in zip(session.scalars(sa.select(Instance).order_by(Instance.id)), images, strict=True):
            data = archive.read_instance(session, objects, row)
            assert data == sent.data and row.header_sha256.hex() == sent.facts.header_sha256
        stored = session.scalars(sa.select(Pack)).one()
        assert index_of(objects.get(stored.pack_key)).study.patient_id == "P1"
        sidecar = read_sidecar(objects.get(stored.sidecar_key))
        assert sidecar.instances[0].metadata["00100010"]["Value"] == [
            {"Alphabetic": "Zhang^San", "Ideographic": "张^三"}
        ]
        offset, length = sidecar.instances[0].frames[0][0]
        assert images[0].data[offset : offset + length] == b"\1\0" * 256
        announced = session.scalars(sa.select(Event).where(Event.name == "study.announced")).one()
        assert announced.details["gateway_received_at"] and announced.details["acquired_at"]
        assert [(j.queue, j.actor, j.subject_id) for j in session.scalars(sa.select(Job))] == [
            ("route", "route_study", study.id)
        ]
        series = session.scalars(sa.select(Series)).one()
        assert (series.modality, series.series_number, series.instance_count) == ("CR", 3, 3)
    assert list(objects.list("staging/county-a/")) == []


def test_a_pack_offered_again_after_its_receipt_gets_the_same_receipt_at_once(county: Peer, tmp_path: Path) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    first = county.send(packed).receipt
    answer = county.offer(packed.offer())
    assert answer.puts == () and answer.receipts == (first,)
    assert county.commit(packed).receipt == first


def test_instances_already_archived_are_receipted_in_a_new_pack_without_a_byte_sent(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    images = [image("1.2.3.1.1"), image("1.2.3.1.2", fill=8)]
    county.send(pack(tmp_path, facts_of(), images))
    answer = county.offer(pack(tmp_path, facts_of(), images[:1]).offer())
    assert answer.puts == () and [line.sha256 for line in answer.receipts[0].instances] == [images[0].facts.sha256]
    assert len(instances(database)) == 2


def test_a_pack_that_repeats_an_archived_instance_adds_only_the_new_one(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    first, second = image("1.2.3.1.1"), image("1.2.3.1.2", fill=8)
    county.send(pack(tmp_path, facts_of(), [first]))
    receipt = county.send(pack(tmp_path, facts_of(), [first, second])).receipt
    assert receipt is not None and len(receipt.instances) == 2
    assert len(instances(database)) == 2 and studies(database)[0].instance_count == 2


def test_other_bytes_than_announced_are_rejected_with_an_event_and_may_be_offered_again(
    county: Peer, database: Database, objects: Objects, tmp_path: Path
) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    order = county.offer(packed.offer()).puts[0]
    county.put(order, bytes(len(packed.data)))
    answer = county.commit(packed)
    assert answer.status == "rejected" and "SHA-256" in answer.reason
    assert county.commit(packed).status == "rejected"
    assert instances(database) == [] and list(objects.list("packs/county-a/1/" + packed.plan.pack_id)) == []
    again = county.offer(packed.offer()).puts[0]
    assert again.url.split("?")[0] != order.url.split("?")[0]
    county.put(again, packed.data)
    assert county.commit(packed).status == "receipted"
    study = studies(database)[0]
    assert names(database, study.id) == ["study.announced", "upload.rejected", "upload.renewed", "upload.receipted"]


def test_a_pack_of_another_size_is_rejected_without_being_read(county: Peer, tmp_path: Path) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    county.put(county.offer(packed.offer()).puts[0], packed.data + b"\0")
    answer = county.commit(packed)
    assert answer.status == "rejected" and str(len(packed.data)) in answer.reason


def test_a_commit_before_the_put_is_rejected_and_not_lost(county: Peer, tmp_path: Path) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    county.offer(packed.offer())
    assert county.commit(packed).status == "rejected"
    assert county.send(packed).status == "receipted"


def test_a_pack_whose_index_lies_about_its_instances_is_rejected(county: Peer, tmp_path: Path) -> None:
    true, other = image("1.2.3.1.1"), image("1.2.3.1.2", fill=9)
    packed = pack(tmp_path, facts_of(), [true])
    packed.images = [other]
    packed.plan = packed.plan.model_copy(update={"digests": (other.facts.sha256,)})
    answer = county.send(packed)
    assert answer.status == "rejected" and "other instances" in answer.reason


def test_an_offer_kept_open_keeps_its_staging_key_so_that_a_put_before_a_restart_counts(
    county: Peer, tmp_path: Path
) -> None:
    packed = pack(tmp_path, facts_of(), [image("1.2.3.1.1")])
    county.put(county.offer(packed.offer()).puts[0], packed.data)
    county.offer(packed.offer())
    assert county.commit(packed).status == "receipted"


def test_an_instance_that_is_no_data_set_is_kept_bit_for_bit_with_a_note(
    county: Peer, database: Database, objects: Objects, tmp_path: Path
) -> None:
    broken = of_data("1.2.3.1.1", "1.2.3.1", image("1.2.3.1.1").data[:-100], "1.2.840.10008.1.2.1")
    assert county.send(pack(tmp_path, facts_of(), [broken])).status == "receipted"
    row = instances(database)[0]
    with database.county(row.site_id) as session:
        assert archive.read_instance(session, objects, row) == broken.data
        sidecar = read_sidecar(objects.get(session.scalars(sa.select(Pack.sidecar_key)).one()))
    assert "bytes announced" in sidecar.instances[0].note
    assert sidecar.instances[0].metadata["0020000D"]["Value"] == ["1.2.3"]


def test_the_same_uid_with_other_pixels_is_a_variant_beside_the_first(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    first, other = image("1.2.3.1.1", fill=1), image("1.2.3.1.1", fill=2)
    county.send(pack(tmp_path, facts_of(), [first]))
    assert county.send(pack(tmp_path, facts_of(), [other])).status == "receipted"
    rows = instances(database)
    assert [row.is_variant for row in rows] == [False, True]
    study = studies(database)[0]
    assert study.instance_count == 1 and "instance.variant" in names(database, study.id)
    assert county.inventory([first, other]).complete


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2"])
def test_the_same_content_in_another_encoding_is_already_stored(
    county: Peer, database: Database, tmp_path: Path, syntax: str
) -> None:
    first, again = image("1.2.3.1.1"), image("1.2.3.1.1", transfer_syntax_uid=syntax)
    assert first.data != again.data
    county.send(pack(tmp_path, facts_of(), [first]))
    receipt = county.send(pack(tmp_path, facts_of(), [again])).receipt
    assert receipt is not None and receipt.instances[0].sha256 == again.facts.sha256
    assert len(instances(database)) == 1 and "instance.variant" not in names(database, 1)
    assert county.inventory([first, again]).complete, "a receipted instance must not be asked for again"


def test_two_patients_under_one_study_uid_are_two_held_studies(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    county.send(pack(tmp_path, facts_of(), [image("1.2.3.1.1")]))
    with database.centre() as session:
        case_id = add_case(session, studies(database)[0].id)
    county.send(pack(tmp_path, facts_of(patient_id="P2"), [image("1.2.3.1.2", patient_id="P2")]))
    first, second = studies(database)
    assert (first.state, second.state) == (StudyState.HELD, StudyState.HELD)
    assert (first.patient_id, second.patient_id) == ("P1", "P2")
    assert (first.instance_count, second.instance_count) == (1, 1)
    with database.centre() as session:
        assert session.get_one(Case, case_id).state is CaseState.SUSPENDED
    assert "study.held" in names(database, first.id) and "study.held" in names(database, second.id)
    assert not county.inventory([image("1.2.3.1.9")], patient_id="P2").complete
    with database.centre() as session:
        assert session.scalars(sa.select(Job)).all() == [], "a held study is not routed"


def test_a_data_set_that_names_another_patient_than_its_offer_is_kept_and_the_study_held(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    assert county.send(pack(tmp_path, facts_of(), [image("1.2.3.1.1", patient_id="P9")])).status == "receipted"
    study = studies(database)[0]
    assert study.state is StudyState.HELD and len(instances(database)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"patient_id": "", "patient_name": "Wang^Wu"}, {"patient_id": "", "patient_name": "Li^Si"}),
        (
            {"patient_id": "000000", "patient_name": "Wang^Wu", "patient_birth_date": "19500101", "patient_sex": "M"},
            {"patient_id": "000000", "patient_name": "Li^Si", "patient_birth_date": "19900101", "patient_sex": "F"},
        ),
        (
            {"patient_id": "P1", "patient_birth_date": "19500101"},
            {"patient_id": "P1", "patient_birth_date": "19900101"},
        ),
    ],
)
def test_two_patients_whose_id_is_the_same_or_empty_are_two_held_studies(
    county: Peer, database: Database, tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    for number, patient in enumerate((one, other), start=1):
        images = [image(f"1.2.3.1.{number}.{n}", fill=n, **patient) for n in range(number)]
        assert county.send(pack(tmp_path, facts_of(**patient), images)).status == "receipted"
        assert county.inventory(images, patient_id=patient["patient_id"]).complete
    rows = studies(database)
    assert [(row.state, row.instance_count) for row in rows] == [(StudyState.HELD, 1), (StudyState.HELD, 2)]
    with database.centre() as session:
        expected = session.scalars(sa.select(Study.expected_count).order_by(Study.id)).all()
    assert expected == [1, 2], "each inventory belongs to the patient whose images it names"


@pytest.mark.parametrize(
    ("offered", "said"),
    [
        ({"patient_id": ""}, {"patient_id": "", "patient_name": "Li^Si"}),
        ({"patient_birth_date": "19500101"}, {"patient_birth_date": "19900101"}),
        ({"patient_sex": "M"}, {"patient_sex": "F"}),
    ],
)
def test_a_data_set_of_another_person_than_its_offer_is_kept_and_the_study_held(
    county: Peer, database: Database, tmp_path: Path, offered: dict[str, Any], said: dict[str, Any]
) -> None:
    county.send(pack(tmp_path, facts_of(**offered), [image("1.2.3.1.1", **said)]))
    assert studies(database)[0].state is StudyState.HELD and len(instances(database)) == 1


@pytest.mark.parametrize("patient_id", ["A\\B", "A \\ B", "A\\"])
def test_a_patient_id_with_a_backslash_does_not_contradict_its_offer(
    county: Peer, database: Database, tmp_path: Path, patient_id: str
) -> None:
    one = image("1.2.3.1.1", patient_id=patient_id)
    county.send(pack(tmp_path, facts_of(patient_id=patient_id), [one]))
    assert county.inventory([one], patient_id=patient_id).complete
    assert studies(database)[0].state is StudyState.COMPLETE


def test_images_sent_again_under_a_corrected_study_uid_are_seen_there_and_both_studies_say_so(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    for study in ("1.2.3", "1.2.4"):
        images = [image(f"7.7.{n}", study=study, series="7.7", fill=n) for n in range(1, 4)]
        county.send(pack(tmp_path, facts_of(study), images))
        assert county.inventory(images, study=study).complete
    rows = studies(database)
    assert [(row.state, row.instance_count, row.series_count) for row in rows] == [(StudyState.COMPLETE, 3, 1)] * 2
    assert [row.has_variants for row in rows] == [True, True]
    assert names(database, rows[1].id).count("instance.variant") == 3
    with database.centre() as session:
        scope = library.Scope((rows[1].id,), "/x")
        assert len(library.find_instances(session, scope, "1.2.4")) == 3
        assert len(queries.run(session, scope, queries.Level.INSTANCE, queries.Query(), "1.2.4")) == 3
        details = session.scalars(sa.select(Event.details).where(Event.name == "instance.variant")).first()
    assert details == {"sop_instance_uid": "7.7.1", "is_variant": False, "other_studies": [rows[0].id]}


def test_a_series_of_variants_alone_is_not_shown_as_an_empty_one(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    first, other = image("1.2.3.1.1", fill=1), image("1.2.3.1.1", series="1.2.3.2", fill=2)
    county.send(pack(tmp_path, facts_of(), [first]))
    county.send(pack(tmp_path, facts_of(), [other]))
    study = studies(database)[0]
    assert (study.instance_count, study.series_count, study.has_variants) == (1, 1, True)
    with database.centre() as session:
        answers = queries.run(session, library.Scope((study.id,), "/x"), queries.Level.SERIES, queries.Query(), "1.2.3")
    assert [answer.series_instance_uid for answer in answers] == ["1.2.3.1"]


def test_a_study_uid_that_a_store_takes_for_a_path_is_refused_and_no_key_is_made_of_one(
    county: Peer, database: Database, objects: Objects, tmp_path: Path
) -> None:
    for uid in (".", "..", "1..2", ".1", "1."):
        body = pack(tmp_path, facts_of(), [image("1.2.3.1.1")]).offer().model_dump(mode="json")
        body["study"]["study_instance_uid"] = uid
        assert county.http.post("/gateway/v1/offer", json=body).status_code == 400
    data = image("1.2.3.1.1", study="1.12.3").data.replace(b"1.12.3", b"1.02.3")  # pydicom would not write it
    padded = of_data("1.2.3.1.1", "1.2.3.1", data, "1.2.840.10008.1.2.1")
    county.send(pack(tmp_path, facts_of("1.02.3"), [padded]))
    study = studies(database)[0]
    assert study.study_instance_uid == "1.02.3" and study.state is StudyState.RECEIVING
    with database.centre() as session:
        assert session.scalars(sa.select(Pack.pack_key)).one().startswith(f"packs/county-a/{study.id}/")
    with pytest.raises(PermanentError):
        objects.put("packs/county-a/../x", b"x")


def test_an_inventory_of_another_patient_with_the_same_id_is_not_taken_for_this_ones(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    born: dict[str, Any] = {"patient_birth_date": "19500101"}
    county.send(pack(tmp_path, facts_of(**born), [image("1.2.3.1.1", **born)]))
    line = wire.ReceiptLine(sop_instance_uid="1.2.3.1.9", sha256="0" * 64)
    message = wire.Inventory(
        study_instance_uid="1.2.3",
        patient_id="P1",
        patient_birth_date="19900101",
        instances=(line,),
        quiet_since=datetime.now(UTC),
    )
    answer = wire.InventoryAnswer.model_validate_json(county.post("inventory", message).content)
    assert answer.missing == (line,) and studies(database)[0].expected_count is None


def test_one_study_and_patient_id_from_two_hospitals_are_two_independent_studies(
    county: Peer, other_county: Peer, database: Database, tmp_path: Path
) -> None:
    one = image("1.2.3.1.1")
    assert county.send(pack(tmp_path, facts_of(), [one])).status == "receipted"
    assert other_county.send(pack(tmp_path, facts_of(), [one])).status == "receipted"
    rows = studies(database)
    assert len({row.site_id for row in rows}) == 2 and all(row.state is StudyState.RECEIVING for row in rows)
    assert len(instances(database)) == 2 and not any(row.is_variant for row in instances(database))
    assert county.inventory([one]).complete
    assert [row.state for row in studies(database)] == [StudyState.COMPLETE, StudyState.RECEIVING]


def test_an_inventory_before_the_last_pack_names_what_is_missing_and_the_last_pack_completes(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    first, second = image("1.2.3.1.1"), image("1.2.3.1.2", fill=8)
    county.send(pack(tmp_path, facts_of(), [first]))
    answer = county.inventory([first, second])
    assert not answer.complete and [line.sop_instance_uid for line in answer.missing] == ["1.2.3.1.2"]
    county.send(pack(tmp_path, facts_of(), [second]))
    assert studies(database)[0].state is StudyState.COMPLETE


def test_an_inventory_of_a_study_never_offered_misses_everything(county: Peer) -> None:
    assert len(county.inventory([image("1.2.3.1.1")], study="9.9").missing) == 1


@pytest.mark.parametrize(
    ("state", "after"),
    [
        (CaseState.QUEUED, CaseState.QUEUED),
        (CaseState.CLAIMED, CaseState.CLAIMED),
        (CaseState.REPORTED, CaseState.QUEUED),
    ],
)
def test_more_images_extend_a_complete_study_and_flag_a_case_that_was_begun(
    county: Peer, database: Database, tmp_path: Path, state: CaseState, after: CaseState
) -> None:
    first, second, third = (image(f"1.2.3.1.{n}", fill=n) for n in range(1, 4))
    county.send(pack(tmp_path, facts_of(), [first]))
    county.inventory([first])
    study = studies(database)[0]
    with database.centre() as session:
        case_id = add_case(session, study.id, state=state)
    county.send(pack(tmp_path, facts_of(), [second]))
    assert studies(database)[0].state is StudyState.RECEIVING, "its inventory is out of date"
    county.send(pack(tmp_path, facts_of(), [third]))
    assert county.inventory([first, second, third]).complete
    with database.centre() as session:
        case = session.get_one(Case, case_id)
        assert (case.state, case.new_images) == (after, state is not CaseState.QUEUED)
        jobs = session.scalars(sa.select(Job.actor)).all()
    assert jobs == ["route_study", "route_study"]
    happened = names(database, study.id)
    assert happened.count("study.extended") == 1 and happened.count("study.completed") == 2
    assert happened.count("case.reopened") == (state is CaseState.REPORTED)
    assert happened.count("case.new_images") == (state is CaseState.CLAIMED)


def test_an_inventory_that_promises_more_takes_a_complete_study_back_to_receiving(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    first, second = image("1.2.3.1.1"), image("1.2.3.1.2", fill=8)
    county.send(pack(tmp_path, facts_of(), [first]))
    county.inventory([first])
    assert not county.inventory([first, second]).complete
    assert studies(database)[0].state is StudyState.RECEIVING


def test_a_later_offer_may_raise_the_priority_and_never_lower_it(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    for priority, expected in (
        (Priority.URGENT, Priority.URGENT),
        (Priority.ROUTINE, Priority.URGENT),
        (Priority.STAT, Priority.STAT),
    ):
        county.offer(pack(tmp_path, facts_of(priority=priority), [image("1.2.3.1.1")]).offer())
        assert studies(database)[0].priority is expected
    assert names(database, 1).count("study.priority_raised") == 1


def test_a_complete_study_whose_priority_is_raised_is_routed_again(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    one = image("1.2.3.1.1")
    county.send(pack(tmp_path, facts_of(calling_ae_title="CT1"), [one]))
    county.inventory([one])
    county.offer(pack(tmp_path, facts_of(priority=Priority.STAT), [one]).offer())
    assert (studies(database)[0].state, studies(database)[0].calling_ae_title) == (StudyState.COMPLETE, "CT1")
    with database.centre() as session:
        assert session.scalars(sa.select(Job.actor)).all() == ["route_study"] * 2


def test_a_released_study_takes_more_images_of_its_patient_without_being_held_again(
    county: Peer, database: Database, tmp_path: Path
) -> None:
    county.send(pack(tmp_path, facts_of(), [image("1.2.3.1.1")]))
    county.send(pack(tmp_path, facts_of(patient_id="P2"), [image("1.2.3.1.2", patient_id="P2")]))
    with database.centre() as session:
        transitions.move(session, Transition.STUDY_RELEASED, 1, actor=SYSTEM)
    county.send(pack(tmp_path, facts_of(), [image("1.2.3.1.3", fill=3)]))
    assert [row.state for row in studies(database)] == [StudyState.RECEIVING, StudyState.HELD]


def test_a_pack_larger_than_memory_would_like_is_archived_from_a_file(
    county: Peer, database: Database, objects: Objects, sites: Sites, tmp_path: Path
) -> None:
    big = image("1.2.3.1.1", side=5000)  # 50 MB: above the size from which S3 gets it in parts
    assert county.send(pack(tmp_path, facts_of(), [big])).status == "receipted"
    with database.county(sites.county) as session:
        data = archive.read_instance(session, objects, session.scalars(sa.select(Instance)).one())
    assert hashlib.sha256(data).hexdigest() == big.facts.sha256


def test_uploads_end_receipted(county: Peer, database: Database, tmp_path: Path) -> None:
    county.send(pack(tmp_path, facts_of(), [image("1.2.3.1.1")]))
    with database.centre() as session:
        assert session.scalars(sa.select(Upload.state)).all() == [UploadState.RECEIPTED]
