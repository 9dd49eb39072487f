"""The report as PDF/A-2b (ISO 19005-2), set by typst. Text is data and never markup.

The template is `report.typ`; it gets one JSON document. The signature band stands at a fixed place at the foot of the
last page: `SIGNATURE_BOXES` says where, in PDF points. The same content gives the same bytes.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import typst

from reading_queue.printable import covered_characters, printable, printable_lines, unprintable
from storage.vocabulary import Conclusion

_TEMPLATES = Path(__file__).resolve().parent
_POINTS_PER_MM = 72 / 25.4


class SignatureBox(NamedTuple):
    """Where the visible part of a signature goes; points from the lower left corner (ISO 32000, 7.9.5)."""

    page: int  # -1: the last page
    x1: float
    y1: float
    x2: float
    y2: float


def _box_mm(left: float, bottom: float, width: float, height: float) -> SignatureBox:
    corners = (left, bottom, left + width, bottom + height)
    return SignatureBox(-1, *(round(c * _POINTS_PER_MM, 2) for c in corners))


SIGNATURE_BOXES: Mapping[str, SignatureBox] = {
    # A4, margins 19 mm at the sides and 27 mm at the foot; report.typ draws these frames.
    "Author": _box_mm(19.0, 33.6, 82.0, 19.0),
    "Reviewer": _box_mm(109.0, 33.6, 82.0, 19.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContent:
    """All that stands on a report. Text as sent or written, already Unicode; "" where nothing is known."""

    report_id: int
    version: int
    language: str  # "zh", "en" or "both": the language of the labels
    county_name_zh: str
    county_name_en: str
    centre_name_zh: str
    centre_name_en: str
    patient_name: str  # DICOM PN with its groups: "Wang^Xiao=王^小"
    patient_id: str
    patient_sex: str  # CS: M, F, O
    patient_age: str  # AS, e.g. 045Y
    accession_number: str
    modality: str  # CS, e.g. CT
    study_description: str  # body part or description
    study_datetime: datetime | None  # the modality's clock, naive
    study_instance_uid: str
    clinical_question: str
    findings: str
    impression: str
    conclusion: Conclusion
    author_name: str
    signed_at: datetime  # aware
    replaces_version: int = 0  # of the same report; 0: this is the first
    reviewer_name: str = ""  # "" where the site contract asks for one signature
    time_zone: str = "Asia/Shanghai"

    @property
    def critical(self) -> bool:
        """Whether the conclusion is a critical value (危急值)."""
        return self.conclusion is Conclusion.CRITICAL

    def texts(self) -> list[str]:
        """Every text a person wrote or a modality sent: what may hold a character without a glyph."""
        return [value for name in self.__slots__ if isinstance(value := getattr(self, name), str)]


_LABELS: Mapping[str, tuple[str, str]] = {
    "name": ("姓名", "Name"),
    "sex": ("性别", "Sex"),
    "age": ("年龄", "Age"),
    "patient_id": ("患者编号", "Patient ID"),
    "accession_number": ("检查号", "Accession No."),
    "modality": ("检查类型", "Modality"),
    "study_description": ("检查部位与项目", "Examination"),
    "study_datetime": ("检查时间", "Examined"),
    "county": ("申请医院", "Requesting hospital"),
    "clinical_question": ("临床诊断与检查目的", "Clinical question"),
    "findings": ("检查所见", "Findings"),
    "impression": ("诊断意见", "Impression"),
    "conclusion": ("结论", "Conclusion"),
    "author": ("报告医师", "Reported by"),
    "reviewer": ("审核医师", "Verified by"),
}
_TITLES: Mapping[str, tuple[str, str]] = {
    "ECG": ("心电图诊断报告", "Electrocardiogram Report"),
    "SM": ("病理诊断报告", "Pathology Report"),
    "US": ("超声诊断报告", "Ultrasound Report"),
}
_IMAGING_TITLE = ("医学影像诊断报告", "Diagnostic Imaging Report")
_CONCLUSIONS: Mapping[Conclusion, tuple[str, str]] = {
    Conclusion.NEGATIVE: ("阴性", "Negative"),
    Conclusion.POSITIVE: ("阳性", "Positive"),
    Conclusion.CRITICAL: ("危急值", "Critical"),
}
_SEXES: Mapping[str, tuple[str, str]] = {"M": ("男", "Male"), "F": ("女", "Female"), "O": ("其他", "Other")}
# PS3.5 Table 6.2-1, AS: nnnD, nnnW, nnnM, nnnY
_AGE_UNITS: Mapping[str, tuple[str, str]] = {
    "D": ("天", "days"),
    "W": ("周", "weeks"),
    "M": ("个月", "months"),
    "Y": ("岁", "years"),
}
_NOT_GIVEN = ("未提供", "not given")
_CRITICAL = ("危急值，请立即处理并回报", "CRITICAL RESULT: act at once and read back")
_CORRECTED = ("更正报告，替代第 {version} 版", "Corrected report, replaces version {version}")
_VERIFICATION = (
    "本报告为电子签名文件（PAdES），以签名校验结果为准；纸质打印件仅供参考。",
    "Digitally signed (PAdES): the verified signature counts, a printed copy is for reference only.",
)


def _both(pair: tuple[str, str], language: str, separator: str = " ") -> str:
    if language == "both":
        return separator.join(part for part in pair if part)
    return pair[0] if language == "zh" else pair[1]


def _names(pair: tuple[str, str], language: str) -> list[str]:
    ordered = pair if language != "en" else (pair[1], pair[0])
    return [name for name in (ordered if language == "both" else ordered[:1]) if name] or [n for n in ordered if n][:1]


def display_person_name(name: str) -> str:
    """A DICOM person name for reading (PS3.5 6.2.1): "Wang^Xiao=王^小" gives "王小 (Wang Xiao)".

    Components of the ideographic group are joined without a blank; the phonetic group is not printed.
    """
    groups = name.split("=")
    alphabetic = " ".join(part.strip() for part in groups[0].split("^") if part.strip())
    ideographic = "".join(part.strip() for part in groups[1].split("^")) if len(groups) > 1 else ""
    if any(c >= "\u2e80" for c in alphabetic):  # Chinese in the first group: many modalities send it so
        alphabetic = "".join(alphabetic.split(" "))
    if not ideographic or ideographic == alphabetic:
        return alphabetic
    return f"{ideographic} ({alphabetic})" if alphabetic else ideographic


def _age(value: str, language: str) -> str:
    number, unit = value[:-1], value[-1:]
    if not number.isdecimal() or unit not in _AGE_UNITS:
        return value
    zh, en = _AGE_UNITS[unit]
    count = int(number)
    return f"{count} {_both((zh, en if count != 1 else en[:-1]), language, ' ')}"


def local_time(moment: datetime, time_zone: str) -> str:
    """A moment to the second with its offset: 2026-11-23 13:05:09 UTC+08:00. Naive moments have no offset."""
    if moment.tzinfo is None:
        return f"{moment:%Y-%m-%d %H:%M:%S}"
    local = moment.astimezone(ZoneInfo(time_zone))
    offset = f"{local:%z}"
    return f"{local:%Y-%m-%d %H:%M:%S} UTC{offset[:3]}:{offset[3:]}"


class _Printer:
    """Makes the template's JSON from a report's content."""

    def __init__(self, content: ReportContent, covered: frozenset[int]) -> None:
        self.content = content
        self.covered = covered
        self.language = content.language

    def line(self, text: str) -> str:
        return printable(text, self.covered)

    def label(self, key: str) -> dict[str, str]:
        zh, en = _LABELS[key]
        return {"zh": zh if self.language != "en" else "", "en": en if self.language != "zh" else ""}

    def cell(self, key: str, text: str, span: int, *, strong: bool = False) -> dict[str, Any]:
        value = printable(text, self.covered, longest=4 * span)  # a twelfth of the page holds four wide letters
        return {"label": self.label(key), "value": value, "span": span, "strong": strong}

    def patient(self) -> list[dict[str, Any]]:
        c = self.content
        sex = _both(_SEXES[c.patient_sex], self.language, " / ") if c.patient_sex in _SEXES else c.patient_sex
        examined = local_time(c.study_datetime, c.time_zone) if c.study_datetime else ""
        county = _names((c.county_name_zh, c.county_name_en), self.language)
        rows = [
            self.cell("name", display_person_name(c.patient_name), 5, strong=True),
            self.cell("sex", sex, 2),
            self.cell("age", _age(c.patient_age, self.language), 2),
            self.cell("patient_id", c.patient_id, 3),
            self.cell("study_description", c.study_description, 5),
            self.cell("modality", c.modality, 2),
            self.cell("accession_number", c.accession_number, 5),
            self.cell("county", " · ".join(county), 7),
            self.cell("study_datetime", examined, 5),
        ]
        return [*rows, self.cell("clinical_question", c.clinical_question, 12)]

    def corrected(self) -> str:
        """Which version this one replaces; "" for a first version."""
        words = _both(_CORRECTED, self.language, " · ")
        return words.format(version=self.content.replaces_version) if self.content.replaces_version else ""

    def signatories(self) -> list[dict[str, Any]]:
        keys = ["author", *(["reviewer"] if self.content.reviewer_name else [])]
        return [{"label": self.label(key)} for key in keys]

    def document(self) -> dict[str, Any]:
        c = self.content
        title = _TITLES.get(c.modality, _IMAGING_TITLE)
        name = _both((f"报告编号 {c.report_id} 第 {c.version} 版", f"Report {c.report_id} v{c.version}"), self.language)
        who = " · ".join(
            self.line(part) for part in (display_person_name(c.patient_name), c.patient_id, c.accession_number) if part
        )
        signed = _both(("签发时间", "Signed"), self.language) + " " + local_time(c.signed_at, c.time_zone)
        pages = {"zh": ("第 ", " / ", " 页"), "en": ("Page ", " of ", ""), "both": ("第 ", " / ", " 页")}
        return {
            "labels": {key: self.label(key) for key in _LABELS},
            "document_title": f"{_both(title, self.language)} {c.report_id} v{c.version}",
            "author": self.line(c.author_name),
            "report_name": name,
            "running_head": who,
            "not_given": _both(_NOT_GIVEN, self.language),
            "page_words": pages[self.language],
            "report_line": self.line(f"{name} · Study Instance UID {c.study_instance_uid}"),
            "verification_line": _both(_VERIFICATION, self.language),
            "centre_names": [self.line(n) for n in _names((c.centre_name_zh, c.centre_name_en), self.language)],
            "titles": _names(title, self.language),
            "corrected_words": self.corrected(),
            "critical": c.critical,
            "critical_words": _both(_CRITICAL, self.language, " · "),
            "patient": self.patient(),
            "findings": printable_lines(c.findings, self.covered),
            "impression": printable_lines(c.impression, self.covered),
            "conclusion": _both(_CONCLUSIONS[c.conclusion], self.language),
            "signatories": self.signatories(),
            "signed_line": signed,
        }


class TypstPress:
    """One compiled typst world, kept: the first page takes 100 ms, the next ones a few. Safe to share by threads."""

    def __init__(self, template: Path, fonts_dir: Path) -> None:
        fonts = typst.Fonts(include_system_fonts=False, include_embedded_fonts=False, font_paths=[fonts_dir])
        self._compiler = typst.Compiler(template, root=template.parent, font_paths=fonts)
        self._lock = threading.Lock()

    def press(self, key: str, document: Mapping[str, Any], made_at: datetime) -> bytes:
        """PDF/A-2b of the template with `document` as JSON in `sys.inputs[key]`; dated `made_at`."""
        data = json.dumps(document, ensure_ascii=False)
        with self._lock:
            pdf = self._compiler.compile(
                sys_inputs={key: data}, format="pdf", pdf_standards="a-2b", timestamp=int(made_at.timestamp())
            )
        if not isinstance(pdf, bytes):
            raise TypeError("typst gave several files for one document")
        return pdf


@cache
def press_for(template_name: str, fonts_dir: Path) -> TypstPress:
    """The process's press for a template of this package."""
    return TypstPress(_TEMPLATES / template_name, fonts_dir)


def unprintable_characters(content: ReportContent, fonts_dir: Path) -> list[str]:
    """Characters of the report that the fonts lack and that will be printed as code points: show before signing."""
    return unprintable(content.texts(), covered_characters(fonts_dir))


def render_pdf(content: ReportContent, fonts_dir: Path) -> bytes:
    """The report as PDF/A-2b bytes, with empty signature frames at `SIGNATURE_BOXES`.

    Raises ConfigurationError if `fonts_dir` holds no fonts, and ValueError for an unknown language.
    """
    if content.language not in {"zh", "en", "both"}:
        raise ValueError(f"Unknown report language {content.language!r}")
    document = _Printer(content, covered_characters(fonts_dir)).document()
    return press_for("report.typ", fonts_dir).press("report", document, content.signed_at)
