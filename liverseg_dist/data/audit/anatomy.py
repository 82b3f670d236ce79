"""What is known of organs, by their SNOMED CT code: plausible volume and side of the body.

The audit warns about a structure that is far from it. A structure without a code has that of LiTS's
structure of the same name; other structures are not judged. To add an organ, add one line.
"""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.errors import printable
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure


@dataclass(frozen=True)
class Anatomy:
    """Limits of an organ with its lesions in adults, with a wide margin."""

    volume_ml: tuple[float, float]
    is_right: bool
    """Whether its centre lies to the right of the body's centre."""


ANATOMY_BY_CODE = {"10200004": Anatomy(volume_ml=(300.0, 5000.0), is_right=True)}


def anatomy_of(structure: Structure) -> Anatomy | None:
    """What is known of a structure, or None."""
    code = structure.snomed
    if code is None:
        known = LITS_SCHEME.find(structure.name)
        code = known.snomed if known is not None else None
    return ANATOMY_BY_CODE.get(code or "")


def known_organs(labels: LabelScheme) -> list[tuple[Structure, Anatomy]]:
    """The organs of a scheme of which something is known."""
    found = []
    for structure in labels.organs:
        anatomy = anatomy_of(structure)
        if anatomy is not None:
            found.append((structure, anatomy))
    return found


def find_reference_organ(labels: LabelScheme) -> Structure | None:
    """The organ whose HU show whether an image is a CT: soft tissue of known HU, or None."""
    known = known_organs(labels)
    return known[0][0] if known else None


def healthy_mask(label_zyx: np.ndarray, labels: LabelScheme, organ: Structure) -> np.ndarray:
    """The voxels of an organ that are no lesion."""
    values = set(organ.values)
    for lesion in labels.lesions:
        values -= set(lesion.values)
    is_member = np.zeros(labels.membership.shape[1], dtype=bool)
    is_member[sorted(values)] = True
    return np.asarray(is_member[label_zyx])


def code_name(structure: Structure) -> str:
    """The structure's name as a part of codes and keys: `right_kidney`."""
    return "_".join(printable(structure.name).split())
