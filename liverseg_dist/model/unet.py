"""The 3D U-Net, plain, with a residual encoder or of MedNeXt blocks, with deep supervision.

It is a plain `nn.Module` without any dependence on ranks. https://arxiv.org/abs/1606.06650 (3D
U-Net), https://www.nature.com/articles/s41592-020-01008-z (the form of it that nnU-Net uses).
"""

from collections.abc import Collection

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liverseg_dist.config import ModelConfig
from liverseg_dist.model.activation_recompute import keep_storage, recompute_in_backward
from liverseg_dist.model.architectures import find_architecture
from liverseg_dist.model.convolution import Head
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import size_multiple


class UNet(nn.Module):
    """Network from images to logits.

    Args:
        config: settings `model.*` whose features, strides, kernels and blocks are filled in
            (`topology.resolve_topology`). `in_channels` and `out_channels` may be null: one channel
            and the outputs of LiTS.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.features or not config.strides:
            raise ValueError(
                "the topology of the settings is not filled in; "
                "call topology.resolve_topology first"
            )
        features = config.features
        self.num_levels = len(features)
        self.size_multiple = size_multiple(config.strides)
        self.deep_supervision = config.deep_supervision
        self._checkpointed: frozenset[int] = frozenset()
        architecture = find_architecture(config)
        self.in_channels = config.in_channels or 1
        self.out_channels = config.out_channels or OutputChannels(regions=config.regions).count
        encoder = []
        for level in range(self.num_levels):
            encoder.append(architecture.build_encoder_level(config, level))
        self.encoder = nn.ModuleList(encoder)
        decoder = []
        for level in range(self.num_levels - 1):
            decoder.append(architecture.build_decoder_level(config, level))
        self.decoder = nn.ModuleList(decoder)
        # All levels but the two lowest, where a voxel covers too much tissue to be supervised.
        supervised = max(1, self.num_levels - 2) if config.deep_supervision else 1
        self.heads = nn.ModuleList(Head(features[i], self.out_channels) for i in range(supervised))
        if architecture.initialise is not None:
            self.apply(architecture.initialise)

    def set_checkpointing(self, levels: Collection[int]) -> None:
        """Choose the levels whose activations are recomputed in backward.

        Args:
            levels: numbers of levels, 0 is the full resolution.

        Raises:
            ValueError: a level does not exist.
        """
        unknown = [level for level in levels if not 0 <= level < self.num_levels]
        if unknown:
            raise ValueError(
                f"levels {unknown} do not exist; this network has 0 to {self.num_levels - 1}"
            )
        self._checkpointed = frozenset(levels)

    def modules_from_output(self) -> list[nn.Module]:
        """Return the modules by their distance from the output, the nearest first.

        That is heads, decoder from the top down, encoder from the bottom up.
        """
        return [self.heads, *self.decoder, *reversed(list(self.encoder))]

    def shard_groups(self) -> list[nn.Module]:
        """Return the modules that FSDP gathers one at a time."""
        return [*self.encoder, *self.decoder]

    def forward(self, image_BCDHW: Tensor) -> Tensor | list[Tensor]:
        """Compute logits (B, C, D, H, W).

        In training mode with deep supervision it returns a list of them, full resolution first.
        """
        skips: list[Tensor] = []
        x = image_BCDHW
        for level, stage in enumerate(self.encoder):
            x = self._run_stage(level, stage, x)
            skips.append(x)
        # The lowest level has no skip: its output is the decoder's input.
        skips.pop()
        supervise = self.training and self.deep_supervision
        outputs: list[Tensor] = []
        for level in range(self.num_levels - 2, -1, -1):
            x = self._run_stage(level, self.decoder[level], x, skips.pop())
            if level == 0 or (supervise and level < len(self.heads)):
                outputs.insert(0, self.heads[level](x))
        if self.num_levels == 1:
            # A network with one level has no decoder.
            outputs.append(self.heads[0](x))
        return outputs if supervise and len(self.heads) > 1 else outputs[0]

    def _run_stage(self, level: int, stage: nn.Module, *inputs: Tensor) -> Tensor:
        if level in self._checkpointed and self.training:
            # Checkpointing stores the stage's inputs; they can be recomputed as well.
            with recompute_in_backward(*inputs):
                return keep_storage(checkpoint(stage, *inputs, use_reentrant=False))
        out: Tensor = stage(*inputs)
        return out
