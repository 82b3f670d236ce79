"""Paints a patient on a voxel grid: HU or MR signal, and which structure each voxel belongs to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from liverseg_dist.phantom.anatomy import Patient
from liverseg_dist.phantom.canvas import Canvas, Renderer, Stroke, Tissue, crop_to_slab
from liverseg_dist.phantom.liver import LIVER_BOUNDS
from liverseg_dist.phantom.shapes import Bounds, Box, Shape
from liverseg_dist.phantom.tumours import Tumour
from liverseg_dist.volume import Grid

AIR_HU = -1000.0


class Painted(NamedTuple):
    """Some planes of a painted patient."""

    values: np.ndarray
    """HU or MR signal, float32."""
    liver: np.ndarray
    """Each voxel's share of liver with tumours and benign lesions, float32."""
    tumours: np.ndarray
    """Each voxel's share of tumour, float32."""
    organs: np.ndarray | None
    """Label value of the other organs that are labelled, uint8; None: none is labelled."""


class Painter:
    """Paints a patient on a grid, some planes at a time, so that memory stays bounded.

    Args:
        patient: the patient.
        grid: voxel grid.
        render: returns the values of a tissue; the default is HU of a CT.
        background: value of the air around the body.
        organ_values: label value of each organ that is labelled in addition to the liver.
    """

    def __init__(
        self,
        patient: Patient,
        grid: Grid,
        render: Renderer = Tissue.compute_hu,
        background: float = AIR_HU,
        organ_values: Mapping[str, int] | None = None,
    ) -> None:
        self.patient, self.grid = patient, grid
        self._render, self._background = render, background
        self._organ_values = dict(organ_values or {})
        spacing_z, spacing_y, _ = grid.spacing_mm
        self.edge_mm = 1.15 * max(spacing_y, 0.6 * spacing_z)
        self._organs = [self._locate_stroke(stroke.shape, stroke) for stroke in patient.organs]
        self._inside = [
            self._locate_stroke(stroke.shape, stroke) for stroke in patient.inside_liver
        ]
        self._tumours = self._locate_tumours(patient.tumours)
        self._benign = self._locate_tumours(patient.benign)
        self._liver = patient.find_voxel_box(grid, LIVER_BOUNDS)
        # The same bodies are looked up for every slab.
        self._boxes: dict[Bounds, np.ndarray] = {}

    def _find_body_box(self, bounds: Bounds) -> np.ndarray:
        if bounds not in self._boxes:
            self._boxes[bounds] = self.patient.find_voxel_box(self.grid, bounds)
        return self._boxes[bounds]

    def _locate_stroke(self, shape: Shape, stroke: Stroke) -> tuple[np.ndarray, Stroke]:
        return self.patient.find_voxel_box(
            self.grid, shape.bounding_box(), 2.5 * stroke.ripple_mm + stroke.edge_mm
        ), stroke

    def _locate_tumours(self, tumours: Sequence[Tumour]) -> list[tuple[np.ndarray, Tumour]]:
        return [
            (self.patient.find_voxel_box(self.grid, tumour.bounding_box()), tumour)
            for tumour in tumours
        ]

    def paint_planes(self, planes: slice, texture: np.ndarray) -> Painted:
        """Paint some planes.

        Args:
            planes: range of planes of the grid.
            texture: unevenness of the tissue, unit variance.
        """
        patient = self.patient
        points = patient.map_voxels(self.grid, planes)

        def find(bounds: Bounds) -> Box | None:
            return crop_to_slab(self._find_body_box(bounds), planes)

        shape = points.x.shape
        canvas = Canvas(
            points,
            texture,
            np.full(shape, self._background, np.float32),
            self.edge_mm,
            find,
            render=self._render,
            organs=np.zeros(shape, np.uint8) if self._organ_values else None,
            organ_values=self._organ_values,
        )
        patient.torso.paint_torso(canvas)
        self._paint_strokes(canvas, self._organs, planes)
        liver, tumours = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        distance = np.full(shape, 1e3, np.float32)
        box = crop_to_slab(self._liver, planes)
        if box is None:
            return Painted(canvas.values, liver, tumours, canvas.organs)
        part = canvas[box]
        distance[box] = patient.liver.signed_distance(part.points, part.regions["abdomen"])
        parenchyma = Tissue(patient.contrast.liver, 3.0, kind="liver")
        liver[box] = part.fill_tissue(distance[box], parenchyma)
        canvas.regions["liver"] = distance
        self._paint_strokes(canvas, self._inside, planes)
        self._paint_lesions(canvas, self._benign, planes, None)
        # Tumours last: they cover vessels and benign lesions where these overlap.
        self._paint_lesions(canvas, self._tumours, planes, tumours)
        return Painted(canvas.values, liver, tumours, canvas.organs)

    def _paint_lesions(
        self,
        canvas: Canvas,
        lesions: list[tuple[np.ndarray, Tumour]],
        planes: slice,
        shares: np.ndarray | None,
    ) -> None:
        """Paint lesions of the liver and enter each voxel's share of them in `shares`."""
        for lesion_box, lesion in lesions:
            inner = crop_to_slab(lesion_box, planes)
            if inner is None:
                continue
            part = canvas[inner]
            # The maximum of two signed distances is the intersection: lesions end at the liver.
            ball = np.maximum(lesion.signed_distance(part.points), part.regions["liver"])
            lesion.paint_tumour(part, ball, self.patient.contrast.liver)
            if shares is not None:
                np.maximum(shares[inner], part.compute_share(ball), out=shares[inner])

    def _paint_strokes(
        self, canvas: Canvas, strokes: list[tuple[np.ndarray, Stroke]], planes: slice
    ) -> None:
        for stroke_box, stroke in strokes:
            box = crop_to_slab(stroke_box, planes)
            if box is not None:
                canvas[box].paint_stroke(stroke)
