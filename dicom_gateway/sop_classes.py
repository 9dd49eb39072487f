"""What the gateway takes: every standard Storage SOP Class, retired ones too, in every transfer syntax of DIMSE.

Both lists come from the dictionary of PS3.6 Table A-1 that pydicom ships, less the tables below, so that a new edition
(the next codec, the next object) needs no change here.
"""

from pydicom._uid_dict import UID_dictionary

_NOT_A_STUDY = {
    "1.2.840.10008.1.3.10": "Media Storage Directory: a DICOMDIR, never sent by C-STORE",
    "1.2.840.10008.1.20.1": "Storage Commitment is another service",
    "1.2.840.10008.1.20.2": "Storage Commitment is another service",
    "1.2.840.10008.5.1.4.1.1.200.1": "Non-Patient Object (PS3.4 Annex GG): no patient, no study",
    "1.2.840.10008.5.1.4.1.1.200.3": "Non-Patient Object",
    "1.2.840.10008.5.1.4.1.1.200.7": "Non-Patient Object",
    "1.2.840.10008.5.1.4.1.1.201.1": "Non-Patient Object",
    "1.2.840.10008.5.1.4.38.1": "Non-Patient Object",
    "1.2.840.10008.5.1.4.39.1": "Non-Patient Object",
    "1.2.840.10008.5.1.4.43.1": "Non-Patient Object",
    "1.2.840.10008.5.1.4.44.1": "Non-Patient Object",
    "1.2.840.10008.5.1.4.45.1": "Non-Patient Object",
}
_INDUSTRIAL = ("1.2.840.10008.5.1.4.1.1.501.", "1.2.840.10008.5.1.4.1.1.601.")  # DICOS (luggage), DICONDE (weld seams)

STORAGE_SOP_CLASSES = tuple(
    uid
    for uid, (name, kind, *_) in UID_dictionary.items()
    if kind == "SOP Class" and "Storage" in name and uid not in _NOT_A_STUDY and not uid.startswith(_INDUSTRIAL)
)
"""UIDs of PS3.4 Table B.5-1 and of those that were in it once: old modalities still send Ultrasound (Retired)."""

VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_NOT_FOR_DIMSE = (
    "1.2.840.10008.1.2.6.",  # MIME encapsulation and XML: never on an association
    "1.2.840.10008.1.2.7.",  # SMPTE ST 2110: real time video, no data set
)
_LAST = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", "1.2.840.10008.1.20")
"""Where a sender offers a choice: what says its VRs before what does not, deflated and big endian after both."""

TRANSFER_SYNTAXES = (
    EXPLICIT_VR_LITTLE_ENDIAN,
    *(
        uid
        for uid, (_, kind, *_rest) in UID_dictionary.items()
        if kind == "Transfer Syntax"
        and uid not in (*_LAST, EXPLICIT_VR_LITTLE_ENDIAN)
        and not uid.startswith(_NOT_FOR_DIMSE)
    ),
    *_LAST,
)
"""In order of preference."""
