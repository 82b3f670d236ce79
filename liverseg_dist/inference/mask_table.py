"""What `predict` writes about a mask: volumes and counts for `volumes.csv`, labels for viewers.

Used by `predict_scans` and `liverseg predict`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.errors import UserError, printable
from liverseg_dist.files import write_json
from liverseg_dist.inference.postprocess import LESION_CONNECTIVITY, find_foreground_box
from liverseg_dist.inference.structure_values import find_container, is_task03, select_values
from liverseg_dist.label_scheme import read_label_scheme
from liverseg_dist.labels import LARGEST_VALUE, LabelScheme, Structure
from liverseg_dist.volume import Grid

DATASET_FILE = "dataset.json"


def measure_mask(mask_zyx: np.ndarray, grid: Grid, labels: LabelScheme) -> dict[str, object]:
    """Volumes, burden and number of lesions of a mask, by the names of `list_measurements`.

    Returns:
        `NAME_ml`: volume of a structure with everything inside it. `NAME_burden`: volume of a
        lesion / volume of the structure around it; None without the latter. `NAME_count`: number of
        lesions, connected by faces as lesions are counted in LiTS. For Task03 the last two are
        `burden` and the plural of the lesion's name.
    """
    counts = _count_values(mask_zyx)
    voxels = {}
    for structure in labels.structures:
        # Values are added because a structure contains the lesions inside it.
        voxels[structure.name] = int(counts[list(structure.values)].sum())
    found: dict[str, object] = {}
    for structure in labels.structures:
        found[f"{structure.name}_ml"] = voxels[structure.name] * grid.voxel_volume_ml
    for lesion in labels.lesions:
        # Without a container there is nothing that the volume could be a share of.
        container = find_container(labels, lesion)
        if container is not None:
            whole = voxels[container.name]
            # Without an organ the share is undefined, not 0.
            burden = voxels[lesion.name] / whole if whole else None
            found[name_burden(labels, lesion)] = burden
        found[name_count(labels, lesion)] = _count_components(mask_zyx, lesion)
    return found


def list_volume_columns(labels: LabelScheme, *, with_channels: bool) -> tuple[str, ...]:
    """The columns of `volumes.csv`."""
    measured = [f"{structure.name}_ml" for structure in labels.structures]
    for lesion in labels.lesions:
        if lesion.inside is not None:
            measured.append(name_burden(labels, lesion))
        measured.append(name_count(labels, lesion))
    channels = ("channels",) if with_channels else ()
    return ("scan", "status", *measured, *channels, "warnings", "mask", "error")


def name_burden(labels: LabelScheme, lesion: Structure) -> str:
    """Name of the column of a lesion's share in its organ; Task03 has one lesion structure."""
    return "burden" if is_task03(labels) else f"{lesion.name}_burden"


def name_count(labels: LabelScheme, lesion: Structure) -> str:
    """Name of the column of the number of lesions."""
    return f"{lesion.name}s" if is_task03(labels) else f"{lesion.name}_count"


def format_mask_line(record: dict[str, Any], labels: LabelScheme) -> str:
    """Volumes of a record in words, for the terminal: `liver 1500.0 ml, tumour 3.21 ml in 2`."""
    parts = []
    for structure in labels.structures:
        ml = record[f"{structure.name}_ml"]
        if structure.kind == "organ":
            parts.append(f"{structure.name} {ml:.1f} ml")
        else:
            count = record[name_count(labels, structure)]
            parts.append(f"{structure.name} {ml:.2f} ml in {count}")
    for lesion in labels.lesions:
        burden = record.get(name_burden(labels, lesion))
        if burden is not None:
            name = name_burden(labels, lesion).replace("_", " ")
            parts.append(f"{name} {100 * burden:.2f} %")
    return ", ".join(parts)


