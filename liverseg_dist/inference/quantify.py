"""Measure mask files into a folder: each once, resumable, a bad file does not stop the others."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import SimpleITK

from liverseg_dist.clinical.pictures import draw_lesion, is_picture
from liverseg_dist.clinical.quantify import QUANTITIES_VERSION, CaseQuantities, quantify_case
from liverseg_dist.data.io.dicom_sources import DicomOptions, find_dicom_scans, is_dicom_source
from liverseg_dist.data.io.nifti import SUFFIXES, read_nifti, read_scan_channels
from liverseg_dist.data.io.scan_reader import (
    ScanSource,
    hash_source,
    name_source,
    read_scan_volume,
)
from liverseg_dist.errors import RunFailed, UserError, printable
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name, fingerprint_of
from liverseg_dist.evaluation.pairing import SAME_PLACE_MM, MaskPair, find_images
from liverseg_dist.files import natural_key, write_json
from liverseg_dist.inference.work_division import format_failure
from liverseg_dist.label_scheme import read_label_scheme
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.texts.names import derive_scan_id
from liverseg_dist.volume import Volume

DATASET = "dataset.json"
MASK_FOLDERS = ("masks", "evaluation/masks", "labelsTr")
"""Where the masks of an evaluation, of a run and of a data set lie."""
PROBABILITIES = "probabilities"
_FIRST_CHANNEL = re.compile(r"(?s)(.+)_0000(\.nii(?:\.gz)?)")
MAX_DRAWN = 12
"""Lesions of a case with a picture, the largest of each structure first."""


@dataclass(frozen=True)
class MaskFile:
    """A mask and what lies beside it.

    Attributes:
        case: Name of the case: the file's without its ending.
        mask: The file.
        image: The scan, if any; a file in 4D holds all channels.
        further_channels: Files of the scan's other channels, None for an absent one.
        probabilities: Files by structure name.
    """

    case: str
    mask: Path
    image: ScanSource | None = None
    probabilities: Mapping[str, Path] = field(default_factory=dict)
    further_channels: tuple[ScanSource | None, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """All it takes to measure a mask file."""

    scheme: LabelScheme
    connectivity: int
    ledger: Ledger
    pictures: Path

    def run_case(self, case: MaskFile) -> tuple[dict[str, Any], bool]:
        """Measure a case and record it: (its figures, whether they were there already).

        Raises:
            UserError, RunFailed: The case cannot be measured; recorded in the ledger as well.
        """
        inputs: str | None = None
        try:
            inputs = _fingerprint(case)
            known = self.ledger.read(case.case, inputs)
            # Pictures are a separate file; without them the case is measured again.
            if known is not None and self._picture_file(case.case).is_file():
                return known, True
            record = self._measure(case)
        except Exception as error:  # the other cases continue
            message = format_failure(str(case.mask), error)
            self.ledger.write_failure(
                case.case, message.replace(str(case.mask), case.mask.name), inputs
            )
            if isinstance(error, UserError):
                raise UserError(message) from error
            raise RunFailed(message) from error
        self.ledger.write(case.case, record, inputs)
        return record, False

    def read_pictures(self, case: str) -> list[dict[str, Any]]:
        """The pictures of a measured case; none where the file is missing or damaged."""
        return read_pictures(self._picture_file(case))

    def _measure(self, case: MaskFile) -> dict[str, Any]:
        mask = read_nifti(case.mask, kind="label")
        notes = check_values(mask, self.scheme, case.mask)
        channels, note = read_channels_on_grid((case.image, *case.further_channels), mask)
        notes += note
        image = channels[0]
        probabilities = {}
        for name, file in case.probabilities.items():
            volume, note = read_on_grid(file, mask)
            notes += note
            if volume is not None:
                probabilities[name] = volume
        quantities = quantify_case(
            mask, self.scheme, image, probabilities, self.connectivity, channels[1:]
        )
        if not any(structure.voxels for structure in quantities.structures):
            notes.append("the mask is empty: it holds none of the structures")
        # Before the ledger entry: an interrupted run then has no entry without pictures.
        write_json(self._picture_file(case.case), self._draw(mask, image, quantities))
        return {"case": case.case, "notes": notes, **quantities.to_json()}

    def _draw(
        self, mask: Volume, image: Volume | None, quantities: CaseQuantities
    ) -> list[dict[str, Any]]:
        turned = mask.reoriented()
        turned_image = None if image is None else image.reoriented()
        pictures = []
        for lesion in sorted(quantities.lesions, key=lambda lesion: lesion.number)[:MAX_DRAWN]:
            picture = draw_lesion(turned, self.scheme, lesion, turned_image)
            pictures.append({"structure": lesion.structure, "number": lesion.number, **picture})
        return pictures

    def _picture_file(self, case: str) -> Path:
        return self.pictures / f"{encode_file_name(case)}.json"


def measurement_for(out: Path, scheme: LabelScheme, connectivity: int) -> Measurement:
    """The measurement whose results lie in `out`; other definitions, labels or connectivity make
    other entries."""
    fingerprint = {
        "quantities": QUANTITIES_VERSION,
        "scheme": scheme.to_json(),
        "drops_other_values": scheme.drops_other_values,
        "connectivity": connectivity,
    }
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    return Measurement(scheme, connectivity, Ledger(out / "ledger", fingerprint), out / "pictures")


def find_masks(inputs: Sequence[Path]) -> list[Path]:
    """The mask files among files and folders, in order.

    A folder holds masks itself, or is a run, an evaluation or a data set (`MASK_FOLDERS`).

    Raises:
        UserError: A path is absent or holds no mask, or two masks have one name.
    """
    files: list[Path] = []
    for path in inputs:
        files += _masks_in(path) if path.is_dir() else [path]
    names: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{printable(file)}: no such file or folder")
        name = derive_scan_id(file.name)
        # The same file given twice, alone and by its folder, is no conflict.
        if names.setdefault(name, file) != file:
            raise UserError(
                f"{printable(names[name])} and {printable(file)} are both called {printable(name)}"
            )
    return list(names.values())


def find_scheme(masks: Sequence[Path]) -> LabelScheme:
    """The scheme of the `dataset.json` beside or above the masks; Task03's where there is none.

    Raises:
        UserError: Masks of data sets with different labels are given together.
    """
    schemes: dict[LabelScheme, Path] = {}
    for folder in sorted({mask.absolute().parent for mask in masks}):
        index = next(
            (at / DATASET for at in (folder, folder.parent) if (at / DATASET).is_file()), None
        )
        schemes.setdefault(LITS_SCHEME if index is None else read_label_scheme(index), folder)
    if len(schemes) > 1:
        first, second, *_ = schemes.values()
        raise UserError(
            f"{printable(first)} and {printable(second)}: their labels differ; give --labels for all"
        )
    return next(iter(schemes))


def gather_inputs(
    masks: Sequence[Path],
    images: Path | None,
    scheme: LabelScheme,
    dicom: DicomOptions | None = None,
) -> list[MaskFile]:
    """Each mask with its scan in `images` (matched as `liverseg score` does) and its probabilities,
    if any.

    Raises:
        UserError: `images` is absent or none of its scans belongs to a mask.
    """
    pairs = [MaskPair(derive_scan_id(mask.name), mask, mask) for mask in masks]
    scans: dict[str, ScanSource] = {}
    if images is not None and is_dicom_source(images):
        scans |= _match_dicom(images, pairs, dicom)
    elif images is not None and images.is_file() and len(masks) == 1:
        scans[pairs[0].case_id] = images
    else:
        scans |= find_images(images, pairs)
    if images is not None and not scans:
        raise UserError(
            f"{printable(images)}: no scan there has the name of a mask ({masks[0].name})"
        )
    cases = []
    for pair in pairs:
        found = {}
        for structure in scheme.structures:
            file = pair.truth.parent / PROBABILITIES / f"{pair.case_id}_{structure.name}.nii.gz"
            if file.is_file():
                found[structure.name] = file
        scan = scans.get(pair.case_id)
        cases.append(MaskFile(pair.case_id, pair.truth, scan, found, find_further_channels(scan)))
    return cases


def _match_dicom(
    images: Path, pairs: Sequence[MaskPair], options: DicomOptions | None
) -> dict[str, ScanSource]:
    """DICOM scans by the masks that `predict` named after them; one scan fits a single mask."""
    found = [scan for _, scan in find_dicom_scans([images], options)]
    if len(found) == 1 and len(pairs) == 1:
        return {pairs[0].case_id: found[0]}
    names = {pair.case_id for pair in pairs}
    return {scan.name: scan for scan in found if scan.name in names}


def pair_images(
    images: Sequence[Path] | None,
    masks: Sequence[Path],
    scheme: LabelScheme,
    dicom: DicomOptions,
) -> list[ScanSource | None]:
    """The scan of each mask: given one by one in order, or as a folder that has them by name.

    Raises:
        UserError: Another number of scans than masks, or one that does not exist.
    """
    if images is None:
        return [None] * len(masks)
    if len(images) == 1 and images[0].is_dir():
        return [case.image for case in gather_inputs(masks, images[0], scheme, dicom)]
    if len(images) != len(masks):
        raise UserError(
            f"--images: {len(images)} scans for {len(masks)} masks; give one for each, in order, or "
            "a folder"
        )
    sources: list[ScanSource | None] = []
    for number, image in enumerate(images, start=1):
        if is_dicom_source(image):
            found = [scan for _, scan in find_dicom_scans([image], dicom)]
            if len(found) > 1:
                raise UserError(f"--images: number {number} has {len(found)} scans; name one")
            sources.append(found[0])
        elif image.is_file():
            sources.append(image)
        else:
            raise UserError(f"{printable(image)}: no such file")
    return sources


def check_values(mask: Volume, scheme: LabelScheme, file: Path) -> list[str]:
    """Notes on label values that count as background. Raises `UserError` for values that the scheme
    does not name."""
    unknown = scheme.unknown_values(mask.voxels)
    if not unknown:
        return []
    listed = ", ".join(map(str, unknown[:8])) + (" ..." if len(unknown) > 8 else "")
    if scheme.drops_other_values:
        return [f"label values that are not named count as background: {listed}"]
    known = ", ".join(f"{value} {name}" for value, name in scheme.values)
    raise UserError(
        f"{printable(file)}: holds label value {listed}, the labels are {known}; give --labels"
    )


def find_further_channels(image: ScanSource | None) -> tuple[Path, ...]:
    """The files `_0001`, `_0002`, ... beside the first channel of a scan in nnU-Net's layout."""
    # A DICOM series has one channel.
    if not isinstance(image, Path):
        return ()
    match = _FIRST_CHANNEL.fullmatch(image.name)
    if match is None:
        return ()
    found: list[Path] = []
    while True:
        file = image.with_name(f"{match[1]}_{len(found) + 1:04d}{match[2]}")
        if not file.is_file():
            return tuple(found)
        found.append(file)


