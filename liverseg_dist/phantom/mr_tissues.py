"""Relaxation times and proton density of tissues at 3 T, for MR phantoms.

Sources of T1 and T2, by the letter in the table:

- B: de Bazelaire et al., Radiology 230:652 (2004), https://doi.org/10.1148/radiol.2303021331:
  in vivo at 3 T.
- S: Stanisz et al., Magn Reson Med 54:507 (2005), https://doi.org/10.1002/mrm.20605: blood,
  cartilage and spinal cord at 3 T.
- L: T1 of liver lesions before contrast agent, EJR Open (2020),
  https://doi.org/10.1016/j.ejro.2020.100312; T2 of hepatoma, metastasis and haemangioma,
  Radiology 155:421 (1985). T2 was measured at 0.35 T; it depends little on the field.
- A: assumed. Fluids have the T1 of cysts and a T2 that is long compared with every echo time. Walls
  of hollow organs, skin and fibrous capsules relax like muscle. Lung, cortical bone and stool only
  have to be dark. Focal nodular hyperplasia relaxes like hepatocellular carcinoma: their T1 does
  not differ significantly (Oncotarget 8:65435, 2017, https://doi.org/10.18632/oncotarget.18918).

Proton density is the number of hydrogen nuclei in a volume, relative to water: share of hydrogen by
mass times density, from ICRP Publication 110 (2009), Table B.1, and ICRU Report 44 (1989).
"""

from dataclasses import dataclass, replace

import numpy as np

WATER_HYDROGEN_G_PER_CM3 = 0.1119
T2_PRIME_MS = 50.0
"""Dephasing by the inhomogeneous field, 1/T2* = 1/T2 + 1/T2'. It gives the liver a T2* of 20 ms."""
LESION_SPREAD = 0.35
"""Factor of the published standard deviation of a lesion's T1. With the full one, the kinds of
lesions would overlap so much that no image could separate them."""


@dataclass(frozen=True)
class MrTissue:
    """MR properties of one tissue."""

    t1_ms: float
    t2_ms: float
    hydrogen_share: float
    """Share of hydrogen by mass."""
    density_g_per_cm3: float
    t1_sd_ms: float = 0.0
    """Standard deviation of T1 between patients."""
    flows: bool = False
    """Blood leaves the slice between the pulses of a spin echo."""
    spot: str = ""
    """Tissue of the spots that `Tissue.spot` describes for CT: vessels in fat, fat in muscle."""

    @property
    def proton_density(self) -> float:
        """Relative to water."""
        return self.hydrogen_share * self.density_g_per_cm3 / WATER_HYDROGEN_G_PER_CM3


MR_TISSUES = {
    "liver": MrTissue(809, 34, 0.102, 1.05, 71),  # B
    "spleen": MrTissue(1328, 61, 0.103, 1.04, 31),  # B
    "pancreas": MrTissue(725, 43, 0.105, 1.05, 71, spot="fat"),  # B
    "kidney_cortex": MrTissue(1142, 76, 0.103, 1.05, 60),  # B
    "kidney_medulla": MrTissue(1545, 81, 0.103, 1.05, 60),  # B
    "muscle": MrTissue(898, 29, 0.102, 1.05, 33, spot="fat"),  # B
    "fat": MrTissue(382, 68, 0.114, 0.95, 13, spot="blood"),  # B
    "marrow": MrTissue(586, 49, 0.105, 1.03, 73),  # B
    "blood": MrTissue(1932, 275, 0.102, 1.06, 85, flows=True),  # S
    "cartilage": MrTissue(1168, 27, 0.096, 1.10, 18),  # S
    "spinal_cord": MrTissue(993, 78, 0.107, 1.04, 47),  # S
    "hcc": MrTissue(1056, 59, 0.102, 1.05, 292 * LESION_SPREAD),  # L
    "metastasis": MrTissue(1757, 64, 0.102, 1.05, 723 * LESION_SPREAD),  # L
    "haemangioma": MrTissue(2524, 100, 0.102, 1.05, 908 * LESION_SPREAD),  # L
    "cyst": MrTissue(3793, 500, 0.112, 1.0, 207 * LESION_SPREAD),  # L, T2: A
    "nodular_hyperplasia": MrTissue(1056, 59, 0.102, 1.05, 292 * LESION_SPREAD),  # A
    "capsule": MrTissue(898, 29, 0.102, 1.05),  # A
    "necrosis": MrTissue(2500, 150, 0.105, 1.04),  # A
    "fatty_liver": MrTissue(700, 42, 0.104, 1.03),  # A
    "skin": MrTissue(898, 29, 0.100, 1.09),  # A
    "gut_wall": MrTissue(898, 29, 0.105, 1.04),  # A
    "gut_fluid": MrTissue(3793, 500, 0.112, 1.0),  # A
    "stomach_content": MrTissue(2000, 200, 0.110, 1.0, spot="gas"),  # A
    "stool": MrTissue(700, 50, 0.105, 0.8, spot="gas"),  # A
    "bile": MrTissue(3000, 500, 0.108, 1.03, 400),  # A
    "urine": MrTissue(3793, 500, 0.110, 1.0),  # A
    "lung": MrTissue(1200, 15, 0.103, 0.26, spot="blood"),  # A
    "cortical_bone": MrTissue(250, 0.4, 0.035, 1.92),  # A
    "gas": MrTissue(1000, 1.0, 0.0, 0.0012),
}


def draw_patient_tissues(rng: np.random.Generator) -> dict[str, MrTissue]:
    """Draw the tissues of one patient: T1 varies by its standard deviation, at most by two."""
    drawn = {}
    for name, tissue in MR_TISSUES.items():
        # Drawn also where the deviation is 0, so that the stream is the same for each table.
        deviation = float(np.clip(rng.normal(), -2, 2))
        t1_ms = tissue.t1_ms + deviation * tissue.t1_sd_ms
        drawn[name] = replace(tissue, t1_ms=t1_ms)
    return drawn