def check_dataset_file(folder: Path, labels: LabelScheme) -> None:
    """Check that a folder for masks has no masks of other labels.

    Raises:
        UserError: its `dataset.json` names other labels, or is no such file.
    """
    file = folder / DATASET_FILE
    if not file.is_file():
        return
    found = read_label_scheme(file)
    # Structures and values must agree; names of the data set or SNOMED codes may differ.
    if _list_structure_values(found) != _list_structure_values(labels):
        raise UserError(
            f"{printable(file)}: names the labels {describe_labels(found)}, the run has "
            f"{describe_labels(labels)}; choose another --out"
        )


def write_dataset_file(folder: Path, labels: LabelScheme) -> None:
    """Write the labels of masks into `dataset.json` in their folder, in nnU-Net's form.

    Viewers, `score` and `quantify` read the names there. A file that is there already stays.
    """
    # The file of an earlier call or of the user has precedence.
    if not (folder / DATASET_FILE).is_file():
        write_json(folder / DATASET_FILE, describe_dataset(labels))


def describe_labels(labels: LabelScheme) -> str:
    """`1 liver, 2 tumour`: the class values of a scheme, for messages."""
    return ", ".join(
        f"{value} {name}" for value, name in labels.values if value not in (0, labels.ignore)
    )


def describe_dataset(labels: LabelScheme) -> dict[str, Any]:
    """The content of `dataset.json`: names to values, a list for structures of several values."""
    named: dict[str, Any] = {"background": 0}
    for structure in labels.structures:
        values = list(structure.values)
        named[structure.name] = values if len(values) > 1 else values[0]
    content: dict[str, Any] = {"labels": named, "file_ending": ".nii.gz"}
    # nnU-Net expects the painting order where a structure has several values.
    order = [value for _, value in labels.paint_order]
    if any(len(structure.values) > 1 for structure in labels.structures):
        content["regions_class_order"] = order
    # Kinds, containers and SNOMED codes, which nnU-Net's form has no place for.
    content["label_scheme"] = labels.to_json()
    return content


def _list_structure_values(labels: LabelScheme) -> dict[str, tuple[int, ...]]:
    return {structure.name: structure.values for structure in labels.structures}


def _count_components(mask_zyx: np.ndarray, lesion: Structure) -> int:
    # A view: booleans have one byte, so a copy of the mask is not needed.
    members = select_values(mask_zyx, lesion.values).view(np.uint8)
    # Components need 4 bytes per voxel: only inside the box, because scans can be large.
    box = find_foreground_box(members)
    if box is None:
        return 0
    _, count = cc3d.connected_components(
        np.ascontiguousarray(members[box]), connectivity=LESION_CONNECTIVITY, return_N=True
    )
    return int(count)


def _count_values(mask_zyx: np.ndarray) -> np.ndarray:
    """Voxels of each class value.

    Slice by slice: `bincount` converts its input to 8-byte integers.
    """
    counts = np.zeros(LARGEST_VALUE + 1, dtype=np.int64)
    for slice_yx in mask_zyx:
        counts += np.bincount(slice_yx.reshape(-1), minlength=LARGEST_VALUE + 1)
    return counts


def format_result_line(
    record: dict[str, Any], was_done: bool, labels: LabelScheme, channels: Sequence[str]
) -> str:
    """One line about a segmented scan.

    Args:
        record: its entry in the ledger of `liverseg predict`.
        was_done: whether an earlier call has segmented it.
        labels: scheme of the mask.
        channels: names of the run's channels.
    """
    line = f"{record['case_id']}: {format_mask_line(record, labels)}"
    # Channels that the run knows but this scan lacks are named, because a mask without them is
    # less certain.
    if "channels" in record:
        absent = [name for name in channels if name not in record["channels"]]
        line += f", from {', '.join(record['channels'])}"
        line += f" without {', '.join(absent)}" if absent else ""
    line += "  (done before)" if was_done else ""
    line += "  (forced)" if record["forced"] else ""
    return line
