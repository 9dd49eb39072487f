"""The ECG rhythm model: the ONNX codec that the `openecg` wheel carries, on lead II of a 12-lead ECG, and
rules on the beats of four leads.

Atrial fibrillation and flutter are one finding: the codec has one class for both. Its weakness is measured, not
assumed: it calls some fibrillation "paced". A rhythm called paced without pacing spikes and with irregular R-R
intervals is therefore counted as possible fibrillation (`evidence` in triage.toml shows the figures with and without).

Traps: the codec takes 500 samples a second whatever `fs` it is told, so other rates are resampled here;
`openecg.report` hides its exceptions in `flags`, so the codec is run directly and only the rules (rate, pacing) come
from `report`.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from ai_triage.ecg import Electrocardiogram, read_electrocardiogram
from ai_triage.interface import ModelCard, StudyFacts, Suitability, TriageResult
from storage.errors import ConfigurationError, MalformedDataSetError

RHYTHMS = ("sinus", "av_block", "paced", "atrial_fibrillation", "bundle_branch_block", "ventricular")
_AF, _PACED = RHYTHMS.index("atrial_fibrillation"), RHYTHMS.index("paced")

_CODEC_HZ = 500
_WINDOW = 5000  # samples: the codec's input is ten seconds
_EDGE = 1000  # samples at each end that the codec's authors leave out of evaluation
_LONGEST_S = 120  # the first two minutes decide; a resting ECG has ten seconds
_SHORTEST_S = 8
_IRREGULAR = 0.12  # openecg's own limit: coefficient of variation of R-R
_BEATS_NEEDED = 4

# A detector misses beats in one lead or another (LUDB record 91: a false pause of 3 s in lead II alone). So rate is the
# median of four leads, and a pause or an irregularity is what the most regular of them still shows.
_BEAT_LEADS = ("I", "II", "V1", "V5")

_FAST_BPM, _SLOW_BPM, _PAUSE_S = 150.0, 40.0, 3.0  # Zhejiang trial standard: pause of 3 s or more is a critical value


@dataclass(frozen=True)
class RhythmReading:
    """What was measured: `probabilities` [6] in the order of RHYTHMS from lead II; rate and R-R from four leads."""

    probabilities: NDArray[np.float64]
    rate_bpm: float
    longest_rr_s: float
    rr_variation: float
    has_pacing_spikes: bool

    @property
    def fibrillation(self) -> float:
        """Probability of fibrillation or flutter; 'paced' without spikes and irregular counts towards it."""
        af = float(self.probabilities[_AF])
        if not self.has_pacing_spikes and self.rr_variation > _IRREGULAR:
            af += float(self.probabilities[_PACED])
        return min(af, 1.0)


def at_codec_rate(lead_mv: NDArray[np.float32], rate_hz: float) -> NDArray[np.float32]:
    """The lead at 500 samples a second: a running mean against aliasing when the rate falls, then interpolation."""
    if abs(rate_hz - _CODEC_HZ) < 0.5:
        return lead_mv
    width = round(rate_hz / _CODEC_HZ)
    if width > 1:
        lead_mv = np.convolve(lead_mv, np.full(width, 1.0 / width, dtype=np.float32), mode="same")
    length = int(lead_mv.size * _CODEC_HZ / rate_hz)
    at = np.arange(length) * (rate_hz / _CODEC_HZ)
    return np.asarray(np.interp(at, np.arange(lead_mv.size), lead_mv), dtype=np.float32)


class EcgRhythmModel:
    """A `TriageModel` over the packaged ONNX file."""

    def __init__(self, card: ModelCard, directory: Path, packaged: tuple[Path, ...]) -> None:
        """Nothing is loaded until the first run. `packaged` is the one ONNX file, its digest already checked."""
        if len(packaged) != 1:
            raise ConfigurationError(f"{directory}: packaged_files must name the one ONNX file")
        self._card = card
        self._onnx = packaged[0]
        self._loading = threading.Lock()  # a worker runs several threads
        self._session: Any = None

    @property
    def card(self) -> ModelCard:
        """Who the model is."""
        return self._card

    def suits(self, facts: StudyFacts, datasets: Sequence[Dataset]) -> Suitability:
        """Twelve leads of at least eight seconds, of a patient within the ages of the evidence."""
        by_age = self._card.accepts.age_suits(facts)
        if not by_age.accepted:
            return by_age
        if not datasets:
            return Suitability(False, "没有可读的十二导联心电波形 / no 12-lead ECG waveform")
        for dataset in datasets:
            try:
                ecg = read_electrocardiogram(dataset)
            except MalformedDataSetError as error:
                return Suitability(False, f"心电波形不可读 / the ECG waveform cannot be used: {error.reason}")
            if ecg.leads_uv.shape[1] < _SHORTEST_S * ecg.rate_hz:
                return Suitability(False, "心电记录短于 8 秒 / the recording is shorter than 8 seconds")
        return Suitability(True)

    def run(self, datasets: Sequence[Dataset]) -> TriageResult:
        """Read every recording; each finding has its highest probability among them. See `TriageModel.run`."""
        started = time.monotonic()
        recordings = [read_electrocardiogram(dataset) for dataset in datasets]
        if not recordings:
            raise MalformedDataSetError("No ECG among the data sets")
        readings = [self.read(recording) for recording in recordings]
        probabilities = {
            "atrial_fibrillation": max(reading.fibrillation for reading in readings),
            # A rule has no probability: 1 where it holds. A rate of 0 is a rate that could not be measured.
            "rate_150_or_more": max(float(reading.rate_bpm >= _FAST_BPM) for reading in readings),
            "rate_below_40": max(float(0 < reading.rate_bpm < _SLOW_BPM) for reading in readings),
            "pause_3_s": max(float(reading.longest_rr_s >= _PAUSE_S) for reading in readings),
        }
        return TriageResult(
            findings=tuple(point.finding(probabilities[point.code]) for point in self._card.operating_points),
            input_uids=tuple(recording.sop_instance_uid for recording in recordings),
            seconds=time.monotonic() - started,
        )

    def read(self, ecg: Electrocardiogram) -> RhythmReading:
        """Rhythm and pacing of lead II; rate, longest R-R interval and its variation of four leads."""
        import openecg

        length = int(_LONGEST_S * ecg.rate_hz)
        lead_mv = ecg.lead_mv("II")[:length]
        # Rules only: the codec part of report() would be fed at the wrong rate. One-dimensional float32 in millivolts.
        rules = openecg.report(lead_mv, fs=round(ecg.rate_hz), model="rules")
        intervals = [_intervals_s(ecg.lead_mv(name)[:length], ecg.rate_hz) for name in _BEAT_LEADS]
        usable = [lead for lead in intervals if lead.size >= _BEATS_NEEDED]
        return RhythmReading(
            probabilities=self._rhythm_probabilities(at_codec_rate(lead_mv, ecg.rate_hz)),
            rate_bpm=float(np.median([60.0 / np.median(lead) for lead in usable])) if usable else 0.0,
            longest_rr_s=min((float(lead.max()) for lead in usable), default=0.0),
            rr_variation=min((float(lead.std() / lead.mean()) for lead in usable), default=0.0),
            has_pacing_spikes=bool(rules.pacing_check.get("is_paced", False)),
        )

    def _loaded(self) -> Any:
        import onnxruntime

        with self._loading:
            if self._session is None:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                self._session = onnxruntime.InferenceSession(
                    str(self._onnx), options, providers=["CPUExecutionProvider"]
                )
            return self._session

    def _rhythm_probabilities(self, lead: NDArray[np.float32]) -> NDArray[np.float64]:
        import openecg

        session = self._loaded()
        total = np.zeros(len(RHYTHMS))
        counted = 0
        for start in range(0, max(lead.size - _WINDOW // 2, 1), _WINDOW):
            window = np.zeros(_WINDOW, dtype=np.float32)
            part = np.asarray(openecg.rank_normalize(lead[start : start + _WINDOW]), dtype=np.float32)
            window[: part.size] = part
            (logits,) = session.run(["rhythm_logits"], {"signal": window[None]})
            inside = logits[0, _EDGE : part.size - _EDGE].astype(np.float64)
            if inside.size:
                exponent = np.exp(inside - inside.max(axis=-1, keepdims=True))
                total += (exponent / exponent.sum(axis=-1, keepdims=True)).sum(axis=0)
                counted += inside.shape[0]
        return total / counted


def _intervals_s(lead_mv: NDArray[np.float32], rate_hz: float) -> NDArray[np.float64]:
    import openecg

    return np.asarray(np.diff(openecg.detect_qrs(lead_mv, round(rate_hz))) / rate_hz, dtype=np.float64)
