"""Reading identity: Chinese names under every wrong label round trip, Western names stay, and every file of pydicom has
an identity or a named reason. Not covered: strings that are truly ambiguous, of which there are a few in ten thousand;
hypothesis runs from a fixed seed here so that it does not pick a new one of those each time."""

import contextlib
import random
import time
import warnings
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydicom.charset import encode_string
from pydicom.dataset import Dataset

from dicom_gateway.character_sets import choose
from dicom_gateway.identity import identify
from storage.character_sets import declared_codec, decode
from storage.dataset import find_pixel_data
from storage.errors import MalformedDataSetError
from storage.vocabulary import Priority
from tests.gateway_kit import data_set_of, encode, pydicom_files, sample, settings_for

EXPLICIT = "1.2.840.10008.1.2.1"
NOW = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)
CHINA = ZoneInfo("Asia/Shanghai")


def hanzi(first_row, last_row):
    """Characters of GB 2312 between two rows."""
    found = []
    for row in range(first_row, last_row + 1):
        for cell in range(0xA1, 0xFF):
            with contextlib.suppress(UnicodeDecodeError):
                found.append(bytes([row, cell]).decode("gb2312"))
    return found


COMMON, RARER = hanzi(0xB0, 0xD7), hanzi(0xD8, 0xF7)
WITH_DELIMITER_BYTES = [
    bytes([lead, trail]).decode("gbk")
    for lead in range(0x81, 0xFE)
    for trail in (0x5C, 0x5E)
    if bytes([lead, trail]).decode("gbk", "ignore").isalpha()
]
"""Characters of GBK whose second byte is a backslash or a caret."""

common_names = st.builds(
    lambda family, given: f"{family}^{given}",
    st.sampled_from(COMMON),
    st.text(st.sampled_from(COMMON + RARER), min_size=1, max_size=3),
)
names_with_delimiter_bytes = st.builds(
    lambda family, given, more: f"{family}^{given}{more}",
    st.sampled_from(COMMON),
    st.sampled_from(WITH_DELIMITER_BYTES),
    st.sampled_from(["", *COMMON]),
)
wrong_labels = st.sampled_from(["", "ISO_IR 100", "ISO_IR 6", "ISO 2022 IR 6", "ISO 2022 IR 100", "nonsense"])


def read(name, declared, encoding):
    raw = name.encode(encoding)
    reading = choose(declared, [raw])
    return reading.read(raw), reading.repaired


@settings(max_examples=500, derandomize=True)
@given(st.one_of(common_names, names_with_delimiter_bytes), wrong_labels, st.sampled_from(["gbk", "gb18030"]))
def test_a_chinese_name_in_gbk_under_a_wrong_label_is_read_and_the_repair_named(name, declared, encoding):
    assert read(name, declared, encoding) == (name, "GB18030")


@settings(max_examples=500, derandomize=True)
@given(common_names, st.one_of(wrong_labels, st.just("GB18030"), st.just("GBK")))
def test_a_chinese_name_in_utf_8_under_a_wrong_label_is_read_and_the_repair_named(name, declared):
    assert read(name, declared, "utf-8") == (name, "ISO_IR 192")


@settings(max_examples=300, derandomize=True)
@given(st.one_of(common_names, names_with_delimiter_bytes))
def test_a_chinese_name_in_gbk_labelled_utf_8_is_read_and_the_repair_named(name):
    assert read(name, "ISO_IR 192", "gb18030") == (name, "GB18030")


@settings(max_examples=300, derandomize=True)
@given(st.one_of(common_names, names_with_delimiter_bytes), st.sampled_from(["GB18030", "GBK", "ISO 2022 GBK"]))
def test_a_chinese_name_under_its_own_label_needs_no_repair(name, declared):
    assert read(name, declared, "gb18030") == (name, "")
    assert read(name, "ISO_IR 192", "utf-8") == (name, "")


@pytest.mark.parametrize(
    "name",
    ["Müller^Jörg", "Conceição^João", "PÉREZ^JOSÉ", "Grüße", "Ångström^Östen", "Nuñez^Íñigo", "Lefèvre^Zoë", "Øre^Åse",
     "Winkel 30°", "5 µl", "Straße 7", "O’Brien"],
)  # fmt: skip
@pytest.mark.parametrize("declared", ["ISO_IR 100", ""])
def test_a_western_name_is_not_taken_for_chinese(name, declared):
    encoding = "cp1252" if "’" in name else "latin_1"
    expected = name.replace("’", "") if "’" in name else name  # 0x92 is a control character of ISO 8859-1
    assert read(name, declared, encoding)[0] == expected
    assert read(name, declared, encoding)[1] in ("", "ISO_IR 100")