def read_channels_on_grid(
    files: Sequence[ScanSource | None], mask: Volume
) -> tuple[list[Volume | None], list[str]]:
    """The channels of a scan turned to the mask's grid; notes on those that lie on another one.

    Args:
        files: One for each channel, None for an absent one; a file in 4D holds several.
        mask: Whose grid is asked for.

    Returns:
        At least one channel, None where it is absent or lies elsewhere.
    """
    found: list[Volume | None] = []
    notes: list[str] = []
    for file in files:
        if file is None:
            found.append(None)
            continue
        for volume in _read_volumes(file):
            image = volume.reoriented(mask.grid.orientation)
            if image.grid.matches(mask.grid, SAME_PLACE_MM):
                # Headers are rounded: from here on both lie on exactly one grid.
                found.append(Volume(image.voxels, mask.grid))
                continue
            found.append(None)
            name = printable(name_source(file))
            notes.append(f"{name} does not lie on the mask's grid and is left out")
    return found, list(dict.fromkeys(notes))


def read_on_grid(file: ScanSource | None, mask: Volume) -> tuple[Volume | None, list[str]]:
    """The first channel of a scan turned to the mask's grid, or None and a note where it lies on
    another one."""
    channels, notes = read_channels_on_grid((file,), mask)
    return channels[0], notes


