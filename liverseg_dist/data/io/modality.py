"""The imaging modality that `dataset.json` names, and whether the voxels may be read as HU.

Audit, intensity clip and network assume CT in Hounsfield units. A data set of another modality is
refused as a whole, before its scans are read, because some MR scans have values that look like HU
and would pass the audit of single scans.
"""

import re
from collections.abc import Iterable
from typing import Literal

from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import UserError, printable

Modality = Literal["CT", "any"]
MODALITY_KEYS = ("modality", "channel_names")
"""Keys of `dataset.json`: of MSD and nnU-Net 1, and of nnU-Net 2."""
MAX_SHOWN_CHARACTERS = 80
CT_WORDS = frozenset({"ct", "cect", "ncct", "ldct", "cbct", "cta", "hu"})
CT_PHRASES = ("computed tomography", "computed axial tomography", "hounsfield")
MR_WORDS = frozenset(
    ("mr", "mri", "mra", "cmr", "mrt", "t1", "t2", "t1w", "t2w", "t1c", "t1ce", "t1gd", "pd", "pdw",
     "flair", "dwi", "adc", "swi", "dce", "bold")
)  # fmt: skip
NUCLEAR_WORDS = frozenset(("pet", "fdg", "suv", "spect"))
ULTRASOUND_WORDS = frozenset(("us", "ultrasound", "sonography"))
RADIOGRAPHY_WORDS = frozenset(("xray", "dx", "cr", "angiography", "mammography"))
PICTURE_WORDS = frozenset(("rgb", "rgba", "red", "green", "blue", "histology", "microscopy", "oct"))
OTHER_WORDS = MR_WORDS | NUCLEAR_WORDS | ULTRASOUND_WORDS | RADIOGRAPHY_WORDS | PICTURE_WORDS
OTHER_PHRASES = ("magnetic resonance", "positron emission", "single photon", "x ray")


def check_modality(index: str, names: Iterable[object]) -> list[Finding]:
    """Check that the named modalities are CT.

    Args:
        index: Name of the file that names them, for messages.
        names: Names of the channels.

    Returns:
        For each other modality an error `not_ct`; for each unknown name, such as nnU-Net's
        normalisation scheme `zscore`, a warning `modality_unknown`.
    """
    findings = []
    for name in names:
        text = printable(name)[:MAX_SHOWN_CHARACTERS]
        kind = _classify_modality(text)
        if kind == "other":
            message = f"{index} names modality {text}, not CT; its voxels are not HU"
            findings.append(Finding("error", "not_ct", message))
        elif kind == "unknown":
            message = (
                f"{index} names modality {text}, which is not known; voxels are read as HU of a CT"
            )
            findings.append(Finding("warning", "modality_unknown", message))
    return findings


def refuse_other_modality(where: object, notes: Iterable[Finding], allowed: Modality) -> None:
    """Raise `UserError` if a data set has another modality than CT, unless `allowed` is any.

    Args:
        where: The data set, for the message.
        notes: Its findings, with those of `check_modality`.
        allowed: The setting `convert.modality`.
    """
    for note in notes:
        if note.code == "not_ct" and allowed == "CT":
            raise UserError(
                f"{printable(where)}: {note.message}. Networks and audit here are for CT: correct "
                "dataset.json if it is wrong, or set convert.modality=any to read the voxels as HU"
            )


def _classify_modality(name: str) -> Literal["ct", "other", "unknown"]:
    # Words, not substrings: "CT" is contained in "direct".
    text = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    words = set(text.split())
    is_ct = bool(words & CT_WORDS) or any(phrase in text for phrase in CT_PHRASES)
    is_other = bool(words & OTHER_WORDS) or any(phrase in text for phrase in OTHER_PHRASES)
    if is_ct and not is_other:
        return "ct"
    # "PET/CT" names two modalities, but a file has one channel: it is unknown which of the two.
    return "other" if is_other and not is_ct else "unknown"
