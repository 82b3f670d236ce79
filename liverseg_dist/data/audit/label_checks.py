"""Checks of a label by structure: volumes, empty structures, and lesions outside their container.

Codes and facts are named after the structure (`liver_volume`, `tumours`, `no_tumour`).
`inference.scan_checks` applies the same checks to predicted masks.
"""

from collections.abc import Collection, Sequence
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig
from liverseg_dist.data.audit.anatomy import Anatomy, code_name, known_organs
from liverseg_dist.data.audit.label_geometry import measure_offset_mm
from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import printable
from liverseg_dist.labels import IGNORE, LARGEST_VALUE, LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.texts.names import list_some
from liverseg_dist.volume import Volume

MAX_LEFT_OFFSET_MM = 5.0


def plural_of(structure: Structure) -> str:
    """`tumours`: for counts of a lesion structure."""
    return f"{printable(structure.name)}s"


def check_label(
    label: Volume, labels: LabelScheme, annotated: Collection[str], facts: dict[str, Any]
) -> list[Finding]:
    """Check volumes and lesions of a label on the image's grid; adds them to `facts`.

    Args:
        label: Class values.
        labels: Their scheme.
        annotated: Names of the structures that were annotated; the others are not judged.
        facts: Facts of the audit.
    """
    counts = np.zeros(LARGEST_VALUE + 1, dtype=np.int64)
    for slice_yx in label.voxels:
        counts += np.bincount(slice_yx.reshape(-1), minlength=LARGEST_VALUE + 1)
    class_voxels = counts[: labels.num_classes].tolist()
    facts["class_voxels"] = class_voxels
    voxel_ml = label.grid.voxel_volume_ml
    volumes_ml = {}
    for name, count in zip(labels.class_names[1:], class_voxels[1:], strict=True):
        volumes_ml[name] = round(count * voxel_ml, 3)
    facts["volumes_ml"] = volumes_ml
    is_annotated = set(annotated)
    if len(is_annotated) < len(labels.structures):
        facts["annotated"] = [name for name in labels.structure_names if name in is_annotated]
    voxels = {item.name: int(counts[list(item.values)].sum()) for item in labels.structures}
    judged = [item for item in labels.structures if item.name in is_annotated]
    findings = _check_empty(labels, judged, voxels)
    if any(finding.severity == "error" for finding in findings):
        return findings
    findings += _report_unexpected(labels, is_annotated, class_voxels)
    for organ, anatomy in known_organs(labels):
        if organ in judged and voxels[organ.name]:
            findings += check_volume(organ, anatomy, voxels[organ.name] * voxel_ml)
    for lesion in labels.lesions:
        if lesion in judged:
            findings += _check_lesion(label, labels, lesion, voxels[lesion.name], facts)
    ignored = int(counts[IGNORE])
    if ignored:
        message = f"{ignored:,} voxels have the ignore label; losses and metrics leave them out"
        findings.append(Finding("info", "ignored_voxels", message))
    return findings


def _check_empty(
    labels: LabelScheme, judged: Sequence[Structure], voxels: dict[str, int]
) -> list[Finding]:
    """An error if a label of organs has no voxel at all; else a note on the organs it lacks."""
    organs = [item for item in judged if item.kind == "organ"]
    if organs and not any(voxels.values()):
        message = f"the label is empty: {_neither(labels.structure_names)}"
        return [Finding("error", "label_empty", message)]
    absent = [printable(item.name) for item in organs if not voxels[item.name]]
    if not absent:
        return []
    return [Finding("info", "structures_absent", f"no voxel of {list_some(absent)} is labelled")]


def _neither(names: Sequence[str]) -> str:
    shown = [printable(name) for name in names]
    if len(shown) == 2:
        return f"neither {shown[0]} nor {shown[1]}"
    return f"no voxel of {list_some(shown)}"


def _report_unexpected(
    labels: LabelScheme, annotated: set[str], class_voxels: Sequence[int]
) -> list[Finding]:
    """A warning if voxels belong only to structures that are not annotated in this case."""
    unexpected = []
    for value in range(1, labels.num_classes):
        owners = [item.name for item in labels.structures if value in item.values]
        if class_voxels[value] and not annotated.intersection(owners):
            unexpected.append(printable(labels.class_names[value]))
    if not unexpected:
        return []
    message = (
        f"voxels of {list_some(unexpected)} are labelled, but the case does not list the structure "
        "as annotated; losses and metrics leave them out"
    )
    return [Finding("warning", "not_annotated", message)]


def check_volume(organ: Structure, anatomy: Anatomy, volume_ml: float) -> list[Finding]:
    """Check that the volume of an organ with its lesions is plausible."""
    low, high = anatomy.volume_ml
    if low <= volume_ml <= high:
        return []
    message = (
        f"a {printable(organ.name)} of {volume_ml:.0f} ml, not {low:.0f} to {high:.0f} "
        "(a cropped scan, or a wrong voxel size?)"
    )
    return [Finding("warning", f"{code_name(organ)}_volume", message)]


