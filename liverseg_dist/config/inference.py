"""Settings of sliding-window inference (`inference.*`)."""

from typing import Annotated, Literal

from pydantic import Field

from liverseg_dist.config.base import Section


class InferenceConfig(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window that neighbours cover too."""
    window_weights: Literal["gaussian", "constant"] = "gaussian"
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over overlapping windows, mirrored copies and models; logits: as nnU-Net, and the cheaper."""
    mirror: bool = False
    """Average over copies mirrored along the axes that training mirrored (all three: 8 copies, 8 times slower)."""
    batch_size: int = Field(default=1, ge=1)
    """Windows computed at once."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of the network; tf32 is fp32 with NVIDIA's shorter products, and nothing else on a CPU."""
    tumour_threshold: float = Field(default=0.0, ge=0, lt=1)
    """Inside the liver a voxel is tumour from this probability on; 0: where tumour is the most likely class."""
    largest_component: bool = False
    """Keep only the largest connected liver (with its tumours)."""
    fill_holes: bool = False
    """Background that the liver encloses becomes liver (tumour, where only tumour encloses it)."""
    tumour_reach_mm: float | None = Field(default=None, ge=0)
    """Drop tumours further than this from predicted liver tissue; with largest_component from the kept liver, whose
    near but detached tumours then stay. null: no limit."""
    tumour_cut_mm: float | None = Field(default=None, ge=0)
    """Cut off what tumours at the liver's edge have further than this outside it; the rest of them stays. Inside is
    what liver tissue encloses in an axial, coronal or sagittal slice. null: no limit."""
    min_tumour_ml: float = Field(default=0.0, ge=0)
    """Drop predicted tumour components smaller than this."""
