"""`CaseStore`: reads a converted data set. Opening reads one file; arrays are read on request.

`layout.py` defines the format. zarr-python, tensorstore and OME-Zarr readers can open a store too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.errors import ArrayNotFoundError

from liverseg_dist.config import ChannelConfig, ConvertConfig, IntensityConfig
from liverseg_dist.config.convert import DATA_URI
from liverseg_dist.data.store.layout import CASES, FILL, FIRST_SCHEMA, IMAGE_DIMS, TRAIN_ONLY
from liverseg_dist.data.store.metadata_checks import (
    check_array,
    parse_case,
    parse_channels,
    parse_class_voxels,
    parse_intensities,
    parse_labels,
)
from liverseg_dist.data.store.root_reader import read_root, short_message, wrap_metadata_errors
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.labels import LabelScheme
from liverseg_dist.volume import Float3, Grid, Index3

Part = Literal["train", "validation", "test"]
MISSING_FILE = "its file is missing; convert again, which writes it"


@dataclass(frozen=True)
class CaseMeta:
    """What is known of a case without reading a voxel."""

    case_id: str
    patient: str
    parent: str
    """Scan that the case was cut from; differs from `case_id` for tiles (slab.policy=tile)."""
    labelled: bool
    imputed: bool
    """Labelled by a run, not by people."""
    grid: Grid
    """Of the stored slab."""
    source_grid: Grid
    """Of the scan's file."""
    valid_slices: tuple[int, int]
    """First slice, and one past the last, that are not padding."""
    class_voxels: tuple[int, ...]
    """Voxels of each class value in the stored label, background first."""
    lesions: Mapping[str, int]
    """Connected components of each lesion structure in the stored label."""
    annotated: tuple[str, ...]
    """Structures that were annotated. The others are unknown, not absent."""
    present: tuple[bool, ...]
    """Whether the case has each channel of the store; the voxels of an absent one are 0."""
    intensities: tuple[IntensityConfig, ...]
    """Normalisation of each channel."""


