"""`CaseStore`: reading a converted data set. Opening reads one file; arrays are read when asked for.

A store may come from anywhere: what its root says is checked before a name of it becomes part of a path.

The format is documented in `layout.py`; zarr-python, tensorstore and OME-Zarr readers open it as well.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import zarr
from pydantic_core import from_json
from zarr.errors import ArrayNotFoundError

from liverseg_dist.config import ConvertConfig, IntensityConfig
from liverseg_dist.config.convert import DATA_URI
from liverseg_dist.data.findings import is_valid_case_id
from liverseg_dist.data.store.layout import ATTRIBUTE, CASES, FILL, SCHEMA, TRAIN_ONLY
from liverseg_dist.data.store.metadata_checks import (
    check_array,
    check_root,
    checked_case,
    checked_counts,
)
from liverseg_dist.errors import RunFailed, UserError, printable
from liverseg_dist.texts.paths import quote_path
from liverseg_dist.volume import Float3, Grid

Part = Literal["train", "validation", "test"]
MISSING = "its file is missing; convert again, which writes it"


@dataclass(frozen=True)
class CaseMeta:
    """What is known of a case without reading a voxel."""

    case_id: str
    patient: str
    parent: str
    """The scan it was cut from: `case_id` itself, unless slab.policy=tile made several of it."""
    labelled: bool
    imputed: bool
    """Labelled by a run, not by people."""
    grid: Grid
    """Of the stored slab."""
    source_grid: Grid
    """Of the scan's file."""
    valid_slices: tuple[int, int]
    """First slice, and one past the last, that are no padding."""
    class_voxels: tuple[int, int, int]
    tumours: int
    intensity: IntensityConfig


class CaseStore:
    """A data set as written by `liverseg convert`."""

    def __init__(self, path: str, root: Mapping[str, Any]) -> None:
        self.path = path
        self._root = root

    @classmethod
    def open(cls, path: str | Path) -> "CaseStore":
        """Open a folder or fsspec URL for reading. Raises `UserError` when it is no (finished) store of ours."""
        path = str(path)
        if "://" in path:
            _check_url(path)
        root = _root_of(path, _read_root(path))
        schema = root.get("schema")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            remedy = "install a newer liverseg_dist" if newer else "convert the data again"
            raise UserError(f"{path}: store schema {schema}, this version reads {SCHEMA}; {remedy}")
        _check_names(path, root)
        with _understood(f"{path}: zarr.json is damaged"):
            check_root(root)
        return cls(path, root)

    @property
    def case_ids(self) -> tuple[str, ...]:
        return tuple(sorted(self._root["cases"]))

    @property
    def name(self) -> str:
        return str(self._root["name"])

    @property
    def spacing_mm(self) -> Float3:
        """Median voxel size (z, y, x) of the stored slabs: what a network trained on them is used to."""
        z, y, x = self._root["spacing_mm"]
        return float(z), float(y), float(x)

    @cached_property
    def intensity(self) -> IntensityConfig:
        with _understood(f"{self.path}: zarr.json is damaged"):
            return IntensityConfig.model_validate(self._root["intensity"])

    @cached_property
    def convert(self) -> ConvertConfig:
        """The settings it was made with."""
        with _understood(f"{self.path}: made by another version, its settings are not understood"):
            denoiser = self._root["convert"]["cleaning"].get("denoiser")
            if denoiser is not None and not str(denoiser).startswith(DATA_URI):
                raise ValueError(
                    "convert.cleaning.denoiser names a file; a store holds its content"
                )
            return ConvertConfig.model_validate(self._root["convert"])

    @property
    def audit(self) -> dict[str, Any]:
        """Status, findings and facts by scan, of those that were not stored too."""
        return dict(self._root["audit"])

    @property
    def root(self) -> Mapping[str, Any]:
        """The whole root attribute (`conversion.root`)."""
        return self._root

    @property
    def class_voxels(self) -> tuple[int, int, int]:
        """Background, liver and tumour voxels over all labelled cases."""
        counts = np.zeros(3, dtype=np.int64)
        for case in self._root["cases"].values():
            if case.get("labelled"):
                with _understood(f"{self.path}: zarr.json is damaged"):
                    counts += checked_counts(case["class_voxels"])
        background, liver, tumour = counts.tolist()
        return background, liver, tumour

    def meta(self, case_id: str) -> CaseMeta:
        """Raises `UserError` for a case that is not there."""
        try:
            case = self._root["cases"][case_id]
        except KeyError:
            raise UserError(
                f"{self.path}: no case {case_id}; it has {', '.join(self.case_ids[:5])}, ..."
            ) from None
        with _understood(f"{self.path}: case {case_id}: zarr.json is damaged"):
            return CaseMeta(case_id=case_id, **checked_case(case), intensity=self.intensity)

    def ids(self, part: Part, fold: int | Literal["all"] = 0) -> tuple[str, ...]:
        """Case ids of a part. `fold` "all": train on all folds, validate on none. Raises `UserError`.

        Cases that a run labelled are trained on in every fold but the one that validates on (or tests) their patient.
        """
        splits = self._root["splits"]
        folds: list[list[str]] = splits["folds"]
        if part == "test":
            return tuple(splits["test"])
        if fold == "all":
            everything = [case for ids in folds for case in ids]
            return self._with_imputed(everything, []) if part == "train" else ()
        if not 0 <= fold < len(folds):
            raise UserError(
                f"{self.path}: no fold {fold}; it has folds 0 to {len(folds) - 1}, or all"
            )
        if part == "validation":
            return tuple(folds[fold])
        return self._with_imputed(
            [case for number, ids in enumerate(folds) if number != fold for case in ids],
            folds[fold],
        )

    def _with_imputed(self, train: Sequence[str], validation: Sequence[str]) -> tuple[str, ...]:
        cases, splits = self._root["cases"], self._root["splits"]
        with _understood(
            f"{self.path}: zarr.json is damaged: its splits name a case that it does not describe"
        ):
            apart = {cases[case_id]["patient"] for case_id in (*splits["test"], *validation)}
            imputed = [
                case_id
                for case_id in splits.get(TRAIN_ONLY, [])
                if cases[case_id]["patient"] not in apart
            ]
        return tuple(sorted([*train, *imputed]))

    def image(self, case_id: str) -> np.ndarray:
        """HU, int16 (64, Y, X)."""
        return self._read(case_id, "image")

    def label(self, case_id: str) -> np.ndarray:
        """uint8 (64, Y, X), 255 where the slab is padded."""
        return self._read(case_id, "label")

    def source_label(self, case_id: str) -> np.ndarray:
        """uint8 (z, y, x) on the scan's own grid. Raises `UserError` when the case has no label."""
        if not self.meta(case_id).labelled:
            raise UserError(f"{self.path}: case {case_id} has no label to compare with")
        return self._read(case_id, "source_label")

    def foreground(self, case_id: str) -> np.ndarray:
        """int16 (n, 5): class, tumour number (from 1; 0 for liver), z, y, x; sorted."""
        return self._read(case_id, "foreground")

    def _read(self, case_id: str, name: str) -> np.ndarray:
        meta = self.meta(case_id)
        expected = {
            "image": meta.grid.shape,
            "label": meta.grid.shape,
            "source_label": meta.source_grid.shape,
        }
        try:
            array: Any = zarr.open_array(
                self.path, path=f"{CASES}/{case_id}/{name}", mode="r", zarr_format=3
            )
        except (FileNotFoundError, ArrayNotFoundError):
            raise RunFailed(f"{self.path}: case {case_id}, {name}: {MISSING}") from None
        except Exception as error:  # damaged metadata fails in many ways
            raise RunFailed(
                f"{self.path}: case {case_id}, {name}: damaged ({_said(error)})"
            ) from None
        try:
            check_array(array, name, expected.get(name))
            values = np.asarray(array[...])
        except Exception as error:  # whatever zarr and its decoders make of damaged bytes
            raise RunFailed(
                f"{self.path}: case {case_id}, {name}: damaged ({_said(error)}); liverseg verify names the chunk, "
                "converting again mends it"
            ) from None
        if values.size and values.flat[0] == FILL[name]:
            raise RunFailed(f"{self.path}: case {case_id}, {name}: {MISSING}")
        return values