def _read_volumes(file: ScanSource) -> list[Volume]:
    """All channels of a file; a DICOM series has one."""
    if not isinstance(file, Path) or is_dicom_source(file):
        return [read_scan_volume(file)]
    return [channel.volume for channel in read_scan_channels(file, _count_volumes(file))]


def _count_volumes(file: Path) -> int:
    """Volumes of a file in 4D, else 1; a file that cannot be read is reported by its reader."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 1
    return int(reader.GetSize()[3]) if reader.GetDimension() == 4 else 1


def read_pictures(file: Path) -> list[dict[str, Any]]:
    """Pictures that `write_json` left; those that are damaged are left out."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return (
        [picture for picture in content if is_picture(picture)] if isinstance(content, list) else []
    )


def _masks_in(folder: Path) -> list[Path]:
    for at in (folder, *(folder / name for name in MASK_FOLDERS)):
        found = []
        if at.is_dir():
            found = [
                f for f in at.iterdir() if f.name.endswith(SUFFIXES) and not f.name.startswith(".")
            ]
        if found:
            return sorted(found, key=lambda file: natural_key(file.name))
    raise UserError(
        f"{printable(folder)}: holds no .nii or .nii.gz mask (an evaluation keeps its masks with --save-masks)"
    )


def _fingerprint(case: MaskFile) -> str:
    files: dict[str, ScanSource] = {"mask": case.mask}
    if case.image is not None:
        files["image"] = case.image
    for number, channel in enumerate(case.further_channels, start=1):
        if channel is not None:
            files[f"channel {number}"] = channel
    files |= {f"probability {name}": file for name, file in case.probabilities.items()}
    return fingerprint_of({name: hash_source(file) for name, file in files.items()})
