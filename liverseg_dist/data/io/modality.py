"""Which imaging modality a data set's `dataset.json` names, and whether its voxels may be read as HU.

Everything here (audit, intensity clip, network) is made for CT in Hounsfield units. A data set of
another modality is refused as a whole, before its scans are read, because some MR scans have values
that look like HU and would pass the audit of single scans.
"""

import re
from collections.abc import Iterable
from typing import Literal

from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import UserError, printable

Modality = Literal["CT", "any"]
MODALITY_KEYS = ("modality", "channel_names")
"""Of MSD and nnU-Net 1, and of nnU-Net 2."""
CT_WORDS = frozenset({"ct", "cect", "ncct", "ldct", "cbct", "cta", "hu"})
CT_PHRASES = ("computed tomography", "computed axial tomography", "hounsfield")
OTHER_WORDS = frozenset(
    {
        "mr",
        "mri",
        "mra",
        "cmr",
        "mrt",
        "t1",
        "t2",
        "t1w",
        "t2w",
        "t1c",
        "t1ce",
        "t1gd",
        "pd",
        "pdw",
        "flair",
        "dwi",
    }
    | {
        "adc",
        "swi",
        "dce",
        "bold",
        "pet",
        "fdg",
        "suv",
        "spect",
        "us",
        "ultrasound",
        "sonography",
        "xray",
        "dx",
        "cr",
    }
    | {
        "rgb",
        "rgba",
        "red",
        "green",
        "blue",
        "histology",
        "microscopy",
        "oct",
        "angiography",
        "mammography",
    }
)
OTHER_PHRASES = ("magnetic resonance", "positron emission", "single photon", "x ray")


def check_modality(index: str, names: Iterable[object]) -> list[Finding]:
    """Findings about the one channel that `index` (a file's name) describes.

    error `not_ct`: another modality is named. warning `modality_unknown`: the name is none that is
    known, such as nnU-Net's normalisation scheme `zscore`.
    """
    found = []
    for name in names:
        text = printable(name)[:80]
        kind = _classify_modality(text)
        if kind == "other":
            message = f"{index} says modality {text}, not CT; its voxels are no HU"
            found.append(Finding("error", "not_ct", message))
        elif kind == "unknown":
            message = (
                f"{index} says modality {text}, which is not known; voxels are read as HU of a CT"
            )
            found.append(Finding("warning", "modality_unknown", message))
    return found


def refuse_other_modality(where: object, notes: Iterable[Finding], allowed: Modality) -> None:
    """Raises `UserError` for a data set of another modality than CT, unless any is allowed."""
    for note in notes:
        if note.code == "not_ct" and allowed == "CT":
            raise UserError(
                f"{printable(where)}: {note.message}. Networks and audit here are for CT: correct dataset.json if it "
                "is wrong, or set convert.modality=any to read the voxels as HU all the same"
            )


def _classify_modality(name: str) -> Literal["ct", "other", "unknown"]:
    text = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    words = set(text.split())
    is_ct = bool(words & CT_WORDS) or any(phrase in text for phrase in CT_PHRASES)
    is_other = bool(words & OTHER_WORDS) or any(phrase in text for phrase in OTHER_PHRASES)
    if is_ct and not is_other:
        return "ct"
    # "PET/CT" names two modalities, and a file has one channel: which one is not known.
    return "other" if is_other and not is_ct else "unknown"
