"""The torso around the organs: skin, fat, muscle, ribs, spine, lungs, and the diaphragm.

Distances are those of the nominal patient (see `anatomy`): the cavity is 256 mm wide and 180 mm
deep, the middle of the spine is at y = -20, the liver's hilum at z = 0.
"""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.phantom.canvas import Canvas, Tissue
from liverseg_dist.phantom.shapes import Cone, Ellipsoid, Points, build_tube, unite_shapes

HALF_WIDTH_MM, HALF_DEPTH_MM = 128.0, 90.0
SQUARENESS = 0.35
SPINE_Y_MM = -20.0
VERTEBRA_MM, RIB_PITCH_MM = 34.0, 29.0
LAST_RIB_Z_MM = -72.0

SKIN = Tissue(20.0, kind="skin")
FAT = Tissue(-102.0, grain=6.0, spot=45.0, rare=1.9, kind="fat")
INNER_FAT = Tissue(-100.0, grain=7.0, spot=90.0, rare=1.5, kind="fat")
LUNG = Tissue(-865.0, grain=18.0, spot=520.0, rare=1.7, kind="lung")
CORTICAL = Tissue(520.0, grain=40.0, kind="cortical_bone")
DISC = Tissue(88.0, grain=5.0, kind="cartilage")
CARTILAGE = Tissue(115.0, grain=10.0, kind="cartilage")
CORD = Tissue(32.0, grain=4.0, kind="spinal_cord")


