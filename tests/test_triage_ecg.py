"""12-lead ECGs from DICOM waveforms, and the rhythm model on real recordings.

Left out: other ECG formats (the gateway's import makes DICOM of them first). LUDB needs the shared data.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from ai_triage.ecg import LEADS, read_electrocardiogram
from ai_triage.ecg_rhythm import RHYTHMS, EcgRhythmModel, at_codec_rate
from ai_triage.eval_ecg import measure, read_wfdb
from ai_triage.interface import StudyFacts
from storage.errors import MalformedDataSetError
from tests.triage_material import ECG, demonstration_ecg, packaged, shared, twelve_lead

ADULT = StudyFacts("county-a", ("ECG",), age_years=60.0)


def _model() -> EcgRhythmModel:
    assert isinstance(ECG, EcgRhythmModel)
    return ECG


def test_the_packaged_ecg_is_read_as_twelve_leads_in_microvolts() -> None:
    dataset = packaged("waveform_ecg.dcm")
    ecg = read_electrocardiogram(dataset)
    assert ecg.leads_uv.shape == (12, 10000)
    assert ecg.leads_uv.dtype == np.float32
    assert ecg.rate_hz == 1000
    # pydicom's own reading of the same waveform, and Einthoven's law
    assert np.allclose(ecg.leads_uv, dataset.waveform_array(0).T, atol=0.01)
    one, two, three = ecg.leads_uv[:3]
    assert np.abs(two - one - three).max() < 10
    assert 300 < np.ptp(two) < 5000


def test_leads_are_found_by_their_codes_whatever_their_order() -> None:
    source = read_electrocardiogram(packaged("waveform_ecg.dcm"))
    shuffled = read_electrocardiogram(twelve_lead(source, lead_names=tuple(reversed(LEADS))))
    assert np.abs(shuffled.leads_uv - source.leads_uv).max() <= 1.25  # half of a step of 2.5 uV


def test_a_recorder_that_stores_eight_leads_gives_twelve() -> None:
    source = read_electrocardiogram(packaged("waveform_ecg.dcm"))
    eight = read_electrocardiogram(twelve_lead(source, lead_names=("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")))
    assert np.abs(eight.leads_uv - source.leads_uv).max() < 10


def test_millivolts_and_a_baseline_are_honoured() -> None:
    dataset = packaged("waveform_ecg.dcm")
    before = read_electrocardiogram(dataset).leads_uv[1]
    channel = dataset.WaveformSequence[0].ChannelDefinitionSequence[1]
    channel.ChannelSensitivity = float(channel.ChannelSensitivity) / 1000
    channel.ChannelSensitivityUnitsSequence[0].CodeValue = "mV"
    channel.ChannelBaseline = "0.5"
    assert np.allclose(read_electrocardiogram(dataset).leads_uv[1], before + 500, atol=0.01)


def _delete_sensitivity(dataset: Dataset) -> None:
    del dataset.WaveformSequence[0].ChannelDefinitionSequence[3].ChannelSensitivity


def _cut_data(dataset: Dataset) -> None:
    dataset.WaveformSequence[0].WaveformData = dataset.WaveformSequence[0].WaveformData[:-2]


def _lie_about_length(dataset: Dataset) -> None:
    dataset.WaveformSequence[0].NumberOfWaveformSamples = 2_000_000_000


def _eight_bit(dataset: Dataset) -> None:
    dataset.WaveformSequence[0].WaveformSampleInterpretation = "UB"


def _no_rate(dataset: Dataset) -> None:
    dataset.WaveformSequence[0].SamplingFrequency = 0


def _no_v3(dataset: Dataset) -> None:
    source = dataset.WaveformSequence[0].ChannelDefinitionSequence[8].ChannelSourceSequence[0]
    source.CodeValue, source.CodeMeaning = "5.6.3-9-90", "Lead X"


def _no_waveform(dataset: Dataset) -> None:
    del dataset.WaveformSequence


def _two_rates(dataset: Dataset) -> None:
    dataset.WaveformSequence[0].SamplingFrequency = [500, 1000]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_two_rates, "cannot be read: TypeError"),
        (_delete_sensitivity, "no sensitivity"),
        (_cut_data, "239998 bytes where 240000"),
        (_lie_about_length, "2000000000 samples"),
        (_eight_bit, "not 16 bit"),
        (_no_rate, "0 samples a second"),
        (_no_v3, "no lead V3"),
        (_no_waveform, "no waveform"),
    ],
)
def test_a_waveform_that_cannot_be_trusted_is_refused_with_its_reason(
    spoil: Callable[[Dataset], None], said: str
) -> None:
    dataset = packaged("waveform_ecg.dcm")
    spoil(dataset)
    with pytest.raises(MalformedDataSetError, match=said):
        read_electrocardiogram(dataset)
    suitability = ECG.suits(ADULT, [dataset])
    assert not suitability.accepted
    assert said in suitability.reason


def test_a_child_a_short_strip_and_a_study_without_waveform_are_not_for_this_model() -> None:
    dataset = packaged("waveform_ecg.dcm")
    assert ECG.suits(ADULT, [dataset]).accepted
    assert ECG.suits(StudyFacts("county-a", ("ECG",)), [dataset]).accepted  # age not sent
    assert "18 years" in ECG.suits(StudyFacts("county-a", ("ECG",), age_years=2.0), [dataset]).reason
    assert "no 12-lead ECG" in ECG.suits(ADULT, []).reason
    group = dataset.WaveformSequence[0]
    group.NumberOfWaveformSamples, group.WaveformData = 5000, group.WaveformData[: 5000 * 12 * 2]
    assert "shorter than 8 seconds" in ECG.suits(ADULT, [dataset]).reason


def test_the_packaged_sinus_ecg_raises_no_flag() -> None:
    dataset = packaged("waveform_ecg.dcm")
    result = ECG.run([dataset])
    assert result.input_uids == (dataset.SOPInstanceUID,)
    assert not any(finding.positive for finding in result.findings)
    assert all(finding.minutes_earlier == 0 for finding in result.findings)
    reading = _model().read(read_electrocardiogram(dataset))
    assert reading.rate_bpm == pytest.approx(61, abs=1)  # the recorder's own annotation: R-R 982 ms
    assert RHYTHMS[int(np.argmax(reading.probabilities))] == "sinus"


def test_the_demonstration_ecg_of_fibrillation_is_flagged_and_its_neighbour_is_not() -> None:
    flagged = ECG.run([pydicom.dcmread(demonstration_ecg(2))])
    (finding,) = (finding for finding in flagged.findings if finding.positive)
    assert finding.code == "atrial_fibrillation"
    assert finding.probability > 0.9
    assert finding.minutes_earlier > 0
    calm = ECG.run([pydicom.dcmread(demonstration_ecg(1))])
    assert not any(finding.positive for finding in calm.findings)


def test_the_codec_is_fed_at_its_own_rate() -> None:
    seconds = np.arange(10_000) / 1000
    fast = np.sin(2 * np.pi * 7 * seconds).astype(np.float32)
    slow = at_codec_rate(fast, 1000)
    assert slow.size == 5000
    assert np.abs(slow[5:-5] - np.sin(2 * np.pi * 7 * (seconds[::2] - 0.0005))[5:-5]).max() < 0.02
    assert at_codec_rate(fast, 500) is fast
    assert at_codec_rate(fast[:2500], 250).size == 5000


def test_the_same_recording_at_another_rate_gets_the_same_rhythm() -> None:
    recording = read_wfdb(shared("ecg-12lead") / "96.hea")  # atrial fibrillation
    dataset = twelve_lead(recording, lead_names=LEADS)
    doubled = np.repeat(recording.leads_uv, 2, axis=1)
    faster = twelve_lead(type(recording)(doubled, 1000.0, "1.2.3"), lead_names=LEADS)
    for ecg in (dataset, faster):
        (finding,) = (finding for finding in ECG.run([ecg]).findings if finding.positive)
        assert finding.code == "atrial_fibrillation"


def test_a_beat_missed_in_one_lead_is_no_pause() -> None:
    recording = read_wfdb(shared("ecg-12lead") / "91.hea")  # the detector loses three beats of lead II
    assert _model().read(recording).longest_rr_s < 2.0


def test_an_arrest_of_three_seconds_in_every_lead_is_a_pause() -> None:
    recording = read_wfdb(shared("ecg-12lead") / "4.hea")
    leads = recording.leads_uv.copy()
    leads[:, 2000:3800] = leads[:, 1990:1991]
    reading = _model().read(type(recording)(leads, 500.0, "1.2.3"))
    assert reading.longest_rr_s >= 3.0


def test_the_figures_in_the_card_are_those_measured_again() -> None:
    directory: Path = shared("ecg-12lead")
    measured = {str(table["measure"]): table for table in measure(_model(), directory)}
    for stated in ECG.card.evidence:
        again = measured[stated["measure"]]
        for key in ("n", "positives", "true_positives", "false_positives", "called", "unpaced_true_positives"):
            assert stated.get(key) == again.get(key), stated["measure"]
