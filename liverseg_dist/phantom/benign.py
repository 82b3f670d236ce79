"""Benign liver lesions that look like tumours in one modality only. They are not labelled tumour.

- Haemangiomas and cysts with protein-rich fluid have the HU of tumours in portal-venous CT, but a
  much longer T1 and T2: they are darker than tumours in T1-weighted and brighter in T2-weighted MR.
- Focal nodular hyperplasia has the HU of the liver in portal-venous CT, where it cannot be seen,
  and the T1 and T2 of hepatocellular carcinoma (see `mr_tissues`).

A network that sees both modalities can separate them from tumours; one with a single modality
cannot.
"""

from dataclasses import replace

import numpy as np

from liverseg_dist.phantom.anatomy import Patient, measure_liver
from liverseg_dist.phantom.shapes import Ellipsoid, Waves
from liverseg_dist.phantom.tumours import GAP_MM, LiverSamples, Tumour

KINDS = {"haemangioma": 0.4, "cyst": 0.2, "nodular_hyperplasia": 0.4}
"""Kinds and their frequencies."""
TUMOUR_LIKE_HU = (-62.0, -34.0)
"""Contrast to the liver, as that of dark tumours in easy cases."""
ISODENSE_HU = (-3.0, 3.0)
RADIUS_SHARE = 0.7
"""Benign lesions are smaller than the largest tumours: they need space between them."""
MAX_ATTEMPTS = 200


def add_benign_lesions(
    rng: np.random.Generator, patient: Patient, wanted: int, diameter_mm: tuple[float, float]
) -> Patient:
    """Return the patient with up to `wanted` benign lesions, apart from tumours and each other.

    Args:
        rng: random generator.
        patient: the patient with its tumours.
        wanted: number of lesions; fewer if the liver has no space for them.
        diameter_mm: smallest and largest diameter of a tumour of the set.
    """
    _, samples = measure_liver(patient)
    found: list[Tumour] = []
    for _ in range(MAX_ATTEMPTS):
        if len(found) == wanted:
            break
        lesion = _draw_lesion(rng, samples, diameter_mm)
        if lesion is not None and _is_apart(lesion, [*patient.tumours, *found]):
            found.append(lesion)
    return replace(patient, benign=tuple(found))


def _draw_lesion(
    rng: np.random.Generator, samples: LiverSamples, diameter_mm: tuple[float, float]
) -> Tumour | None:
    """Draw a lesion at a random position in the liver; None: it would not lie inside."""
    least, most = diameter_mm[0] / 2, RADIUS_SHARE * diameter_mm[1] / 2
    radius = float(rng.uniform(np.sqrt(least), np.sqrt(most))) ** 2
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    contrast = rng.uniform(*(ISODENSE_HU if kind == "nodular_hyperplasia" else TUMOUR_LIKE_HU))
    stretch = rng.uniform(0.85, 1.18, 3)
    radii = (radius * stretch / stretch.prod() ** (1 / 3)).tolist()
    lump_mm = float(rng.uniform(0.03, 0.08)) * radius
    lumps = Waves.draw_random(rng, (radius, 2.4 * radius), lump_mm, 5)
    which = int(rng.integers(len(samples.positions)))
    if samples.depth_mm[which] < 0.7 * radius:
        return None
    x, y, z = samples.positions[which].tolist()
    return Tumour(
        ball=Ellipsoid((x, y, z), (radii[0], radii[1], radii[2]), float(rng.uniform(0, 180))),
        lumps=lumps,
        contrast_hu=float(contrast),
        grain_hu=float(rng.uniform(2, 5)),
        edge_mm=float(rng.uniform(0.5, 2.5)),
        rim_hu=0.0,
        core_hu=None,
        core_share=0.0,
        kind=kind,
    )


def _is_apart(lesion: Tumour, others: list[Tumour]) -> bool:
    """Whether a lesion has a gap to all others, so that no label changes."""
    for other in others:
        between = np.linalg.norm(np.subtract(lesion.ball.centre, other.ball.centre))
        # 1.3: the largest radius of an ellipsoid relative to its mean radius.
        if between < 1.3 * (lesion.radius_mm + other.radius_mm) + GAP_MM:
            return False
    return True
