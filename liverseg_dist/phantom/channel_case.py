"""One case with one or several channels: CT, MR sequences, or both of one patient.

CT and MR have grids of their own. Between the two scans the patient moved: a known rigid motion,
which the truth file of the case states, separates them in the world. The label is on the grid of
the first channel that the case has. A recipe may lack a channel in a share of its cases.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy.spatial.transform import Rotation

from liverseg_dist.phantom.anatomy import Patient, nominal_to_world
from liverseg_dist.phantom.benign import add_benign_lesions
from liverseg_dist.phantom.grids import Size, draw_mr_grid, draw_orientation
from liverseg_dist.phantom.liver import HILUM
from liverseg_dist.phantom.mr_scan import scan_with_mr
from liverseg_dist.phantom.mr_signal import SEQUENCES
from liverseg_dist.phantom.mr_tissues import draw_patient_tissues
from liverseg_dist.phantom.organ_labels import LabelPlan
from liverseg_dist.phantom.scan import (
    GOLDEN_RATIO,
    TUMOUR_MM,
    PhantomScan,
    draw_case_grid,
    draw_case_patient,
    scan_patient,
)
from liverseg_dist.volume import Grid, Volume

Modality = Literal["ct", "mr", "ct+mr"]
MODALITIES: tuple[Modality, ...] = ("ct", "mr", "ct+mr")
DEG_PER_MM = 0.25
"""Rotation that goes with a shift: 2 degrees at 8 mm."""
# Each draw has its own random stream, so one setting does not change the values of the others.
_MR_GRID, _TISSUES, _MOTION, _MISSING, _BENIGN = range(50, 55)


@dataclass(frozen=True)
class Recipe:
    """Settings that determine the voxels of a case, together with its number."""

    modality: Modality
    sequences: tuple[str, ...]
    """MR sequences, each a channel; without meaning for CT."""
    labels: LabelPlan
    seed: int = 0
    size: Size = "small"
    hard: bool = False
    benign_lesions: int = 0
    """Largest number of benign lesions in a patient."""
    misalignment_mm: float = 0.0
    """Shift between CT and MR."""
    missing_share: float = 0.0
    """Share of the cases that lack one channel."""
    one_grid: bool = False
    """Whether all channels are on the grid of the first one."""

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels in their order."""
        names = ["CT"] if "ct" in self.modality else []
        if "mr" not in self.modality:
            return tuple(names)
        if len(self.sequences) == 1:
            return (*names, "MR")
        return (*names, *(SEQUENCES[name].title for name in self.sequences))

    def key(self, number: int) -> tuple[int, int, int, int]:
        """Return the seed of a case, which is also that of the CT of the same patient."""
        return (self.seed, number, int(self.size == "full"), int(self.hard))


@dataclass(frozen=True)
class ChannelCase:
    """Voxels of a case and what is known about it."""

    images: dict[str, Volume]
    """Channels that the case has."""
    label: Volume
    truth: dict[str, Any]


def make_channel_case(recipe: Recipe, number: int) -> ChannelCase:
    """Create one case; the result is a pure function of the arguments."""
    key = recipe.key(number)
    patient = draw_case_patient(key)
    if recipe.benign_lesions:
        rng = np.random.default_rng([*key, _BENIGN])
        count = int(rng.integers(1, recipe.benign_lesions + 1))
        patient = add_benign_lesions(rng, patient, count, TUMOUR_MM[recipe.size])
    present = list_present_channels(recipe, number)
    motion = draw_motion(recipe, patient, number)
    scans = _scan_channels(recipe, patient, number, present, motion)
    truth: dict[str, Any] = {"channels": {name: name in present for name in recipe.channels}}
    if recipe.modality == "ct+mr":
        # Also where the motion is the identity: a reader needs no special case.
        truth["mr_from_ct"] = [[round(float(v), 6) for v in row] for row in motion]
    truth["tumours"] = len(patient.tumours)
    truth["benign_lesions"] = _describe_benign(patient)
    images = {name: scan.image for name, scan in scans.items()}
    return ChannelCase(images, next(iter(scans.values())).label, truth)


def list_present_channels(recipe: Recipe, number: int) -> tuple[str, ...]:
    """Return the channels of a case: all, or all but one.

    The cases that lack one are spread evenly, so that a small set has its share too.
    """
    fraction = (np.random.default_rng([recipe.seed, _MISSING]).random() + number * GOLDEN_RATIO) % 1
    if fraction >= recipe.missing_share:
        return recipe.channels
    rng = np.random.default_rng([*recipe.key(number), _MISSING])
    absent = recipe.channels[int(rng.integers(len(recipe.channels)))]
    return tuple(name for name in recipe.channels if name != absent)


def draw_motion(recipe: Recipe, patient: Patient, number: int) -> np.ndarray:
    """Return the matrix (4, 4) from the world of the CT to that of the MR, in mm (RAS+).

    The middle of the liver is shifted by exactly `misalignment_mm`; the rotation is about it.
    """
    motion = np.eye(4)
    if recipe.modality != "ct+mr" or not recipe.misalignment_mm:
        return motion
    rng = np.random.default_rng([*recipe.key(number), _MOTION])
    directions = rng.normal(size=(2, 3))
    axis, direction = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    angle_rad = np.deg2rad(DEG_PER_MM * recipe.misalignment_mm)
    rotation = Rotation.from_rotvec(axis * angle_rad).as_matrix()
    centre = nominal_to_world(patient, HILUM)
    motion[:3, :3] = rotation
    # The first two terms keep the centre fixed under the rotation; only the shift moves it.
    motion[:3, 3] = centre - rotation @ centre + direction * recipe.misalignment_mm
    return motion


def _scan_channels(
    recipe: Recipe, patient: Patient, number: int, present: tuple[str, ...], motion: np.ndarray
) -> dict[str, PhantomScan]:
    """Scan the channels that the case has, in their order."""
    key, values = recipe.key(number), recipe.labels.values
    scans: dict[str, PhantomScan] = {}
    grid, orientation = draw_case_grid(key, patient, recipe.size)
    if "CT" in present:
        scans["CT"] = scan_patient(patient, grid, orientation, key, recipe.hard, values)
    if "mr" not in recipe.modality:
        return scans
    # Drawn once: all sequences of a patient show the same tissues.
    tissues = draw_patient_tissues(np.random.default_rng([*key, _TISSUES]))
    if not (recipe.one_grid and "CT" in recipe.channels):
        rng = np.random.default_rng([*key, _MR_GRID])
        grid = draw_mr_grid(rng, patient, recipe.size)
        orientation = draw_orientation(rng)
    for name, sequence in zip(
        recipe.channels[-len(recipe.sequences) :], recipe.sequences, strict=True
    ):
        if name in present:
            scan = scan_with_mr(
                patient, tissues, grid, orientation, sequence, key, recipe.hard, values
            )
            scans[name] = PhantomScan(
                _move_volume(scan.image, motion), _move_volume(scan.label, motion), patient
            )
    return scans


def _move_volume(volume: Volume, motion: np.ndarray) -> Volume:
    return Volume(volume.voxels, Grid(volume.shape, motion @ volume.affine))


def _describe_benign(patient: Patient) -> list[dict[str, Any]]:
    """Return kind, nominal diameter and centre of each, in the world of the CT (RAS+, mm)."""
    lesions = []
    for lesion in patient.benign:
        centre = nominal_to_world(patient, lesion.ball.centre)
        lesions.append(
            {
                "kind": lesion.kind,
                "diameter_mm": round(2 * lesion.radius_mm, 2),
                "centre_mm": [round(float(v), 2) for v in centre],
            }
        )
    return lesions
