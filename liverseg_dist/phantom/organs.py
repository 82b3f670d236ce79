"""Organs and large vessels around the liver, as strokes in the order of painting.

Coordinates are nominal mm (see `torso`).
"""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.phantom.canvas import Stroke, Tissue
from liverseg_dist.phantom.shapes import Cone, Ellipsoid, Point, build_tube

WALL = Tissue(82.0, grain=8.0, kind="gut_wall")
GAS = Tissue(-960.0, kind="gas")
FLUID = Tissue(22.0, grain=5.0, kind="gut_fluid")
STOOL = Tissue(8.0, grain=30.0, spot=-520.0, rare=-0.9, kind="stool")
SINUS_FAT = Tissue(-70.0, grain=12.0, kind="fat")


@dataclass(frozen=True)
class Contrast:
    """HU of enhancing tissues, for one patient and one time after the injection."""

    liver: float
    portal: float
    hepatic: float
    aorta: float
    cava: float
    kidney: float
    spleen: float
    pancreas: float

    @classmethod
    def draw_random(cls, rng: np.random.Generator) -> "Contrast":
        """Draw the HU of a portal-venous phase.

        A stronger bolus raises all values; a fatty liver stays dark.
        """
        u, bolus = rng.uniform, rng.uniform(0.86, 1.14)
        liver = 108 * bolus + u(-14, 12)
        if rng.random() < 0.12:
            liver -= u(20, 40)
        # In an early phase the hepatic veins are not enhanced.
        is_enhanced = rng.random() < 0.8
        hepatic = 152 * bolus + u(-15, 15) if is_enhanced else liver + u(-6, 8)
        return cls(
            liver=liver,
            portal=172 * bolus + u(-12, 12),
            hepatic=hepatic,
            aorta=158 * bolus + u(-15, 25),
            cava=132 * bolus + u(-20, 15),
            kidney=188 * bolus + u(-20, 20),
            spleen=118 * bolus + u(-9, 10),
            pancreas=96 * bolus + u(-10, 10),
        )


def draw_organs(
    rng: np.random.Generator, contrast: Contrast, both_kidneys: tuple[Ellipsoid, Ellipsoid]
) -> list[Stroke]:
    """Draw all organs of the abdomen except the liver and the gallbladder."""
    # Organs that are painted later cover earlier ones.
    strokes = _draw_bowel(rng) + _draw_stomach(rng)
    spleen = Ellipsoid(
        (-98 + jitter(rng, 4), -34.0, 6 + jitter(rng, 10)),
        (33.0, 46.0, 52 + jitter(rng, 10)),
        -24.0,
    )
    strokes.append(
        Stroke(
            spleen,
            Tissue(contrast.spleen, 3.0, kind="spleen"),
            within="abdomen",
            margin_mm=3.5,
            ripple_mm=0.8,
            organ="spleen",
        )
    )
    strokes += _draw_pancreas(rng, contrast)
    for kidney, name in zip(both_kidneys, ("kidney_right", "kidney_left"), strict=True):
        strokes += _kidney_strokes(rng, kidney, contrast, name)
    return strokes + _draw_trunks(rng, contrast)


def build_kidneys(rng: np.random.Generator) -> tuple[Ellipsoid, Ellipsoid]:
    """Draw the right and the left kidney."""
    long_mm = 53 + jitter(rng, 6)
    right = Ellipsoid(
        (60 + jitter(rng, 4), -33.0, -84 + jitter(rng, 12)), (26.0, 29.0, long_mm), 35.0, -10.0
    )
    left = Ellipsoid(
        (-62 + jitter(rng, 4), -34.0, -58 + jitter(rng, 12)), (27.0, 29.0, long_mm), -35.0, 10.0
    )
    return right, left


def build_gallbladder(rng: np.random.Generator) -> tuple[Cone, ...]:
    """Draw a gallbladder; a quarter of the patients have none."""
    if rng.random() < 0.25:
        return ()
    size = float(rng.uniform(0.8, 1.25))
    return build_tube(
        (42, 26, -24, 4 * size), (50, 42, -42, 11 * size), (58, 58, -60 - 8 * size, 14 * size)
    )


def jitter(rng: np.random.Generator, reach: float) -> float:
    """Draw a shift between -reach and reach."""
    return float(rng.uniform(-reach, reach))


