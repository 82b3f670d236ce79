"""The smallest complete settings of a run: two levels, four channels."""

from liverseg_dist.config import IntensityConfig, Settings, load_settings
from liverseg_dist.model.topology import resolve_topology


def small_settings() -> Settings:
    settings = load_settings(
        [],
        [
            "model.features=[2,4]",
            "model.strides=[[1,1,1],[2,2,2]]",
            "model.kernels=[[3,3,3],[3,3,3]]",
            "model.blocks_per_level=1",
            "model.deep_supervision=false",
            "data.patch_size=[16,16,16]",
        ],
    )
    intensity = IntensityConfig(lower_hu=-100, upper_hu=240, mean=0.5, std=0.2)
    data = settings.data.model_copy(update={"spacing_mm": (2.0, 1.5, 1.5), "intensity": intensity})
    return settings.model_copy(
        update={
            "data": data,
            "model": resolve_topology(settings.model, data.patch_size, (2.0, 1.5, 1.5)),
        }
    )
