"""Settings of sliding-window inference (`inference.*`).

Thresholding and post-processing are set by structure, either for all structures they apply to
(`min_volume_ml: 0.1`) or by name (`min_volume_ml: {tumour: 0.1}`). `inference.structure_settings`
resolves them for the labels of a run.
"""

from typing import Annotated, Literal

from pydantic import Field

from liverseg_dist.config.base import Section

Threshold = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class InferenceConfig(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Fraction of a window that overlaps with its neighbour, per axis."""
    window_weights: Literal["gaussian", "constant"] = "gaussian"
    """Weight of a voxel in the average over windows: highest at the window's centre, or
    constant."""
    padding: Literal["lowest", "mean"] = "lowest"
    """Around a scan that is smaller than a window. lowest: the lowest value of the normalisation,
    as in training; mean: 0 after it, as nnU-Net."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over windows, mirrored copies and models; logits: as nnU-Net, and faster."""
    mirror: bool = False
    """Average over copies mirrored along the axes that training mirrored (all three: 8 copies, 8
    times slower)."""
    batch_size: int = Field(default=1, ge=1)
    """Windows computed in one batch."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the network; tf32: fp32 with NVIDIA's TF32 matrix products, on a CPU the same as
    fp32."""
    lesion_threshold: Threshold | dict[str, Threshold] = 0.0
    """Inside its organ a voxel is lesion from this probability on; 0: where the lesion is the most
    likely class. One number for every lesion structure, or {NAME: number}."""
    largest_component: bool | tuple[str, ...] = False
    """Keep only the largest connected part of an organ (with its lesions). true: each organ that
    contains lesions (each organ where none does), or a list of names."""
    fill_holes: bool | tuple[str, ...] = False
    """Background enclosed by an organ becomes organ; enclosed only by a lesion, it becomes lesion.
    true or a list of names, as for largest_component."""
    reach_mm: NonNegative | dict[str, NonNegative | None] | None = None
    """Remove lesions further than this from predicted tissue of their organ. With largest_component
    the distance is from the kept organ, so detached lesions near it are kept. null: no limit. One
    number for every lesion inside an organ, or {NAME: number}."""
    cut_mm: NonNegative | dict[str, NonNegative | None] | None = None
    """Remove the part of a lesion that is further than this outside its organ; the rest is kept. A
    voxel is inside if tissue of the organ encloses it in an axial, coronal or sagittal slice. null:
    no limit. One number, or {NAME: number}."""
    min_volume_ml: NonNegative | dict[str, NonNegative] = 0.0
    """Remove connected parts smaller than this: a number for every lesion structure, or {NAME:
    number} for any structure. A small lesion becomes tissue of its organ."""
