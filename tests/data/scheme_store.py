"""A tiny store of any labels and channels, written with the conversion's own writer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from liverseg_dist.config import ChannelConfig, ConvertConfig, IntensityConfig
from liverseg_dist.data.conversion.case_writer import (
    ROOT_OWNER,
    CaseArrays,
    StagingDir,
    format_root,
    write_case,
    write_text,
)
from liverseg_dist.data.conversion.foreground_samples import sample_foreground
from liverseg_dist.data.conversion.stored_case import StoredCase
from liverseg_dist.data.store.layout import SCHEMA
from liverseg_dist.labels import LabelScheme, Structure
from liverseg_dist.volume import Grid

SHAPE = (64, 40, 40)
SPACING_MM = (2.0, 2.0, 2.0)
INTENSITY = IntensityConfig(lower_hu=-200, upper_hu=300, mean=0.5, std=0.25)
MR = ChannelConfig(name="T1", modality="MR", intensity="zscore")
CT = ChannelConfig(name="CT")


def make_scheme(classes: int, lesions: int = 1) -> LabelScheme:
    """A scheme with `classes` foreground classes, the last `lesions` of which lie in the first."""
    names = [f"organ {value}" for value in range(1, classes + 1)]
    first_lesion = classes - lesions + 1
    for value in range(max(2, first_lesion), classes + 1):
        names[value - 1] = f"lesion {value}"
    inside = tuple(range(max(2, first_lesion), classes + 1))
    structures = [Structure(names[0], (1, *inside))]
    for value in range(2, classes + 1):
        if value in inside:
            structures.append(Structure(names[value - 1], (value,), "lesion", names[0]))
        else:
            structures.append(Structure(names[value - 1], (value,)))
    values = ((0, "background"), *enumerate(names, start=1), (255, "ignore"))
    return LabelScheme(values, tuple(structures))


def draw_label(labels: LabelScheme, seed: int, annotated: Sequence[str]) -> np.ndarray:
    """Boxes of every class; classes whose structures were not annotated are background."""
    random = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    count = labels.num_classes - 1
    for value in range(1, count + 1):
        z, y = divmod(value - 1, 4)
        corner = np.array([4 + 14 * z, 2 + 9 * y, 6]) + random.integers(0, 3, 3)
        box = tuple(slice(low, low + size) for low, size in zip(corner, (12, 8, 24), strict=True))
        label[box] = value
    lowest = labels.indistinguishable_classes(annotated)
    return np.array([*lowest, *[0] * (256 - len(lowest))], np.uint8)[label]


def write_scheme_store(
    path: Path,
    labels: LabelScheme,
    channels: Sequence[ChannelConfig] = (CT,),
    annotated: Mapping[int, Sequence[str]] | None = None,
    absent: Mapping[int, Sequence[int]] | None = None,
    cases: int = 4,
) -> Path:
    """Write a store with two folds.

    Args:
        annotated: annotated structures by the number of the case; others have all.
        absent: absent channels by the number of the case; others have all.
    """
    grid = Grid(SHAPE, np.diag([*reversed(SPACING_MM), 1.0]))
    entries = {}
    for number in range(cases):
        names = (annotated or {}).get(number, labels.structure_names)
        label = draw_label(labels, number, tuple(names))
        random = np.random.default_rng(100 + number)
        image = np.zeros((len(channels), *SHAPE), np.int16)
        missing = (absent or {}).get(number, ())
        for channel in range(len(channels)):
            if channel not in missing:
                noise = random.normal(0, 20, SHAPE)
                image[channel] = (noise + 40 * label.astype(float) - 30 * channel).astype(np.int16)
        rows, lesions = sample_foreground(label, labels, 500)
        counts = np.bincount(label.ravel(), minlength=labels.num_classes)[: labels.num_classes]
        case_id = f"case_{number}"
        own = [None if one.intensity == "ct" else INTENSITY.model_dump() for one in channels]
        stored = StoredCase(
            labelled=True,
            grid=grid,
            source_grid=grid,
            valid_slices=(0, SHAPE[0]),
            class_voxels=tuple(int(count) for count in counts),
            lesions=lesions,
            slab_policy="crop",
            spacing_mm=SPACING_MM,
            parent=case_id,
            cleaning={},
            source_sha256="0" * 64,
            annotated=None if names == labels.structure_names else tuple(names),
            present=tuple(c not in missing for c in range(len(channels))) if missing else None,
            intensities=tuple(own) if any(own) else None,
        )
        arrays = CaseArrays(image, label, label, rows, stored)
        write_case(StagingDir(path, case_id), case_id, arrays)
        entries[case_id] = {**stored.to_json(), "patient": case_id}
    shared = [INTENSITY.model_dump() if one.intensity == "ct" else None for one in channels]
    ids = list(entries)
    root = {
        "schema": SCHEMA,
        "name": "scheme",
        "labels": labels.to_json(),
        "channels": [channel.model_dump(mode="json") for channel in channels],
        "spacing_mm": list(SPACING_MM),
        "intensity": shared[0] if len(shared) == 1 and shared[0] else shared,
        "convert": ConvertConfig().model_dump(mode="json"),
        "splits": {"test": [], "folds": [ids[:1], ids[1:]]},
        "audit": {},
        "cases": entries,
    }
    write_text(StagingDir(path, ROOT_OWNER), path / "zarr.json", format_root(root))
    return path