@pytest.mark.parametrize("name", ["Müller^Jörg", "Łukasz^Żak", "Иванов^Пётр", "Διονυσιος", "王^小明"])
@pytest.mark.parametrize("declared", ["ISO_IR 192", "ISO_IR 100", ""])
def test_a_name_in_utf_8_is_read_whatever_its_script(name, declared):
    assert read(name, declared, "utf-8") == (name, "" if declared == "ISO_IR 192" else "ISO_IR 192")


def test_all_text_of_a_data_set_is_evidence_together():
    name, description = "区^誠".encode("gbk"), "胸部CT平扫".encode("gbk")
    reading = choose("ISO_IR 100", [name, description, b"P-0001"])
    assert [reading.read(value) for value in (name, description)] == ["区^誠", "胸部CT平扫"]


def test_a_name_cut_off_inside_a_character_is_still_read():
    raw = ("王^小明" * 5).encode("gbk")[:-1]
    assert choose("", [raw]).read(raw).startswith("王^小明王^小")


@pytest.mark.parametrize(
    ("declared", "codecs", "text"),
    [
        ("ISO 2022 IR 6\\ISO 2022 IR 58", ["iso8859", "iso_ir_58"], "Zhang^XiaoDong=张^小东="),
        ("\\ISO 2022 IR 149", ["iso8859", "euc_kr"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("\\ISO 2022 IR 87", ["iso8859", "iso2022_jp"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 144", ["iso_ir_144"], "Люкceмбypг"),
        ("ISO_IR 126", ["iso_ir_126"], "Διονυσιος"),
        ("ISO_IR 166", ["iso_ir_166"], "สมชาย"),
    ],
)
def test_escape_sequences_and_other_scripts_are_read_as_labelled(declared, codecs, text):
    raw = encode_string(text, codecs)
    reading = choose(declared, [raw])
    assert (reading.read(raw), reading.repaired) == (text, "")


@given(st.text(max_size=40), st.lists(st.binary(max_size=60), max_size=4))
def test_any_label_and_any_bytes_give_some_reading_without_control_characters(declared, values):
    reading = choose(declared, values)
    for value in values:
        text = reading.read(value)
        assert all(character.isprintable() or not character.isascii() for character in text)
        text.encode("utf-8")


def test_labels_are_known_however_they_are_spelled():
    for label in ("ISO_IR 192", "ISO IR 192", "iso-ir-192", "IR 192", "UTF-8", "ISO_IR 192 "):
        assert declared_codec([label]) == "utf_8"
    assert declared_codec(["GB2312"]) == declared_codec(["ISO 2022 58"]) == "gb18030"
    assert declared_codec(["", "ISO 2022 IR 58"]) == declared_codec(["ISO 2022 IR 6", "GBK"]) == "gb18030"
    assert declared_codec([""]) is declared_codec([]) is declared_codec(["ISO 2022"]) is None


@pytest.mark.parametrize(
    ("codec", "value", "text"),
    [
        # PS3.5 6.1.2.5.3: after a delimiter the first character set is active again.
        ("latin_1", b"\x1b$)C\xb1\xe8^M\xfcller", "김^Müller"),
        ("latin_1", b"\x1b$)A\xcd\xf5\\\xe9", "王\\é"),
        # In ASCII a byte above 127 means nothing: the sender forgot to repeat the sequence.
        ("ascii", b"\x1b$)C\xb1\xe8^\xb1\xe8", "김^김"),
        ("ascii", b"Wang=\x1b$)A\xcd\xf5^\xd0\xa1\xb6\xab", "Wang=王^小东"),
        ("ascii", b"M\xfcller", "Müller"),
        ("utf_8", b"\x1b[31mred", "[31mred"),  # no sequence of DICOM's
        ("shift_jis", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J", "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎"),
    ],
)
def test_escape_sequences_hold_as_far_as_the_standard_or_else_the_sender_meant(codec, value, text):
    assert decode(value, codec) == text


def identity_of(data_set, zone=CHINA):
    titles = {"calling_ae_title": "CT1", "called_ae_title": "YUANZHEN"}
    return identify(encode(data_set, EXPLICIT), EXPLICIT, received_at=NOW, zone=zone, **titles)


def test_facts_are_read_and_decoded():
    data_set = sample()
    data_set.SpecificCharacterSet = "GB18030"
    data_set.PatientName = "Wang^XiaoMing=王^小明"
    data_set.PatientID, data_set.AccessionNumber = "P-0001", "A-0001"
    data_set.StudyDescription = "胸部CT平扫"
    data_set.PatientBirthDate, data_set.PatientAge = "19700131", "056Y"
    data_set.RequestedProcedurePriority = "STAT"
    data_set.ReasonForTheRequestedProcedure = "咳嗽"
    data_set.AcquisitionDate, data_set.AcquisitionTime = "20261101", "160102.5"
    data_set.TimezoneOffsetFromUTC = "+0800"
    study = identity_of(data_set).study
    assert (study.patient_name, study.patient_id, study.accession_number) == (
        "Wang^XiaoMing=王^小明",
        "P-0001",
        "A-0001",
    )
    assert (study.study_description, study.clinical_question) == ("胸部CT平扫", "咳嗽")
    assert (study.patient_birth_date, study.patient_age, study.priority) == ("19700131", "056Y", Priority.STAT)
    assert (study.specific_character_set, study.repaired_character_set) == ("GB18030", "")
    assert study.acquired_at == datetime(2026, 11, 1, 8, 1, 2, 500_000, tzinfo=UTC)
    assert (study.first_received_at, study.calling_ae_title) == (NOW, "CT1")


def acquired_at(zone=CHINA, **elements):
    data_set = sample()
    for keyword in ("AcquisitionDateTime", "AcquisitionDate", "ContentDate", "TimezoneOffsetFromUTC"):
        if keyword in data_set:
            delattr(data_set, keyword)
    data_set.StudyDate, data_set.StudyTime = "20261101", "160102.5"
    for keyword, value in elements.items():
        setattr(data_set, keyword, value)
    return identity_of(data_set, zone).study.acquired_at


@pytest.mark.parametrize("machine", ["UTC", "America/New_York", "Asia/Shanghai"])
def test_a_time_without_a_zone_is_in_the_gateways_setting_whatever_the_machine_is_set_to(machine, monkeypatch):
    monkeypatch.setenv("TZ", machine)
    time.tzset()
    try:
        expected = datetime(2026, 11, 1, 8, 1, 2, 500_000, tzinfo=UTC)
        assert acquired_at() == expected
        assert acquired_at(ZoneInfo("Asia/Urumqi")) == expected + timedelta(hours=2)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_offset_in_the_data_set_wins_over_the_setting_and_one_in_the_value_over_both():
    assert acquired_at(TimezoneOffsetFromUTC="+0600") == datetime(2026, 11, 1, 10, 1, 2, 500_000, tzinfo=UTC)
    assert acquired_at(TimezoneOffsetFromUTC="-0330") == datetime(2026, 11, 1, 19, 31, 2, 500_000, tzinfo=UTC)
    assert acquired_at(TimezoneOffsetFromUTC="China") == datetime(2026, 11, 1, 8, 1, 2, 500_000, tzinfo=UTC)
    both = acquired_at(TimezoneOffsetFromUTC="+0600", AcquisitionDateTime="20261101160102+0900")
    assert both == datetime(2026, 11, 1, 7, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("name", ["Asia/Nowhere", "", "Asia", "../etc/passwd"])
def test_a_time_zone_that_does_not_exist_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValidationError, match=f"there is no time zone '{name}'"):
        settings_for(tmp_path / "spool", timezone=name)


def test_a_study_without_a_patient_name_is_fine():
    data_set = sample()
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyDate", "AcquisitionDate"):
        if keyword in data_set:
            delattr(data_set, keyword)
    study = identity_of(data_set).study
    assert (study.patient_name, study.patient_id, study.patient_birth_date) == ("", "", "")


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
def test_a_missing_or_impossible_uid_is_named(keyword):
    data_set = sample()
    delattr(data_set, keyword)
    with pytest.raises(MalformedDataSetError, match=f"{keyword} is missing"):
        identity_of(data_set)
    data_set.add_new(keyword, "UI", "")
    with pytest.raises(MalformedDataSetError, match=f"{keyword} is empty or is no UID"):
        identity_of(data_set)


def test_an_identifier_that_cannot_be_carried_whole_is_refused():
    data_set = Dataset()
    data_set.update(sample())
    data_set.add_new("PatientID", "UT", "9" * 300)
    with pytest.raises(MalformedDataSetError, match="PatientID is 300 characters long"):
        identity_of(data_set)


@pytest.mark.parametrize("path", pydicom_files(), ids=lambda path: path.name)
def test_every_file_of_pydicom_has_an_identity_or_a_named_reason(path):
    transfer_syntax_uid, data = data_set_of(path)
    with warnings.catch_warnings(), contextlib.suppress(MalformedDataSetError):
        find_pixel_data(data, transfer_syntax_uid)
        identify(data, transfer_syntax_uid, calling_ae_title="", called_ae_title="", received_at=NOW, zone=CHINA)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_mutated_headers_have_an_identity_or_a_named_reason(seed):
    dice = random.Random(seed)
    mutant = bytearray(MUTABLE)
    for _ in range(dice.choice([1, 5, 30])):
        mutant[dice.randrange(len(mutant))] = dice.randrange(256)
    with contextlib.suppress(MalformedDataSetError):
        identify(bytes(mutant), EXPLICIT, calling_ae_title="", called_ae_title="", received_at=NOW, zone=CHINA)


MUTABLE = encode(sample())[:2500]
