"""Measures the ECG rhythm model on LUDB records and writes the figures into its `triage.toml`.

    python -m ai_triage.eval_ecg DIRECTORY [--write]

DIRECTORY holds the WFDB files and `ludb-001-100.csv`. Records 101 to 200 are kept aside for acceptance and are not
read. The rule that counts an irregular, spikeless "paced" rhythm as possible fibrillation was chosen on these same
hundred records: the figures with it are in-sample, those without it are not.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ai_triage.ecg import LEADS, Electrocardiogram
from ai_triage.ecg_rhythm import RHYTHMS, EcgRhythmModel, RhythmReading
from ai_triage.evidence import Figure, write_evidence
from ai_triage.registry import DEFAULT_DIRECTORY, load_model
from ai_triage.statistics import auc_with_interval, sensitivity_specificity

_DATA_SET = "LUDB records 1 to 100 (Lobachevsky University, PhysioNet, ODC-BY)"
_BY = "Yuanzhen, ai_triage/eval_ecg.py"


def read_wfdb(header: Path) -> Electrocardiogram:
    """A 16-bit WFDB record with twelve signals in one file, as LUDB has them.

    Raises:
        ValueError: another format, or another set of signals.
    """
    lines = [line for line in header.read_text().splitlines() if line and not line.startswith("#")]
    name, signals, rate_hz = lines[0].split()[:3]
    leads: dict[str, NDArray[np.float64]] = {}
    raw = np.fromfile(header.with_suffix(".dat"), dtype="<i2").reshape(-1, int(signals))
    for index, line in enumerate(lines[1:]):
        fields = line.split()  # file, format, gain(baseline)/units, …, name
        gain_baseline, _, units = fields[2].partition("/")
        gain, _, baseline = gain_baseline.rstrip(")").partition("(")
        if fields[1] != "16" or units != "mV":
            raise ValueError(f"{header}: signal {index} is not 16 bit in mV")
        leads[fields[-1].lower()] = (raw[:, index] - float(baseline)) / float(gain) * 1000.0
    stacked = np.stack([leads[lead.lower()] for lead in LEADS]).astype(np.float32)
    return Electrocardiogram(stacked, float(rate_hz), name)


def _counts(title: str, truth: NDArray[np.bool_], called: NDArray[np.bool_]) -> dict[str, Figure]:
    return {
        "measure": title,
        "data_set": _DATA_SET,
        "by": _BY,
        "n": int(truth.size),
        "positives": int(truth.sum()),
        "true_positives": int((truth & called).sum()),
        "false_positives": int((~truth & called).sum()),
    }


def measure(model: EcgRhythmModel, directory: Path) -> list[dict[str, Figure]]:
    """The evidence tables."""
    with (directory / "ludb-001-100.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    readings: list[RhythmReading] = [model.read(read_wfdb(directory / f"{row['ID']}.hea")) for row in rows]
    rhythm = [row["Rhythms"].strip() for row in rows]
    paced = np.array([bool(row["Cardiac pacing"].strip()) for row in rows])
    fibrillation = np.array([text.startswith(("Atrial fibrillation", "Atrial flutter")) for text in rhythm])
    codec = np.array([reading.probabilities[RHYTHMS.index("atrial_fibrillation")] for reading in readings])
    combined = np.array([reading.fibrillation for reading in readings])
    threshold = next(p.threshold for p in model.card.operating_points if p.code == "atrial_fibrillation")
    patients = [row["ID"] for row in rows]
    labels = fibrillation.astype(np.int64)
    tables: list[dict[str, Figure]] = []
    for title, scores, note in (
        (
            "atrial_fibrillation",
            combined,
            "with the rule for spikeless 'paced' over four leads; the rule was chosen on these records: in-sample",
        ),
        (
            "atrial_fibrillation, codec alone",
            codec,
            "without that rule; the codec's authors trained its wave delineation, not its rhythm, on LUDB",
        ),
    ):
        sensitivity, specificity = sensitivity_specificity(labels, scores, threshold)
        table = _counts(title, fibrillation, scores >= threshold)
        tables.append(
            table
            | {
                "auc": auc_with_interval(labels, scores, patients),
                "sensitivity": sensitivity,
                "specificity": specificity,
                "unpaced_positives": int((fibrillation & ~paced).sum()),
                "unpaced_true_positives": int((fibrillation & ~paced & (scores >= threshold)).sum()),
                "paced_positives": int((fibrillation & paced).sum()),
                "paced_true_positives": int((fibrillation & paced & (scores >= threshold)).sum()),
                "note": note,
            }
        )
    called = np.array([int(np.argmax(reading.probabilities)) for reading in readings])
    sinus = np.array([text.startswith("Sinus") for text in rhythm]) & ~paced
    tables.append(
        _counts("sinus rhythm of unpaced records, called sinus", sinus, called == RHYTHMS.index("sinus"))
        | {"note": "the codec's other calls here are bundle branch block and AV block; no finding is made of them"}
    )
    tables.append(
        _counts("pacemaker, pacing spikes found", paced, np.array([r.has_pacing_spikes for r in readings]))
        | {"note": "a pacemaker may be present and silent, and bipolar spikes are small"}
    )
    rates = np.array([reading.rate_bpm for reading in readings])
    slow = np.array([text == "Sinus bradycardia" for text in rhythm])
    tables.append(
        _counts("sinus bradycardia, rate below 60", slow, rates < 60)
        | {"note": "how far the measured rate agrees with the cardiologists' word"}
    )
    for code, holds in (
        ("rate_150_or_more", rates >= 150),
        ("rate_below_40", rates < 40),
        ("pause_3_s", np.array([r.longest_rr_s >= 3.0 for r in readings])),
    ):
        tables.append(
            {
                "measure": code,
                "data_set": _DATA_SET,
                "by": _BY,
                "n": len(rows),
                "called": int(holds.sum()),
                "note": "a rule; no such diagnosis is stated here, so only how often it fires is known; "
                "four leads are asked since a false pause of record 91, so this is in-sample",
            }
        )
    return tables


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--write", action="store_true", help="write the figures into triage.toml")
    arguments = parser.parse_args()
    where = DEFAULT_DIRECTORY / "ecg_rhythm"
    model = load_model(where)
    if not isinstance(model, EcgRhythmModel):
        raise TypeError("models/ecg_rhythm is not the ECG rhythm model")
    tables = measure(model, arguments.directory)
    for table in tables:
        print(table)
    if arguments.write:
        write_evidence(where, tables)


if __name__ == "__main__":
    main()