def _check_lesion(
    label: Volume, labels: LabelScheme, lesion: Structure, voxels: int, facts: dict[str, Any]
) -> list[Finding]:
    key = f"{code_name(lesion)}s"
    if not voxels:
        facts[key] = 0
        message = f"no {printable(lesion.name)} is labelled"
        return [Finding("info", f"no_{code_name(lesion)}", message)]
    facts[key], findings = check_lesions(label.voxels, labels, lesion)
    return findings


def check_lesions(
    label_zyx: np.ndarray, labels: LabelScheme, lesion: Structure
) -> tuple[int, list[Finding]]:
    """Number of lesions, and a finding if some do not touch their container."""
    count, detached, detached_voxels = count_detached_lesions(label_zyx, labels, lesion)
    if not detached or lesion.inside is None:
        return count, []
    container = labels.structure(lesion.inside)
    message = (
        f"{detached} of {count} {plural_of(lesion)} ({detached_voxels:,} voxels) do not touch the "
        f"{printable(container.name)}"
    )
    code = f"{code_name(lesion)}_outside_{code_name(container)}"
    return count, [Finding("warning", code, message)]


def check_side(
    image: Volume,
    label: Volume,
    facts: dict[str, Any],
    channel: ChannelConfig = CT_CHANNEL,
    labels: LabelScheme = LITS_SCHEME,
) -> list[Finding]:
    """Check that organs are on their side of the body; adds their offsets to `facts`.

    A flipped header (LPS read as RAS, a lost sign) puts them on the other one.
    """
    findings = []
    for organ, anatomy in known_organs(labels):
        mask = label.with_voxels(labels.mask_of(label.voxels, organ))
        offset_mm = measure_offset_mm(image, mask, channel)
        if offset_mm is None:
            continue
        facts[f"{code_name(organ)}_right_of_middle_mm"] = round(offset_mm, 1)
        to_side_mm, other_side = (offset_mm, "left") if anatomy.is_right else (-offset_mm, "right")
        if to_side_mm >= -MAX_LEFT_OFFSET_MM:
            continue
        message = (
            f"the {printable(organ.name)}'s centre is {-to_side_mm:.0f} mm to the {other_side} of "
            "the body's: a flipped header, or situs inversus"
        )
        findings.append(Finding("warning", f"{code_name(organ)}_on_the_{other_side}", message))
    return findings


def count_detached_lesions(
    label_zyx: np.ndarray, labels: LabelScheme, lesion: Structure
) -> tuple[int, int, int]:
    """Count lesions and those that touch no voxel of their container; 26 neighbours touch.

    Memory: 4 bytes for each voxel of the box around the lesions.

    Returns:
        Lesions, detached lesions, voxels of the detached lesions.
    """
    is_lesion_value = labels.membership[labels.structures.index(lesion)]
    box = _find_box(label_zyx, is_lesion_value)
    if box is None:
        return 0, 0, 0
    cropped = label_zyx[box]
    is_lesion = is_lesion_value[cropped]
    # Only the box is labelled: components of the whole scan would need 4 bytes for each voxel.
    components = cc3d.connected_components(is_lesion.view(np.uint8), connectivity=26)
    count = int(components.max())
    container = None if lesion.inside is None else labels.structure(lesion.inside)
    if container is None:
        return count, 0, 0
    is_around_value = np.zeros_like(is_lesion_value)
    is_around_value[sorted(set(container.values) - set(lesion.values))] = True
    is_detached = np.ones(count + 1, dtype=bool)
    touching = _dilate_mask(is_around_value[cropped]) & is_lesion
    is_detached[np.unique(components[touching])] = False
    # Component 0 is everything that is no lesion.
    is_detached[0] = False
    detached_voxels = int(np.count_nonzero(is_detached[components]))
    return count, int(np.count_nonzero(is_detached)), detached_voxels


def _find_box(label_zyx: np.ndarray, is_member: np.ndarray) -> tuple[slice, ...] | None:
    """The box around all voxels of some values with a margin of one voxel; None without any."""
    in_plane = np.zeros(label_zyx.shape[1:], dtype=bool)
    planes = []
    # By slice: no boolean copy of a large scan.
    for z, slice_yx in enumerate(label_zyx):
        mask_yx = is_member[slice_yx]
        if mask_yx.any():
            planes.append(z)
            in_plane |= mask_yx
    if not planes:
        return None
    rows = np.flatnonzero(in_plane.any(axis=1))
    columns = np.flatnonzero(in_plane.any(axis=0))
    box = []
    for indices in (planes, rows, columns):
        box.append(slice(max(0, int(indices[0]) - 1), int(indices[-1]) + 2))
    return tuple(box)


def _dilate_mask(mask_zyx: np.ndarray) -> np.ndarray:
    """The mask and its 26 neighbours."""
    # One voxel along each axis in turn gives the 3 x 3 x 3 cube.
    for axis in range(3):
        before = np.moveaxis(mask_zyx, axis, 0)
        after = before.copy()
        after[1:] |= before[:-1]
        after[:-1] |= before[1:]
        mask_zyx = np.moveaxis(after, 0, axis)
    return mask_zyx
