"""Settings of sliding-window inference (`inference.*`)."""

from typing import Annotated, Literal

from pydantic import Field

from liverseg_dist.config.base import Section


class InferenceConfig(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Fraction of a window that overlaps with its neighbour, per axis."""
    window_weights: Literal["gaussian", "constant"] = "gaussian"
    """Weight of a voxel in the average over windows: highest at the window's centre, or
    constant."""
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
    tumour_threshold: float = Field(default=0.0, ge=0, lt=1)
    """Inside the liver a voxel is tumour from this probability on; 0: where tumour is the most
    likely class."""
    largest_component: bool = False
    """Keep only the largest connected liver (with its tumours)."""
    fill_holes: bool = False
    """Background enclosed by liver becomes liver; enclosed only by tumour, it becomes tumour."""
    tumour_reach_mm: float | None = Field(default=None, ge=0)
    """Remove tumours further than this from predicted liver tissue. With largest_component the
    distance is from the kept liver, so detached tumours near it are kept. null: no limit."""
    tumour_cut_mm: float | None = Field(default=None, ge=0)
    """Remove the part of a tumour that is further than this outside the liver; the rest is kept. A
    voxel is inside if liver tissue encloses it in an axial, coronal or sagittal slice. null: no
    limit."""
    min_tumour_ml: float = Field(default=0.0, ge=0)
    """Remove predicted tumour components smaller than this."""
