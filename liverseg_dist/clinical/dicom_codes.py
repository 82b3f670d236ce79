"""Coded terms of DICOM results: SNOMED CT for structures, UCUM for units, DCM for the method.

A structure's code comes from the label scheme; the meaning that belongs to a code comes from
pydicom's copy of the standard. Structures without a code get a general one and keep their name as
the label of the segment.
"""

from functools import cache
from typing import Any

from liverseg_dist.labels import LabelScheme, Structure
from liverseg_dist.optional_packages import load_module

SCHEME = "SCT"
ANATOMICAL_STRUCTURE = ("123037004", "Anatomical Structure")
MORPHOLOGIC_ABNORMALITY = ("49755003", "Morphologically Abnormal Structure")
GENERAL_ORGAN = ("91723000", "Anatomical structure")
GENERAL_LESION = ("52988006", "Lesion")
VOLUME = ("118565006", "Volume")
LONG_AXIS = ("103339001", "Long Axis")
SHORT_AXIS = ("103340004", "Short Axis")
PRIVATE_SCHEME = "99LIVERSEG"
BURDEN = ("BURDEN", "Share of the organ's volume that is lesion")
UNITS = {"ml": "milliliter", "mm": "millimeter", "%": "percent"}


def sct(pair: tuple[str, str]) -> Any:
    """A SNOMED CT code from (value, meaning)."""
    return load_module("highdicom").sr.CodedConcept(pair[0], SCHEME, pair[1])


def unit(symbol: str) -> Any:
    """A unit of `UNITS`."""
    return load_module("highdicom").sr.CodedConcept(symbol, "UCUM", UNITS[symbol])


@cache
def _meanings() -> dict[str, str]:
    """Meaning by SNOMED CT code, as far as the standard lists them."""
    codes = load_module("pydicom.sr.codedict").codes
    found: dict[str, str] = {}
    for code in codes.SCT.concepts.values():
        found.setdefault(code.value, code.meaning)
    return found


def category_of(structure: Structure) -> Any:
    """Category of a segment."""
    is_lesion = structure.kind == "lesion"
    return sct(MORPHOLOGIC_ABNORMALITY if is_lesion else ANATOMICAL_STRUCTURE)


def type_of(structure: Structure) -> Any:
    """What a segment shows."""
    if structure.snomed is None:
        return sct(GENERAL_LESION if structure.kind == "lesion" else GENERAL_ORGAN)
    meaning = _meanings().get(structure.snomed, structure.name.capitalize())
    return sct((structure.snomed, meaning))


def site_of(structure: Structure, scheme: LabelScheme) -> Any | None:
    """The organ that a lesion lies in; None without one that has a code."""
    organ = None if structure.inside is None else scheme.find(structure.inside)
    return None if organ is None or organ.snomed is None else type_of(organ)
