"""Writes measured figures into a model's `triage.toml`, so that no figure in it was typed by hand.

The file keeps its hand-written upper part; everything below the marker line is written by the evaluation scripts.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ai_triage.model_file import FILE_NAME
from ai_triage.registry import files_digest
from ai_triage.statistics import Interval

MARKER = "# Below this line: measured and written by the evaluation script. Do not edit."

Figure = str | int | float | bool | Interval


def _toml(value: Figure) -> str:
    if isinstance(value, Interval):
        return f"[{value.low:.3f}, {value.high:.3f}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}" if value != int(value) else f"{value:.1f}"
    return str(value) if isinstance(value, int) else json.dumps(value, ensure_ascii=False)


def evidence_text(tables: Sequence[Mapping[str, Figure]]) -> str:
    """The tables as TOML. An `Interval` under `auc` becomes `auc` and `auc_95`."""
    lines: list[str] = []
    for table in tables:
        lines.append("\n[[evidence]]")
        for key, value in table.items():
            if isinstance(value, Interval):
                lines.append(f"{key} = {value.value:.4f}")
                lines.append(f"{key}_95 = {_toml(value)}")
            else:
                lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def write_evidence(
    directory: Path, tables: Sequence[Mapping[str, Figure]], settings: Mapping[str, float] | None = None
) -> None:
    """Replace what stands below the marker, each `key = number` of `settings` above it, and the files' digest.

    Raises:
        ValueError: the marker, or one of the keys, is not there exactly once.
    """
    path = directory / FILE_NAME
    upper, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"{path} has no marker line")
    replacements = {"files_sha256": f'"{files_digest(directory)}"'}
    replacements |= {key: _toml(value) for key, value in (settings or {}).items()}
    for key, value in replacements.items():
        upper, times = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", upper)
        if times != 1:
            raise ValueError(f"{path} has {times} lines {key} = …")
    path.write_text(upper + MARKER + "\n" + evidence_text(tables), encoding="utf-8")
