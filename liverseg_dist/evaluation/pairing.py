"""Match predicted masks with true ones, and check that both have the same grid.

Used by `liverseg score`, where masks come from any program: names differ in suffixes and channel
numbers, and the same grid may be stored in another orientation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.formats import describe_unread
from liverseg_dist.texts.names import (
    assign_scan_ids,
    clean_text,
    derive_pairing_key,
    derive_scan_id,
    is_scan_name,
)
from liverseg_dist.volume import Volume

SAME_PLACE_MM = 0.1
"""Largest distance of the corners of equal grids: headers are float32, and tools round them."""

DESCRIPTION_SUFFIXES = (".json", ".csv")
RESULT_FOLDERS = ("ledger", "probabilities")
"""What `predict` writes beside masks; nobody expects `score` to read it."""


@dataclass(frozen=True)
class MaskPair:
    """The two mask files of one case."""

    case_id: str
    prediction: Path
    truth: Path


@dataclass(frozen=True)
class Pairing:
    """Result of `pair_masks`."""

    pairs: tuple[MaskPair, ...]
    missing: tuple[str, ...]
    """Cases with a truth and without a prediction."""
    extra: tuple[str, ...]
    """Predictions without a truth."""


def pair_masks(prediction: Path, truth: Path) -> Pairing:
    """Match the masks of two folders by name, or two single files.

    `_0000` before the suffix is ignored. `volume-7`, `segmentation-7` and `test-segmentation-7`
    (the names of LiTS) are one case.

    Raises:
        UserError: A folder is missing, has no mask or two masks of one case, or no names match.
    """
    # Two single files need no common name: the caller has paired them.
    if prediction.is_file() and truth.is_file():
        return Pairing((MaskPair(derive_scan_id(truth.name), prediction, truth),), (), ())
    predictions, truths = _find_masks(prediction), _find_masks(truth)
    pairs = tuple(
        MaskPair(case_id, predictions[key][1], file)
        for key, (case_id, file) in truths.items()
        if key in predictions
    )
    missing = tuple(case_id for key, (case_id, _) in truths.items() if key not in predictions)
    extra = tuple(case_id for key, (case_id, _) in predictions.items() if key not in truths)
    if not pairs:
        _, first_prediction = next(iter(predictions.values()))
        _, first_truth = next(iter(truths.values()))
        example = f"{clean_text(first_prediction.name)} against {clean_text(first_truth.name)}"
        raise UserError(
            f"{prediction} and {truth}: no two masks have the same name ({example}); "
            "rename the files of one folder"
        )
    return Pairing(pairs, missing, extra)


def describe_left_out(folder: Path) -> list[str]:
    """Describe the entries of a folder that are not read as masks or scans, one line a kind.

    Tables and descriptions, such as `liverseg predict` and nnU-Net write beside masks, are no scans
    in a format that is not read.
    """
    if not folder.is_dir():
        return []
    visible = [
        file
        for file in folder.iterdir()
        if not (
            file.name.startswith(".")
            or file.suffix in DESCRIPTION_SUFFIXES
            or file.name in RESULT_FOLDERS
        )
    ]
    lines = describe_unread(file for file in visible if not _is_scan_file(file))
    channels = assign_scan_ids(file.name for file in visible if _is_scan_file(file)).channels
    if channels:
        lines.append(
            f"further channels of a scan are not read: {', '.join(map(clean_text, channels[:10]))}"
        )
    return [f"{printable(folder)}: {line}" for line in lines]


def align_prediction(
    prediction: Volume, truth: Volume, pair: MaskPair, ignore_affine: bool = False
) -> Volume:
    """Bring a prediction onto the grid of its truth: permute and flip axes, never resample.

    Args:
        prediction: Predicted mask.
        truth: True mask.
        pair: Their files, for error messages.
        ignore_affine: Compare voxel by voxel as the files are stored.

    Raises:
        UserError: The sizes differ, or the grids have the same size and different positions.
    """
    if ignore_affine:
        if prediction.shape != truth.shape:
            raise UserError(_size_mismatch(prediction.shape, truth.shape, pair))
        return Volume(prediction.voxels, truth.grid)
    if prediction.grid.matches(truth.grid, SAME_PLACE_MM):
        return prediction
    # Before the sizes are compared: a permutation of axes changes the order of the sizes.
    reoriented = prediction.reoriented(truth.grid.orientation)
    if reoriented.shape != truth.shape:
        raise UserError(_size_mismatch(reoriented.shape, truth.shape, pair))
    if not reoriented.grid.matches(truth.grid, SAME_PLACE_MM):
        distance = abs(reoriented.grid.corners_mm() - truth.grid.corners_mm()).max()
        raise UserError(
            f"{pair.prediction} and {pair.truth}: same size, but their positions differ by up to "
            f"{distance:.1f} mm; put the prediction on the truth's grid, "
            "or compare voxel by voxel with --ignore-affine"
        )
    return reoriented


def find_images(folder: Path | None, pairs: Sequence[MaskPair]) -> dict[str, Path]:
    """Scans of `folder` by case id, for these pairs; cases without a scan are left out."""
    if folder is None:
        return {}
    images = _find_masks(folder)
    found = {}
    for pair in pairs:
        entry = images.get(derive_pairing_key(pair.case_id))
        if entry is not None:
            found[pair.case_id] = entry[1]
    return found


def _size_mismatch(prediction: Sequence[int], truth: Sequence[int], pair: MaskPair) -> str:
    return (
        f"{pair.prediction} is {_format_size(prediction)} voxels, "
        f"{pair.truth} is {_format_size(truth)}; "
        "a prediction must have the grid of its truth"
    )


def _format_size(shape: Sequence[int]) -> str:
    """Size in the order x, y, z, as viewers show it."""
    return "x".join(str(size) for size in reversed(shape))


def _find_masks(folder: Path) -> dict[str, tuple[str, Path]]:
    """(case id, file) of the masks of a folder, by the key that matches them; sorted by name."""
    if folder.is_file():
        files = [folder]
    elif folder.is_dir():
        files = sorted(file for file in folder.iterdir() if _is_scan_file(file))
    else:
        raise UserError(f"{folder}: no such folder")
    if not files:
        rest = "; ".join(describe_left_out(folder))
        raise UserError(f"{folder}: holds no .nii or .nii.gz file{f' ({rest})' if rest else ''}")
    ids = assign_scan_ids(file.name for file in files).ids
    masks: dict[str, tuple[str, Path]] = {}
    for file in files:
        # A further channel of a scan: `describe_left_out` lists it.
        if file.name not in ids:
            continue
        case_id = ids[file.name]
        key = derive_pairing_key(case_id)
        if key in masks:
            raise UserError(f"{masks[key][1]} and {file.name} are the same case; remove one")
        masks[key] = case_id, file
    return masks


def _is_scan_file(file: Path) -> bool:
    return is_scan_name(file.name) and not file.is_dir()
