"""What a triage model is to the rest of the project: a card, a suitability check and a run. No model is known here.

A model is asked only about studies its card accepts (`Accepts.asks_for`), looks closer at the data sets (`suits`), and
answers with findings. It never holds a case and never says that something is normal: only positive findings count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

RESEARCH_ONLY = "research only"
_OLDEST = 120.0  # years; an upper limit from here on is no limit


@dataclass(frozen=True, slots=True)
class SeriesFacts:
    """One series as the archive knows it."""

    series_instance_uid: str
    modality: str
    body_part_examined: str = ""
    series_description: str = ""
    instance_count: int = 0


@dataclass(frozen=True, slots=True)
class StudyFacts:
    """What is known of a study before a data set is opened. No name, no identifier: a model has no use for them."""

    site_code: str
    modalities: tuple[str, ...]
    body_part_examined: str = ""
    age_years: float | None = None  # None: not known
    series: tuple[SeriesFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Suitability:
    """Whether a model may read a study; `reason` (Chinese / English) is shown to people, without patient data."""

    accepted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Coded:
    """A coded concept (PS3.3 8.8)."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a model looked for.

    `probability` in 0..1 as the card's calibration explains; `positive` at the operating point; `minutes_earlier` is
    how much earlier the case falls due if positive, 0 otherwise.
    """

    code: str
    coded: Coded
    text_zh: str
    text_en: str
    probability: float
    positive: bool
    minutes_earlier: int

    def as_row(self) -> dict[str, Any]:
        """As kept in `triage_run.findings`."""
        return {
            "code": self.code,
            "text_zh": self.text_zh,
            "text_en": self.text_en,
            "probability": round(self.probability, 4),
            "positive": self.positive,
            "minutes_earlier": self.minutes_earlier,
        }


@dataclass(frozen=True, slots=True)
class TriageResult:
    """What one run gave.

    `heat_map` float32 [h,w] in 0..1 covers the whole frame of the first input, at the model's own coarse resolution,
    or is None. `input_uids` are SOP Instance UIDs. `seconds` is the time of decoding and inference.
    """

    findings: tuple[Finding, ...]
    input_uids: tuple[str, ...]
    seconds: float
    heat_map: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Accepts:
    """Inputs a model accepts. Empty tuples accept anything."""

    modalities: tuple[str, ...]
    sop_class_uids: tuple[str, ...]
    body_parts: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    age_years: tuple[float, float] | None = None  # from (inclusive) to (exclusive)
    age_may_be_unknown: bool = False
    max_instances: int = 8  # read at most so many data sets of a study

    def asks_for(self, facts: StudyFacts) -> bool:
        """Whether the model is asked at all; if not, the study is 'no model' as far as this one goes."""
        if not set(self.modalities) & set(facts.modalities):
            return False
        stated = {part.upper() for part in (facts.body_part_examined, *(s.body_part_examined for s in facts.series))}
        stated.discard("")
        return not self.body_parts or not stated or bool(stated & set(self.body_parts))

    def age_suits(self, facts: StudyFacts) -> Suitability:
        """Age is an accepted input: a model says nothing about patients unlike those it learnt from (design §6)."""
        if self.age_years is None or (facts.age_years is None and self.age_may_be_unknown):
            return Suitability(True)
        low, high = self.age_years
        if high >= _OLDEST:
            span_zh, span_en = f"{low:g} 岁及以上", f"{low:g} years and older"
        else:
            span_zh, span_en = f"{low:g} 至 {high - 1:g} 岁", f"{low:g} to {high - 1:g} years"
        if facts.age_years is None:
            return Suitability(False, f"年龄未知，本模型适用于 {span_zh} / age not known; this model is for {span_en}")
        if not low <= facts.age_years < high:
            return Suitability(False, f"年龄超出范围，本模型适用于 {span_zh} / age outside the evidence: {span_en}")
        return Suitability(True)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Where a probability becomes a flag, and what a flag does."""

    code: str
    coded: Coded
    text_zh: str
    text_en: str
    threshold: float
    minutes_earlier: int

    def finding(self, probability: float) -> Finding:
        """The finding at this operating point."""
        positive = probability >= self.threshold
        return Finding(
            code=self.code,
            coded=self.coded,
            text_zh=self.text_zh,
            text_en=self.text_en,
            probability=probability,
            positive=positive,
            minutes_earlier=self.minutes_earlier if positive else 0,
        )


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Who a model is and what is known about it; goes with every result."""

    name: str
    version: str
    sha256: str  # over every file of the model, so that another file is another model
    title_zh: str
    title_en: str
    status: str
    intended_use: str
    accepts: Accepts
    operating_points: tuple[OperatingPoint, ...]
    calibration: dict[str, Any]
    evidence: tuple[dict[str, Any], ...] = field(default=())

    @property
    def research_only(self) -> bool:
        """Runs in shadow unless the site enables it by name (design §6)."""
        return self.status == RESEARCH_ONLY


class TriageModel(Protocol):
    """The port. Implementations load torch or onnxruntime when first run, not before."""

    @property
    def card(self) -> ModelCard:
        """Who the model is."""

    def suits(self, facts: StudyFacts, datasets: Sequence[Dataset]) -> Suitability:
        """Whether the study is within the model's evidence. Decodes no pixels."""

    def run(self, datasets: Sequence[Dataset]) -> TriageResult:
        """Decode and infer.

        Raises:
            MalformedDataSetError: an input cannot be decoded within bounds.
        """