def _read_root(path: str) -> bytes:
    try:
        if "://" not in path:
            return (Path(path) / "zarr.json").read_bytes()
        file_system, folder = fsspec.core.url_to_fs(path)
        return bytes(file_system.cat_file(f"{folder.rstrip('/')}/zarr.json"))
    except (FileNotFoundError, NotADirectoryError):
        begun = (Path(path) / ".liverseg").is_dir()
        state = (
            "its conversion has not finished; run it again" if begun else "no Zarr store is there"
        )
        raise UserError(f"{path}: {state} (tools/to_zarr SOURCE {quote_path(path)})") from None
    except Exception as error:  # each kind of file system raises its own
        if "://" not in path and not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path}: cannot be read ({_said(error)}); can this machine reach it?"
        ) from None


def _root_of(path: str, text: bytes) -> dict[str, Any]:
    """The root group's own attribute. pydantic's parser takes a third of json's time."""
    try:
        with _no_garbage_collection():
            content = from_json(text)
        if not isinstance(content, dict) or (content["zarr_format"], content["node_type"]) != (
            3,
            "group",
        ):
            raise ValueError("not the metadata of a Zarr v3 group")
        root = content.get("attributes", {}).get(ATTRIBUTE)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: zarr.json is damaged ({' '.join(str(error).split())[:120]})"
        ) from None
    if not isinstance(root, dict):
        raise UserError(f"{path}: a Zarr group, but not written by liverseg convert")
    return root


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A million new objects, none of them garbage, make Python look through all of them again and again: two thirds of
    the time it takes to open 10,000 cases."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check_names(path: str, root: Mapping[str, Any]) -> None:
    """Names become paths here and in what is made from the store: none may lead out of a folder."""
    cases = root.get("cases")
    if not isinstance(cases, dict):
        raise UserError(f"{path}: zarr.json is damaged (cases is no table)")
    for case_id, case in cases.items():
        for name in (case_id, case.get("parent") if isinstance(case, dict) else None):
            if not isinstance(name, str) or not is_valid_case_id(name):
                raise UserError(
                    f"{path}: '{printable(name)[:80]}' cannot name a case; the store is damaged or forged"
                )


@contextmanager
def _understood(told: str) -> Iterator[None]:
    """What metadata lacks, or has of another kind, is told in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{told} ({type(error).__name__}: {_said(error)}); liverseg verify tells more"
        ) from None


def _check_url(url: str) -> None:
    """Raises `UserError` when this installation cannot read such URLs."""
    try:
        fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {_said(error)}, then it can be read (pip install)") from None
    except ValueError as error:
        raise UserError(
            f"{url}: {_said(error)}; give a folder, or a URL that fsspec knows (s3://, http://)"
        ) from None


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
