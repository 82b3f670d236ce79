"""Which predicted mask belongs to which true one, and whether they lie on the same voxels of the world."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.formats import describe_unread
from liverseg_dist.texts.names import clean_text, is_scan_name, name_scans, pairing_key, scan_id
from liverseg_dist.volume import Volume

SAME_PLACE_MM = 0.1
"""Corner voxels of two grids may be this far apart: headers are stored as float32 and rounded by tools."""


@dataclass(frozen=True)
class MaskPair:
    case_id: str
    prediction: Path
    truth: Path


@dataclass(frozen=True)
class Pairing:
    pairs: tuple[MaskPair, ...]
    missing: tuple[str, ...]
    """Cases that have a truth but no prediction."""
    extra: tuple[str, ...]
    """Predictions that have no truth."""


def pair_masks(prediction: Path, truth: Path) -> Pairing:
    """Match the masks of two folders by name, or two single files.

    `_0000` before the suffix is ignored, and LiTS's `volume-7`, `segmentation-7`, `test-segmentation-7` are one case.
    Raises `UserError` where a folder is absent, has no mask, or has two masks of one case, or where nothing matches.
    """
    if prediction.is_file() and truth.is_file():
        return Pairing((MaskPair(scan_id(truth.name), prediction, truth),), (), ())
    predictions, truths = _masks(prediction), _masks(truth)
    pairs = tuple(
        MaskPair(case_id, predictions[key][1], file)
        for key, (case_id, file) in truths.items()
        if key in predictions
    )
    missing = tuple(case_id for key, (case_id, _) in truths.items() if key not in predictions)
    extra = tuple(case_id for key, (case_id, _) in predictions.items() if key not in truths)
    if not pairs:
        names = [clean_text(next(iter(masks.values()))[1].name) for masks in (predictions, truths)]
        shown = f"{names[0]} against {names[1]}"
        raise UserError(
            f"{prediction} and {truth}: no two masks have the same name ({shown}); rename one side"
        )
    return Pairing(pairs, missing, extra)


def describe_left_out(folder: Path) -> list[str]:
    """Lines on the entries of a folder that are not read as masks or scans."""
    if not folder.is_dir():
        return []
    visible = [file for file in folder.iterdir() if not file.name.startswith(".")]
    lines = describe_unread(file for file in visible if not _is_scan_file(file))
    channels = name_scans(file.name for file in visible if _is_scan_file(file)).channels
    if channels:
        lines.append(
            f"further channels of a scan are not read: {', '.join(map(clean_text, channels[:10]))}"
        )
    return [f"{printable(folder)}: {line}" for line in lines]


def align_prediction(
    prediction: Volume, truth: Volume, pair: MaskPair, ignore_affine: bool = False
) -> Volume:
    """The prediction on the truth's grid: axes permuted and flipped where the files are stored in another orientation.

    Raises `UserError` where sizes differ, or where the grids are of one size but not in one place in the world.
    `ignore_affine` compares voxel by voxel as the files are stored.
    """
    if ignore_affine:
        if prediction.shape != truth.shape:
            raise UserError(_size_mismatch(prediction.shape, truth.shape, pair))
        return Volume(prediction.voxels, truth.grid)
    if prediction.grid.matches(truth.grid, SAME_PLACE_MM):
        return prediction
    turned = prediction.reoriented(truth.grid.orientation)
    if turned.shape != truth.shape:
        raise UserError(_size_mismatch(turned.shape, truth.shape, pair))
    if not turned.grid.matches(truth.grid, SAME_PLACE_MM):
        distance = abs(turned.grid.corners_mm() - truth.grid.corners_mm()).max()
        raise UserError(
            f"{pair.prediction} and {pair.truth}: same size, but up to {distance:.1f} mm apart in the world; "
            "put the prediction on the truth's grid, or compare voxel by voxel with --ignore-affine"
        )
    return turned


def find_images(folder: Path | None, pairs: Sequence[MaskPair]) -> dict[str, Path]:
    """The scans of `folder` that belong to these pairs, by case id; cases without a scan are left out."""
    if folder is None:
        return {}
    images = _masks(folder)
    found = {pair.case_id: images.get(pairing_key(pair.case_id)) for pair in pairs}
    return {case_id: entry[1] for case_id, entry in found.items() if entry is not None}


def _size_mismatch(prediction: Sequence[int], truth: Sequence[int], pair: MaskPair) -> str:
    sizes = ["x".join(str(n) for n in reversed(shape)) for shape in (prediction, truth)]
    return (
        f"{pair.prediction} is {sizes[0]} voxels, {pair.truth} is {sizes[1]}; "
        "a prediction must lie on the grid of its truth"
    )


def _masks(folder: Path) -> dict[str, tuple[str, Path]]:
    """(case id, file) of the masks of a folder by the key they are matched with, sorted by name."""
    if folder.is_file():
        files = [folder]
    elif folder.is_dir():
        files = sorted(file for file in folder.iterdir() if _is_scan_file(file))
    else:
        raise UserError(f"{folder}: no such folder")
    if not files:
        rest = "; ".join(describe_left_out(folder))
        raise UserError(f"{folder}: holds no .nii or .nii.gz file{f' ({rest})' if rest else ''}")
    ids = name_scans(file.name for file in files).ids
    masks: dict[str, tuple[str, Path]] = {}
    for file in files:
        if file.name not in ids:  # a further channel: `describe_left_out` names it
            continue
        case_id = ids[file.name]
        key = pairing_key(case_id)
        if key in masks:
            raise UserError(f"{masks[key][1]} and {file.name} are the same case; remove one")
        masks[key] = case_id, file
    return masks


def _is_scan_file(file: Path) -> bool:
    return is_scan_name(file.name) and not file.is_dir()