@dataclass(frozen=True)
class Torso:
    """Parameters that differ between patients, in nominal mm and HU."""

    fat_mm: float
    wall_mm: float
    muscle: Tissue
    marrow: Tissue
    blood: Tissue
    right_top_mm: float
    """Height of the diaphragm's right dome; the left one is a little lower."""
    left_top_mm: float
    phase_mm: float
    """Offset of vertebrae and ribs along the spine."""

    def cavity_mm(self, p: Points) -> np.ndarray:
        """Return the signed distance to the inner wall of thorax and abdomen."""
        # The thorax becomes narrower towards the head.
        taper = 1 - np.float32(0.0011) * np.clip(p.z - 30, 0, 130)
        u2 = (p.x / (HALF_WIDTH_MM * taper)) ** 2
        v2 = (p.y / (HALF_DEPTH_MM * taper)) ** 2
        r2 = np.sqrt(np.maximum((u2 + v2) ** 2 - np.float32(2 * SQUARENESS) * u2 * v2, 1e-6))
        return np.sqrt(p.x * p.x + p.y * p.y + 1e-3) * (1 - 1 / np.sqrt(r2))

    def dome_mm(self, p: Points) -> np.ndarray:
        """Return the signed distance to the diaphragm; everything below is inside.

        It consists of two domes and the lower tendon between them.
        """
        right = _dome_distance(p, (63.0, -2.0, self.right_top_mm - 74), (74.0, 92.0, 74.0))
        left = _dome_distance(p, (-64.0, -6.0, self.left_top_mm - 66), (74.0, 88.0, 66.0))
        middle = _dome_distance(p, (-2.0, 8.0, self.left_top_mm - 70), (60.0, 86.0, 52.0))
        return unite_shapes(unite_shapes(right, left, 12.0), middle, 16.0)

    def paint_torso(self, canvas: Canvas) -> None:
        """Paint everything except the abdominal organs.

        It adds the regions `cavity` and `abdomen` to the canvas.
        """
        p = canvas.points
        cavity = self.cavity_mm(p)
        side = (p.x * np.float32(1 / HALF_WIDTH_MM)) ** 2
        wall = cavity - np.float32(self.wall_mm) * (np.float32(0.85) + np.float32(0.3) * side)
        # Fat is thickest at flanks and back, and below the ribs.
        low = np.float32(1.15) - np.float32(0.0022) * np.clip(p.z, -120, 120)
        skin = wall - np.float32(self.fat_mm) * low * (np.float32(0.8) + np.float32(0.35) * side)
        # From outside to inside: each tissue covers the inner part of the one before.
        canvas.fill_tissue(skin - 2, SKIN)
        canvas.fill_tissue(skin, FAT)
        canvas.fill_tissue(wall, self.muscle)
        canvas.fill_tissue(cavity, LUNG)
        canvas.regions["cavity"] = cavity
        self._paint_chest(canvas)
        dome = self.dome_mm(p)
        abdomen = np.maximum(dome, cavity)
        canvas.fill_tissue(abdomen, self.muscle)
        canvas.fill_tissue(np.maximum(dome + 2.5, cavity + 0.5), INNER_FAT)
        canvas.regions["abdomen"] = abdomen
        # Blocks around each part, because most voxels of the body are far from it.
        back = canvas.crop_around(((-72.0, -96.0, -1e3), (72.0, 22.0, 1e3)))
        if back is not None:
            self._paint_back(back)
        spine = canvas.crop_around(((-44.0, -96.0, -1e3), (44.0, 4.0, 1e3)))
        if spine is not None:
            self._paint_spine(spine)
        chest = canvas.crop_around(((-170.0, -130.0, LAST_RIB_Z_MM - 115), (170.0, 130.0, 1e3)))
        if chest is not None:
            self._paint_ribs(chest)

    def _paint_chest(self, canvas: Canvas) -> None:
        part = canvas.crop_around(((-100.0, -90.0, self.left_top_mm - 45), (50.0, 90.0, 400.0)))
        if part is None:
            return
        canvas, p, cavity = part, part.points, part.regions["cavity"]
        middle = np.maximum(np.sqrt((p.x + 4) ** 2 + (0.32 * p.y) ** 2) - 27, cavity)
        canvas.fill_tissue(middle, INNER_FAT)
        heart = Ellipsoid(
            (-26.0, 34.0, self.left_top_mm + 36), (60.0, 46.0, 52.0), 28.0, -15.0
        ).signed_distance(p)
        canvas.fill_tissue(np.maximum(heart, cavity + 3), INNER_FAT)
        myocardium = Tissue(0.75 * self.blood.hu, 4.0, kind="muscle")
        canvas.fill_tissue(np.maximum(heart + 6, cavity + 4), myocardium)
        for x, y, size in ((-44, 40, 23.0), (-6, 44, 22.0), (-14, 8, 18.0)):
            chamber = Ellipsoid((x, y, self.left_top_mm + 40), (size, size, 1.5 * size))
            canvas.fill_tissue(chamber.signed_distance(p), self.blood)
        for piece in build_tube((-24, 6, 40, 7), (-9, 4, 75, 8), (-4, -2, 220, 8)):
            wall = Tissue(55.0, 6.0, kind="gut_wall")
            canvas.fill_tissue(piece.signed_distance(p), wall, organ="esophagus")

    def _paint_back(self, canvas: Canvas) -> None:
        p = canvas.points
        for side in (-1.0, 1.0):
            back = np.sqrt(((p.x - side * 33) / 33) ** 2 + ((p.y + 63) / 25) ** 2 + 1e-6) * 25 - 25
            canvas.fill_tissue(back, self.muscle)
            psoas = Ellipsoid((side * 37, -27.0, -190.0), (19.0, 21.0, 150.0)).signed_distance(p)
            canvas.fill_tissue(psoas, self.muscle)
            crus = Ellipsoid(
                (side * 12 - 2, 4.0, 0.0), (7.0, 10.0, 75.0), -side * 20
            ).signed_distance(p)
            canvas.fill_tissue(crus, self.muscle)

    def _paint_spine(self, canvas: Canvas) -> None:
        p = canvas.points
        along = _wrap_to_period(p.z, self.phase_mm, VERTEBRA_MM)
        waist = np.float32(2.5) * (1 - (along * np.float32(2 / VERTEBRA_MM)) ** 2)
        column = np.sqrt(p.x**2 + ((p.y - SPINE_Y_MM) * 1.28) ** 2 + 1e-6) - 23 + waist
        canvas.fill_tissue(column, DISC)
        body = np.maximum(column, np.abs(along) - 13.5)
        canvas.fill_tissue(body, CORTICAL)
        canvas.fill_tissue(body + 2.2, self.marrow)
        canal_y = SPINE_Y_MM - 26
        ring = np.sqrt(p.x**2 + (p.y - canal_y) ** 2 + 1e-6)
        canvas.fill_tissue(np.maximum(ring - 12.5, np.abs(along) - 10), CORTICAL)
        local = Points(np.abs(p.x), p.y, along)
        for piece in (
            Cone((0.0, canal_y - 10, 0.0), (0.0, canal_y - 36, -9.0), 4.0, 4.5),  # spinous process
            Cone(
                (9.0, canal_y - 4, 2.0), (36.0, canal_y - 10, 4.0), 5.0, 3.5
            ),  # transverse processes
            Cone((12.0, canal_y - 8, -14.0), (13.0, canal_y - 9, 10.0), 5.5, 5.0),  # facet joints
        ):
            distance = piece.signed_distance(local)
            canvas.fill_tissue(distance, CORTICAL)
            canvas.fill_tissue(distance + 2.3, self.marrow)
        canvas.fill_tissue(ring - 8.5, INNER_FAT)
        canvas.fill_tissue(ring - 7, CORD)

    def _paint_ribs(self, canvas: Canvas) -> None:
        p, cavity = canvas.points, canvas.regions["cavity"]
        # -1 at the spine, 1 at the sternum.
        forward = p.y / np.sqrt(p.x * p.x + p.y * p.y + 1)
        # Ribs descend from the back to the front.
        z = p.z + np.float32(56) * (1 + forward)
        along = _wrap_to_period(z, self.phase_mm, RIB_PITCH_MM)
        rib = (np.sqrt(((cavity - 4.5) / 3.6) ** 2 + (along / 5.4) ** 2 + 1e-6) - 1) * np.float32(
            3.6
        )
        margin = LAST_RIB_Z_MM + 100 * np.clip(forward, 0, 1) ** 2 - p.z
        edge = np.maximum(margin, np.float32(14) - np.abs(p.x))
        rib = np.maximum(rib, edge)
        canvas.fill_tissue(np.maximum(rib, (forward - np.float32(0.55)) * 60), CORTICAL)
        canvas.fill_tissue(rib + 1.8, self.marrow)
        canvas.fill_tissue(np.maximum(rib, (np.float32(0.55) - forward) * 60), CARTILAGE)
        sternum = np.maximum(np.abs(p.x) - 15, np.abs(cavity - 4.5) - 4.5)
        sternum = np.maximum(np.maximum(sternum, 35 - p.z), -p.y)
        canvas.fill_tissue(sternum, CORTICAL)
        canvas.fill_tissue(sternum + 1.8, self.marrow)


def _wrap_to_period(z_mm: np.ndarray, phase_mm: float, pitch_mm: float) -> np.ndarray:
    """SliceFields within a repeating piece, from minus to plus half the pitch."""
    turns = (z_mm + np.float32(phase_mm)) * np.float32(1 / pitch_mm)
    turns -= np.floor(turns)
    turns -= np.float32(0.5)
    turns *= np.float32(pitch_mm)
    return turns


def _dome_distance(
    p: Points, centre: tuple[float, float, float], radii: tuple[float, float, float]
) -> np.ndarray:
    """Return the signed distance to half an ellipsoid on a tube that becomes wider downwards.

    The lower rim of the lung then becomes thinner and ends.
    """
    dz = p.z - np.float32(centre[2])
    widening = 1 + np.float32(0.0045) * np.maximum(-dz, 0)
    up = np.maximum(dz, 0) / np.float32(radii[2])
    across = ((p.x - centre[0]) / radii[0]) ** 2 + ((p.y - centre[1]) / radii[1]) ** 2
    return (np.sqrt(across / (widening * widening) + up * up + 1e-6) - 1) * np.float32(min(radii))