def _hollow_organ(
    organ: str,
    pieces: tuple[Cone, ...],
    content: Tissue,
    wall_mm: float,
    gas_y_mm: float | None = None,
    ripple_mm: float = 0.8,
) -> list[Stroke]:
    """Return strokes of a hollow organ: wall, then content, then gas above the fluid.

    Each is painted for all pieces, so that no wall crosses the lumen.
    """
    inside = {"within": "abdomen", "margin_mm": 3, "ripple_mm": ripple_mm, "organ": organ}
    strokes = [Stroke(c, WALL, **inside) for c in pieces]  # type: ignore[arg-type]
    inside["margin_mm"] = 3 + wall_mm
    strokes += [Stroke(c, content, wall_mm, **inside) for c in pieces]  # type: ignore[arg-type]
    if gas_y_mm is not None:
        for piece in pieces:
            strokes.append(
                Stroke(piece, GAS, wall_mm, above_y_mm=gas_y_mm, **inside)  # type: ignore[arg-type]
            )
    return strokes


def _draw_stomach(rng: np.random.Generator) -> list[Stroke]:
    full = float(rng.uniform(0.75, 1.15))
    pieces = build_tube(
        (-60, 0, 36, 27 * full),
        (-70, 24, 8, 27 * full),
        (-50, 48, -32, 21 * full),
        (-4, 54, -50, 15 * full),
        (26, 42, -48, 10),
    )
    content = Tissue(
        float(rng.uniform(10, 50)),
        grain=float(rng.uniform(3, 16)),
        spot=-120.0,
        rare=-1.6,
        kind="stomach_content",
    )
    wall_mm, gas_y_mm = float(rng.uniform(3, 6)), float(rng.uniform(42, 66))
    return _hollow_organ("stomach", pieces, content, wall_mm, gas_y_mm, ripple_mm=1.5)


def _draw_bowel(rng: np.random.Generator) -> list[Stroke]:
    strokes: list[Stroke] = []
    # Jejunum and ileum: short random walks.
    for _ in range(26):
        at = np.array([rng.uniform(-85, 75), rng.uniform(-2, 60), rng.uniform(-215, -70)])
        radius = float(rng.uniform(9, 14))
        knots: list[tuple[float, float, float, float]] = []
        for _ in range(4):
            x, y, z = at.tolist()
            knots.append((x, y, z, radius))
            at = np.clip(at + rng.normal(0, 20, 3), [-95, -5, -230], [90, 66, -66])
        gas = float(rng.uniform(30, 70)) if rng.random() < 0.3 else None
        strokes += _hollow_organ("small_bowel", build_tube(*knots), FLUID, 2.6, gas)
    # Vessels of the mesentery.
    for _ in range(14):
        end = (
            float(rng.uniform(-80, 75)),
            float(rng.uniform(0, 60)),
            float(rng.uniform(-200, -80)),
        )
        root = (4.0 + jitter(rng, 6), 30 + jitter(rng, 5), -90 + jitter(rng, 30))
        strokes.append(Stroke(Cone(root, end, 2.4, 1.2), Tissue(140.0, kind="blood")))
    r = float(rng.uniform(17, 23))
    colon = (
        build_tube((98, -20, -240, r), (102, -14, -128, r), (96, 22, -112, r)),
        build_tube(
            (96, 22, -112, r),
            (52, 60, -112, 0.9 * r),
            (-8, 66, -100, 0.85 * r),
            (-70, 52, -62, 0.9 * r),
        ),
        build_tube(
            (-70, 52, -62, 0.9 * r),
            (-100, 14, -26, 0.9 * r),
            (-112, -24, -80, 0.75 * r),
            (-108, -28, -240, 15),
        ),
    )
    for pieces in colon:
        gas = float(rng.uniform(-5, 70)) if rng.random() < 0.6 else None
        content = STOOL if rng.random() < 0.75 else FLUID
        strokes += _hollow_organ("colon", pieces, content, 2.4, gas, ripple_mm=2.2)
    duodenum = build_tube(
        (26, 42, -48, 11),
        (46, 24, -62, 12),
        (42, 10, -96, 12),
        (8, 8, -108, 11),
        (-26, 14, -96, 11),
    )
    return strokes + _hollow_organ("duodenum", duodenum, FLUID, 2.8)


def _draw_pancreas(rng: np.random.Generator, contrast: Contrast) -> list[Stroke]:
    tissue = Tissue(contrast.pancreas, grain=8.0, spot=-90.0, rare=-1.3, kind="pancreas")
    thick = float(rng.uniform(0.8, 1.2))
    knots = (
        (26, 22, -62, 12.0),
        (24, 24, -46, 13.0),
        (4, 34, -34, 8.0),
        (-30, 28, -16, 8.5),
        (-78, -6, 2, 7.5),
    )
    return [
        Stroke(c, tissue, ripple_mm=2.0, organ="pancreas")
        for c in build_tube(*((x, y, z, r * thick) for x, y, z, r in knots))
    ]