class CaseStore:
    """A data set written by `liverseg convert`."""

    def __init__(self, path: str, root: Mapping[str, Any]) -> None:
        self.path = path
        self._root = root

    @classmethod
    def open(cls, path: str | Path) -> "CaseStore":
        """Open a folder or fsspec URL for reading.

        Raises:
            UserError: It is not a finished store of a supported schema.
        """
        path = str(path)
        return cls(path, read_root(path))

    @property
    def case_ids(self) -> tuple[str, ...]:
        return tuple(sorted(self._root["cases"]))

    @property
    def name(self) -> str:
        """Name of the data set."""
        return str(self._root["name"])

    @property
    def spacing_mm(self) -> Float3:
        """Median voxel size (z, y, x) of the stored slabs, on which networks are trained."""
        z, y, x = self._root["spacing_mm"]
        return float(z), float(y), float(x)

    @cached_property
    def labels(self) -> LabelScheme:
        """Class values and structures of the labels."""
        with wrap_metadata_errors(f"{self.path}: zarr.json is damaged"):
            return parse_labels(self._root)

    @cached_property
    def channels(self) -> tuple[ChannelConfig, ...]:
        """Channels of the images."""
        with wrap_metadata_errors(f"{self.path}: zarr.json is damaged"):
            return parse_channels(self._root)

    @cached_property
    def intensities(self) -> tuple[IntensityConfig | None, ...]:
        """Normalisation of each channel; None for a channel that is normalised by its own scan."""
        with wrap_metadata_errors(f"{self.path}: zarr.json is damaged"):
            return parse_intensities(self._root, len(self.channels))

    @property
    def intensity(self) -> IntensityConfig | tuple[IntensityConfig | None, ...]:
        """`intensities` as a run's settings record them: the entry itself for one channel of CT."""
        first = self.intensities[0]
        return first if len(self.intensities) == 1 and first is not None else self.intensities

    @cached_property
    def convert(self) -> ConvertConfig:
        """The settings that the store was made with."""
        with wrap_metadata_errors(
            f"{self.path}: made by another version, its settings are not supported"
        ):
            denoiser = self._root["convert"]["cleaning"].get("denoiser")
            # Validating a file name would read that file: a store must not choose files to read.
            if denoiser is not None and not str(denoiser).startswith(DATA_URI):
                raise ValueError(
                    "convert.cleaning.denoiser names a file; a store holds its content"
                )
            return ConvertConfig.model_validate(self._root["convert"])

    @property
    def audit(self) -> dict[str, Any]:
        """Status, findings and facts of every scan, also of those that are not stored."""
        return dict(self._root["audit"])

    @property
    def root(self) -> Mapping[str, Any]:
        """The whole root attribute (`conversion.root_metadata`)."""
        return self._root

    @property
    def content_sha256(self) -> str | None:
        """Hash of the stored files of all cases; None where the store does not record it."""
        value = self._root.get("content_sha256")
        return value if isinstance(value, str) else None

    @property
    def class_voxels(self) -> tuple[int, ...]:
        """Voxels of each class in all labelled cases, background first."""
        classes = self.labels.num_classes
        counts = np.zeros(classes, dtype=np.int64)
        for case in self._root["cases"].values():
            if case.get("labelled"):
                with wrap_metadata_errors(f"{self.path}: zarr.json is damaged"):
                    counts += parse_class_voxels(case["class_voxels"], classes)
        return tuple(counts.tolist())

    def meta(self, case_id: str) -> CaseMeta:
        """Metadata of a case.

        Raises:
            UserError: The store has no such case, or its metadata is damaged.
        """
        try:
            case = self._root["cases"][case_id]
        except KeyError:
            raise UserError(
                f"{self.path}: no case {case_id}; it has {', '.join(self.case_ids[:5])}, ..."
            ) from None
        with wrap_metadata_errors(f"{self.path}: case {case_id}: zarr.json is damaged"):
            fields = parse_case(case, self.labels, self.intensities)
            return CaseMeta(case_id=case_id, **fields)

    def ids(self, part: Part, fold: int | Literal["all"] = 0) -> tuple[str, ...]:
        """Case ids of a part of the data set.

        Cases labelled by a run belong to every training part, except where their patient is in the
        validation part or the test set.

        Args:
            part: The part.
            fold: Fold of the cross-validation; "all": train on all folds, validate on none.

        Raises:
            UserError: The store has no such fold.
        """
        splits = self._root["splits"]
        folds: list[list[str]] = splits["folds"]
        if part == "test":
            return tuple(splits["test"])
        if fold == "all":
            all_cases = [case_id for ids in folds for case_id in ids]
            return self._add_imputed(all_cases, []) if part == "train" else ()
        if not 0 <= fold < len(folds):
            raise UserError(
                f"{self.path}: no fold {fold}; it has folds 0 to {len(folds) - 1}, or all"
            )
        if part == "validation":
            return tuple(folds[fold])
        train: list[str] = []
        for number, ids in enumerate(folds):
            if number != fold:
                train += ids
        return self._add_imputed(train, folds[fold])

    def _add_imputed(self, train: Sequence[str], validation: Sequence[str]) -> tuple[str, ...]:
        """The training cases with the imputed cases whose patients are in no other part."""
        cases, splits = self._root["cases"], self._root["splits"]
        result = list(train)
        with wrap_metadata_errors(
            f"{self.path}: zarr.json is damaged: its splits name a case that it does not describe"
        ):
            held_out = (*splits["test"], *validation)
            held_out_patients = {cases[case_id]["patient"] for case_id in held_out}
            for case_id in splits.get(TRAIN_ONLY, []):
                if cases[case_id]["patient"] not in held_out_patients:
                    result.append(case_id)
        return tuple(sorted(result))

    def image(self, case_id: str) -> np.ndarray:
        """Voxels of all channels, int16 (C, 64, Y, X); HU for CT, 0 for an absent channel."""
        image = self._read_array(case_id, "image")
        # Stores of schema 1 have one channel and no axis for it.
        return image if image.ndim == IMAGE_DIMS else image[None]

    def label(self, case_id: str) -> np.ndarray:
        """uint8 (64, Y, X), 255 where the slab is padded."""
        return self._read_array(case_id, "label")

    def source_label(self, case_id: str) -> np.ndarray:
        """uint8 (z, y, x) on the scan's own grid.

        Raises:
            UserError: The case has no label.
        """
        if not self.meta(case_id).labelled:
            raise UserError(f"{self.path}: case {case_id} has no label to compare with")
        return self._read_array(case_id, "source_label")

    def foreground(self, case_id: str) -> np.ndarray:
        """int16 (n, 5): class, lesion number (from 1; 0 for an organ), z, y, x; sorted."""
        return self._read_array(case_id, "foreground")

    def _image_shape(self, shape_zyx: Index3) -> tuple[int, ...]:
        is_first_schema = self._root["schema"] == FIRST_SCHEMA
        return shape_zyx if is_first_schema else (len(self.channels), *shape_zyx)

    def _read_array(self, case_id: str, name: str) -> np.ndarray:
        """Raises `RunFailed` for a missing or damaged array."""
        # The metadata is checked first: it limits the memory that the array may need.
        meta = self.meta(case_id)
        where = f"{self.path}: case {case_id}, {name}"
        expected_shapes = {
            "image": self._image_shape(meta.grid.shape),
            "label": meta.grid.shape,
            "source_label": meta.source_grid.shape,
        }
        try:
            array: Any = zarr.open_array(
                self.path, path=f"{CASES}/{case_id}/{name}", mode="r", zarr_format=3
            )
        except (FileNotFoundError, ArrayNotFoundError):
            raise RunFailed(f"{where}: {MISSING_FILE}") from None
        except Exception as error:
            # zarr raises many types of errors for damaged metadata.
            raise RunFailed(f"{where}: damaged ({short_message(error)})") from None
        try:
            check_array(array, name, expected_shapes.get(name))
            values = np.asarray(array[...])
        except Exception as error:
            # zarr and its decoders raise many types of errors for damaged bytes.
            raise RunFailed(
                f"{where}: damaged ({short_message(error)}); liverseg verify names the chunk, "
                "converting again repairs it"
            ) from None
        # zarr returns the fill value for a missing file; written chunks never contain it.
        if values.size and values.flat[0] == FILL[name]:
            raise RunFailed(f"{where}: {MISSING_FILE}")
        return values
