"""Metadata of an instance as a viewer is given it (PS3.18 annex F): the sidecar's, with what trips viewers put right.

Only what is shown changes; the data set itself is never touched, and Part 10 retrieval gives it as it came.
"""

import math
from typing import Any

from storage import dataset
from storage.dicomweb.library import StoredInstance, public_patient_id
from storage.dicomweb.media_types import EXPLICIT_VR_LITTLE_ENDIAN
from storage.sidecar import InstanceSidecar
from storage.visible import visible

_SPACINGS = frozenset({"00280030", "00181164", "00182010"})  # Pixel, Imager Pixel, Nominal Scanned Pixel Spacing
_TEXTS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
"""The VRs that Specific Character Set governs (PS3.5 6.1.2.3): the only ones that can hold more than ASCII."""
_NATIVE_SYNTAXES = dataset.IMPLICIT_SYNTAXES | {
    EXPLICIT_VR_LITTLE_ENDIAN,
    dataset.EXPLICIT_VR_BIG_ENDIAN,
    "1.2.840.10008.1.2.1.99",  # Deflated: inflated for the client
}


def is_native(transfer_syntax_uid: str) -> bool:
    """Whether its frames are plain pixels (PS3.5 8.2), not compressed."""
    return transfer_syntax_uid in _NATIVE_SYNTAXES


def served_transfer_syntax(transfer_syntax_uid: str) -> str:
    """The transfer syntax of frames on the web: native ones are made little endian (PS3.18 8.7.3.1), others stay."""
    return EXPLICIT_VR_LITTLE_ENDIAN if is_native(transfer_syntax_uid) else transfer_syntax_uid


def shown(sidecar: InstanceSidecar, stored: StoredInstance, root: str) -> dict[str, Any]:
    """DICOM JSON of one instance under the DICOMweb root `root` (a path).

    Bulk data gets its address, spacing that cannot be is left out, Patient ID is made unique among hospitals, and no
    text has a character that hides or reorders others.
    """
    content = _data_set(sidecar.metadata, f"{stored.path(root)}/bulkdata/")
    patient_id = public_patient_id(stored.site_code, stored.patient_id)
    content["00100020"] = with_visible_text({"vr": "LO", "Value": [patient_id]})
    content["00083002"] = {"vr": "UI", "Value": [served_transfer_syntax(stored.transfer_syntax_uid)]}
    return dict(sorted(content.items()))


def _data_set(content: dict[str, Any], bulk_root: str) -> dict[str, Any]:
    shown_content: dict[str, Any] = {}
    for tag, element in content.items():
        if tag in _SPACINGS and not _is_spacing(element.get("Value", [])):
            continue  # 0\0 gives the viewer a black image
        if "BulkDataURI" in element:
            shown_content[tag] = element | {"BulkDataURI": bulk_root + element["BulkDataURI"]}
        elif element.get("vr") == "SQ":  # nesting was bounded when the sidecar was made
            shown_content[tag] = element | {"Value": [_data_set(item, bulk_root) for item in element.get("Value", [])]}
        else:
            shown_content[tag] = with_visible_text(element)
    return shown_content


def with_visible_text(element: dict[str, Any]) -> dict[str, Any]:
    """An element of DICOM JSON (PS3.18 F.2) as people may look at it; UIDs, codes and numbers as they are."""
    if element.get("vr") not in _TEXTS or "Value" not in element:
        return element
    return element | {"Value": [_visible_value(value) for value in element["Value"]]}


def _visible_value(value: Any) -> Any:
    if isinstance(value, dict):  # a person name's groups (PS3.18 F.2.2)
        return {group: visible(name) for group, name in value.items()}
    return visible(value) if isinstance(value, str) else value


def _is_spacing(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values)
