"""The report as a page: what is printed is what was written, in PDF/A-2b, whatever was written.

PDF/A is checked by what can be read from the file (identification, output intent, embedded fonts, no transparency of
encryption or scripts); no full validator is in the package lists.
"""

import subprocess
from pathlib import Path

import pikepdf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reading_queue.printable import covered_characters, printable, printable_lines
from reading_queue.report_pdf import (
    ReportContent,
    display_person_name,
    render_pdf,
    unprintable_characters,
)
from storage.errors import ConfigurationError
from storage.vocabulary import Conclusion
from tests.peers import peer
from tests.report_material import content, fonts_dir

__all__ = ["fonts_dir"]


def poppler(program: str) -> Path:
    """A program of poppler-utils; skips the test where that is not installed."""
    return Path(peer("poppler-utils")).with_name(program)


def text_of(pdf: bytes, tmp_path: Path) -> str:
    """The text of all pages as poppler reads it."""
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf)
    return subprocess.run([poppler("pdftotext"), "-layout", path, "-"], check=True, capture_output=True).stdout.decode()


def squeezed(text: str) -> str:
    return "".join(text.split()).replace("\u200b", "")


def check_pdf_a(pdf: bytes, tmp_path: Path) -> None:
    """PDF/A-2b as far as it can be read without a validator (ISO 19005-2, 6.2 to 6.7)."""
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf)
    with pikepdf.open(path) as document:
        assert document.pdf_version == "1.7"
        assert "/Version" not in document.Root
        assert "/Encrypt" not in document.trailer
        assert "/OpenAction" not in document.Root
        with document.open_metadata() as metadata:
            assert metadata["pdfaid:part"] == "2"
            assert metadata["pdfaid:conformance"].upper() == "B"
        intents = document.Root.OutputIntents
        assert [str(intent.S) for intent in intents] == ["/GTS_PDFA1"]
        assert "/DestOutputProfile" in intents[0]
    listed = subprocess.run([poppler("pdffonts"), path], check=True, capture_output=True, text=True).stdout
    fonts = listed.splitlines()[2:]
    assert fonts
    for line in fonts:  # columns from the right: object (2), unicode, subset, embedded
        assert line.split()[-5] == "yes", line


@pytest.mark.parametrize("language", ["zh", "en", "both"])
def test_a_report_is_pdf_a_in_each_language(fonts_dir: Path, tmp_path: Path, language: str) -> None:
    pdf = render_pdf(content(language=language), fonts_dir)
    check_pdf_a(pdf, tmp_path)
    text = squeezed(text_of(pdf, tmp_path))
    for word in ("王小(WangXiao)", "P0012345", "A20261123-0007", "双肺纹理增多。", "1.右肺下叶占位。"):
        assert word in text
    assert ("检查所见" in text) is (language != "en")
    assert ("Findings" in text) is (language != "zh")


def test_the_same_report_gives_the_same_bytes(fonts_dir: Path) -> None:
    assert render_pdf(content(), fonts_dir) == render_pdf(content(), fonts_dir)


def test_a_critical_value_is_said_in_words_at_the_top(fonts_dir: Path, tmp_path: Path) -> None:
    text = text_of(render_pdf(content(conclusion=Conclusion.CRITICAL), fonts_dir), tmp_path)
    assert "CRITICAL RESULT" in text.split("Findings")[0]


@pytest.mark.parametrize(
    "markup",
    [
        '#let x = 1; #panic("x")',
        "*bold* _emphasis_ `code`",
        "$x^2$ \\( \\n \\u{41}",
        "<label> @reference #[content]",
        "= heading",
        "- item",
        "// comment",
        "/* comment */",
        "-- --- ... ~ 'single' \"double\"",
        "http://example.org/?a=b&c=d",
        '{"json": [1, 2]}',
    ],
)
def test_markup_is_printed_and_not_obeyed(fonts_dir: Path, tmp_path: Path, markup: str) -> None:
    changed = content(findings=markup, patient_id=markup, study_description=markup, county_name_zh=markup)
    text = squeezed(text_of(render_pdf(changed, fonts_dir), tmp_path))
    assert text.count(squeezed(markup)) >= 3


def test_rare_characters_of_names_are_printed(fonts_dir: Path, tmp_path: Path) -> None:
    rare = "𠮷㛃䶮喆赟誠區"
    changed = content(patient_name=f"Wang^X=王^{rare}")
    assert unprintable_characters(changed, fonts_dir) == []
    assert f"王{rare}" in squeezed(text_of(render_pdf(changed, fonts_dir), tmp_path))


def test_units_and_marks_of_reports_are_printed(fonts_dir: Path) -> None:
    assert unprintable_characters(content(findings="SpO₂ 93 % ≥ ≤ ± μ ℃ ² ³ × Δ → ≈ ≒ ☑ ☐ ⚠ ①"), fonts_dir) == []


def test_every_character_of_gb2312_and_gbk_has_a_glyph(fonts_dir: Path) -> None:
    covered = covered_characters(fonts_dir)
    for high in range(0x81, 0xFF):
        for low in range(0x40, 0xFF):
            try:
                character = bytes([high, low]).decode("gbk")
            except UnicodeDecodeError:
                continue
            assert ord(character) in covered, f"U+{ord(character):04X}"