def _kidney_strokes(
    rng: np.random.Generator, shape: Ellipsoid, contrast: Contrast, organ: str
) -> list[Stroke]:
    """Draw a kidney; its label has the cyst but not the fat and the pelvis of the sinus."""
    medial = -12 if shape.centre[0] > 0 else 12
    x, y, z = shape.centre
    sinus = Ellipsoid((x + medial, y + 7, z), (13.0, 11.0, 25.0), shape.turn_deg, shape.tilt_deg)
    cortex = Tissue(contrast.kidney, 5.0, kind="kidney_cortex")
    medulla = Tissue(0.86 * contrast.kidney, 14.0, kind="kidney_medulla")
    pelvis = Ellipsoid((x + 0.9 * medial, y + 6, z), (6.0, 5.0, 15.0))
    strokes = [
        Stroke(shape, cortex, ripple_mm=0.8, organ=organ),
        Stroke(shape, medulla, inset_mm=8.0, ripple_mm=2.0, organ=organ),
        Stroke(sinus, SINUS_FAT, ripple_mm=2.5),
        Stroke(pelvis, Tissue(12.0, kind="urine"), ripple_mm=1.0),
    ]
    if rng.random() < 0.25:
        place: Point = (
            x - 1.6 * medial + jitter(rng, 6),
            y + jitter(rng, 18),
            z + jitter(rng, 30),
        )
        size = float(rng.uniform(5, 16))
        cyst = Ellipsoid(place, (size, size, size))
        strokes.append(Stroke(cyst, Tissue(6.0, kind="cyst"), organ=organ))
    return strokes


def _draw_trunks(rng: np.random.Generator, contrast: Contrast) -> list[Stroke]:
    wide = float(rng.uniform(0.88, 1.2))
    aorta = build_tube(
        (-10, 8, -260, 8.0 * wide),
        (-10, 10, -20, 10.0 * wide),
        (-12, 3, 110, 11.0 * wide),
        (-16, -4, 240, 11.5 * wide),
    )
    branches = (
        *build_tube((-10, 16, -16, 3.6), (-8, 32, -11, 3.4)),
        *build_tube(
            (-10, 16, -34, 3.6), (-6, 28, -58, 3.6), (-2, 32, -130, 3.0), (4, 36, -210, 2.0)
        ),
        *build_tube((-8, 10, -50, 3.0), (44, -28, -74, 2.6)),
        *build_tube((-12, 10, -48, 3.0), (-46, -28, -56, 2.6)),
    )
    veins = (
        *build_tube((22, 4, -74, 4.5), (48, -28, -80, 4.0)),
        *build_tube((18, 8, -60, 4.5), (-8, 20, -54, 4.5), (-46, -22, -56, 4.0)),
    )
    portal = (
        *build_tube((10, 30, -200, 3.5), (10, 29, -110, 5.0), (8, 30, -38, 6.5)),
        *build_tube((-88, -16, 6, 3.5), (-30, 20, -13, 4.4), (8, 30, -38, 5.5)),
    )
    bodies = (
        (veins, Tissue(contrast.cava - 8, kind="blood"), ""),
        (build_vena_cava(), Tissue(contrast.cava, 4.0, kind="blood"), "inferior_vena_cava"),
        (portal, Tissue(contrast.portal, 2.0, kind="blood"), "portal_vein"),
        (aorta, Tissue(contrast.aorta, 2.0, kind="blood"), "aorta"),
        (branches, Tissue(contrast.aorta, 2.0, kind="blood"), ""),
    )
    strokes: list[Stroke] = []
    for pieces, blood, organ in bodies:
        strokes += [Stroke(piece, blood, organ=organ) for piece in pieces]
    # Calcified plaques of the aorta.
    for _ in range(int(rng.integers(0, 6))):
        z, turn = rng.uniform(-200, 20), rng.uniform(0, 2 * np.pi)
        place = (float(-10 + 9 * wide * np.cos(turn)), float(9 + 9 * wide * np.sin(turn)), float(z))
        plaque = Tissue(620.0, kind="cortical_bone")
        strokes.append(Stroke(Ellipsoid(place, (2.0, 2.0, 4.0)), plaque, organ="aorta"))
    return strokes


def build_vena_cava() -> tuple[Cone, ...]:
    """Return the inferior vena cava, which is the same in all patients."""
    return build_tube(
        (20, 4, -260, 9.5),
        (21, 6, -60, 11.0),
        (25, 8, 20, 12.5),
        (14, 18, 62, 13.0),
        (4, 24, 90, 13.0),
    )
