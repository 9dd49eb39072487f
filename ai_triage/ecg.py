"""DICOM ECG waveforms as microvolts: the twelve leads, found by their codes, in the standard order.

PS3.3 C.10.9 (Waveform Module); leads by CID 3001. Everything a file declares is bounded before it is allocated.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from ai_triage.untrusted import DAMAGED
from storage.errors import MalformedDataSetError

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

MAX_CHANNELS = 64
MAX_SAMPLES = 5_000_000  # 80 minutes at 1 kHz; a resting ECG has 5,000 to 10,000
_RATE_HZ = (100.0, 4000.0)

# CID 3001 by both of its spellings: SCP-ECG numbers (5.6.3-9-n) and ISO/IEEE 11073 (2:n), which number
# alike; some writers give the reference id (MDC_ECG_LEAD_V1) or only the meaning.
_BY_NUMBER = {1: "I", 2: "II", 61: "III", 62: "aVR", 63: "aVL", 64: "aVF"} | {n + 2: f"V{n}" for n in range(1, 7)}
_BY_NAME = {lead.upper(): lead for lead in LEADS}

_MICROVOLTS = {"uv": 1.0, "mv": 1000.0, "v": 1_000_000.0}  # UCUM uV, mV, V; no heart gives megavolts, so any case


@dataclass(frozen=True)
class Electrocardiogram:
    """`leads_uv` float32 [12,T] microvolts in the order of LEADS; `rate_hz` samples a second."""

    leads_uv: NDArray[np.float32]
    rate_hz: float
    sop_instance_uid: str

    def lead_mv(self, name: str) -> NDArray[np.float32]:
        """One lead, float32 [T] millivolts."""
        return np.asarray(self.leads_uv[LEADS.index(name)] / 1000.0, dtype=np.float32)


def _lead_of(channel: Dataset) -> str | None:
    sources = channel.get("ChannelSourceSequence") or []
    if not sources:
        return None
    value = str(sources[0].get("CodeValue") or "").strip()
    scheme = str(sources[0].get("CodingSchemeDesignator") or "").strip().upper()
    number = value.rsplit("-", 1)[-1].rsplit(":", 1)[-1]
    if scheme in {"SCPECG", "MDC"} and number.isdigit():
        return _BY_NUMBER.get(int(number))
    name = value.upper().removeprefix("MDC_ECG_LEAD_")
    meaning = str(sources[0].get("CodeMeaning") or "").upper().removeprefix("LEAD ").split(" ")[0]
    return _BY_NAME.get(name) or _BY_NAME.get(meaning)


def _to_microvolts(channel: Dataset, lead: str) -> tuple[float, float]:
    # PS3.3 C.10.9.1.4.1: value = sample x sensitivity x correction + baseline, in the sensitivity's units.
    units = channel.get("ChannelSensitivityUnitsSequence") or []
    unit = str(units[0].get("CodeValue") or "").strip() if units else ""
    factor = _MICROVOLTS.get(unit.lower())
    sensitivity = channel.get("ChannelSensitivity")
    if factor is None or sensitivity is None:
        raise MalformedDataSetError(f"ECG lead {lead} states no sensitivity in volts (unit {unit[:16]!r})")
    correction = channel.get("ChannelSensitivityCorrectionFactor")
    gain = float(sensitivity) * float(1.0 if correction is None else correction)
    baseline = float(channel.get("ChannelBaseline") or 0.0)
    if not np.isfinite([gain, baseline]).all() or gain == 0:
        raise MalformedDataSetError(f"ECG lead {lead} has an impossible sensitivity")
    return gain * factor, baseline * factor


def read_electrocardiogram(dataset: Dataset) -> Electrocardiogram:
    """The first multiplex group as twelve leads; III and the augmented leads are computed where they are not stored.

    Raises:
        MalformedDataSetError: no waveform, a sample format other than 16 bit signed (PS3.3 A.34.3), lengths that do
            not agree, no sensitivity, or leads missing.
    """
    try:
        return _electrocardiogram(dataset)
    except DAMAGED as error:
        raise MalformedDataSetError(f"The waveform cannot be read: {type(error).__name__}") from error


def _electrocardiogram(dataset: Dataset) -> Electrocardiogram:
    groups = dataset.get("WaveformSequence") or []
    if not groups:
        raise MalformedDataSetError("The data set has no waveform")
    group = groups[0]
    channels, samples = int(group.get("NumberOfWaveformChannels") or 0), int(group.get("NumberOfWaveformSamples") or 0)
    rate_hz = float(group.get("SamplingFrequency") or 0.0)
    definitions = group.get("ChannelDefinitionSequence") or []
    if not 1 <= channels <= MAX_CHANNELS or not 1 <= samples <= MAX_SAMPLES or len(definitions) != channels:
        raise MalformedDataSetError(f"The waveform declares {channels} channels of {samples} samples")
    if not _RATE_HZ[0] <= rate_hz <= _RATE_HZ[1]:
        raise MalformedDataSetError(f"The waveform declares {rate_hz:g} samples a second")
    if group.get("WaveformBitsAllocated") != 16 or group.get("WaveformSampleInterpretation") != "SS":
        raise MalformedDataSetError("ECG samples are not 16 bit signed")
    data = group.get("WaveformData") or b""
    if len(data) != channels * samples * 2:
        raise MalformedDataSetError(f"The waveform has {len(data)} bytes where {channels * samples * 2} are declared")
    raw = np.frombuffer(data, dtype="<i2").reshape(samples, channels)
    found: dict[str, NDArray[Any]] = {}
    for index, definition in enumerate(definitions):
        lead = _lead_of(definition)
        if lead is None or lead in found:
            continue
        gain, baseline = _to_microvolts(definition, lead)
        found[lead] = raw[:, index] * gain + baseline
    if "I" in found and "II" in found:  # Einthoven and Goldberger: the limb leads are two measurements
        one, two = found["I"], found["II"]
        found.setdefault("III", two - one)
        found.setdefault("aVR", -(one + two) / 2)
        found.setdefault("aVL", one - two / 2)
        found.setdefault("aVF", two - one / 2)
    missing = [lead for lead in LEADS if lead not in found]
    if missing:
        raise MalformedDataSetError(f"The ECG has no lead {', '.join(missing)}")
    leads_uv = np.stack([found[lead] for lead in LEADS]).astype(np.float32)
    return Electrocardiogram(leads_uv, rate_hz, str(dataset.get("SOPInstanceUID") or ""))