def test_a_character_without_a_glyph_is_known_before_and_printed_as_its_code_point(
    fonts_dir: Path, tmp_path: Path
) -> None:
    changed = content(patient_name="=王^𪚥", findings="العربية")
    assert unprintable_characters(changed, fonts_dir)[0] == "𪚥"
    text = squeezed(text_of(render_pdf(changed, fonts_dir), tmp_path))
    assert "王[U+2A6A5]" in text
    assert "[U+0627][U+0644]" in text


def test_bidirectional_controls_are_shown_and_do_not_reorder(fonts_dir: Path, tmp_path: Path) -> None:
    changed = content(patient_name="Wang^\u202egnaw\u202c", findings="阴\u2067性\u2069\u200f")
    text = squeezed(text_of(render_pdf(changed, fonts_dir), tmp_path))
    assert "[U+202E]gnaw[U+202C]" in text
    assert "阴[U+2067]性[U+2069][U+200F]" in text


def test_control_characters_and_lone_surrogates_are_shown(fonts_dir: Path, tmp_path: Path) -> None:
    text = squeezed(text_of(render_pdf(content(findings="a\x07b\x1bc\ud800d\x00e"), fonts_dir), tmp_path))
    assert "a[U+0007]b[U+001B]c[U+D800]d[U+0000]e" in text


def test_a_long_report_flows_over_numbered_pages(fonts_dir: Path, tmp_path: Path) -> None:
    sentence = "右肺下叶见结节影，边界清。"
    count = 200_000 // len(sentence.encode()) + 1
    pdf = render_pdf(content(findings=sentence * count), fonts_dir)
    text = text_of(pdf, tmp_path)
    with pikepdf.open(tmp_path / "report.pdf") as document:
        pages = len(document.pages)
    assert pages > 20
    assert squeezed(f"第 {pages} / {pages} 页") in squeezed(text)
    assert squeezed(text).count("节") == count  # a word may stand on two pages, a character does not


def test_a_word_without_breaks_stays_on_the_page(fonts_dir: Path, tmp_path: Path) -> None:
    wide = content(findings="A" * 2000, patient_id="W" * 200, patient_age="W" * 90, study_description="W" * 20)
    pdf = render_pdf(wide, fonts_dir)
    path = tmp_path / "wide.pdf"
    path.write_bytes(pdf)
    command = [poppler("pdftotext"), "-bbox", path, "-"]
    boxes = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rights = [float(line.split('xMax="')[1].split('"')[0]) for line in boxes.splitlines() if "<word " in line]
    assert max(rights) < 595.28 - 40  # A4's width, the margin less rounding


def test_nothing_known_of_the_patient_is_said_and_not_left_blank(fonts_dir: Path, tmp_path: Path) -> None:
    nameless = content(
        patient_name="", patient_sex="", patient_age="", accession_number="", study_datetime=None, clinical_question=""
    )
    assert text_of(render_pdf(nameless, fonts_dir), tmp_path).count("未提供") >= 5


def test_a_corrected_report_says_which_version_it_replaces_and_a_first_one_nothing(
    fonts_dir: Path, tmp_path: Path
) -> None:
    first = text_of(render_pdf(content(), fonts_dir), tmp_path)
    assert "更正报告" not in first and "Corrected" not in first
    second = content(version=2, replaces_version=1, findings="右肺下叶见结节影，边界清。\n" * 60)
    text = text_of(render_pdf(second, fonts_dir), tmp_path)
    assert squeezed(text).count("更正报告，替代第1版") == 2  # on every page
    assert "Corrected report, replaces version 1" in text


def test_a_report_without_fonts_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No report fonts"):
        render_pdf(content(), tmp_path)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("Wang^Xiao=王^小", "王小 (Wang Xiao)"),
        ("王^小", "王小"),
        ("王小=王小", "王小"),
        ("=王^小", "王小"),
        ("O’Brien^Sean", "O’Brien Sean"),
        ("Wang^Xiao=王^小=わん^しゃお", "王小 (Wang Xiao)"),
        ("", ""),
        ("^^^^", ""),
    ],
)
def test_a_person_name_is_written_for_reading(sent: str, shown: str) -> None:
    assert display_person_name(sent) == shown


def test_lines_keep_their_indentation_and_tabs(fonts_dir: Path) -> None:
    covered = covered_characters(fonts_dir)
    assert printable_lines("\n a\r\n\tb\rc \n\n", covered) == ["\u00a0a", "\u00a0\u00a0\u00a0\u00a0b", "c"]


@given(st.text(max_size=200))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_at_all_makes_a_report(fonts_dir: Path, text: str) -> None:
    anything = content(findings=text, impression=text, patient_name=text, patient_id=text, centre_name_zh=text)
    assert render_pdf(anything, fonts_dir).startswith(b"%PDF-1.7")


@given(st.text(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_printable_stays_as_it_is(fonts_dir: Path, text: str) -> None:
    covered = covered_characters(fonts_dir)
    once = printable(text, covered)
    assert printable(once, covered).replace("\u200b", "") == once.replace("\u200b", "")


def test_the_content_names_every_text_of_the_report() -> None:
    assert {"双肺纹理增多。\n心影不大。", "Wang^Xiao=王^小"} <= set(content().texts())
    assert isinstance(content(), ReportContent)
