"""The 3D U-Net, plain or with a residual encoder, with deep supervision. A plain `nn.Module` that knows no rank.

https://arxiv.org/abs/1606.06650 (3D U-Net), https://www.nature.com/articles/s41592-020-01008-z (nnU-Net's form of it).
"""

from collections.abc import Collection

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liverseg_dist.config import ModelConfig
from liverseg_dist.labels import NUM_CLASSES
from liverseg_dist.model.activation_recompute import keep_storage, recompute_in_backward
from liverseg_dist.model.blocks import SLOPE, ConvBlock, DecoderLevel, ResidualBlock, build_stack
from liverseg_dist.model.convolution import Head
from liverseg_dist.model.topology import size_multiple


class UNet(nn.Module):
    """Logits (B, C, D, H, W); in training mode with deep supervision a list of them, full resolution first.

    Needs a config whose features, strides, kernels and blocks are filled in (`topology.resolve_topology`).
    """

    def __init__(self, config: ModelConfig, in_channels: int = 1) -> None:
        super().__init__()
        if not (
            config.features
            and config.strides
            and config.kernels
            and isinstance(config.blocks_per_level, tuple)
        ):
            raise ValueError("the config's topology is not filled in; call topology.resolve first")
        features, strides, kernels = config.features, config.strides, config.kernels
        self.num_levels = len(features)
        self.size_multiple = size_multiple(strides)
        self.deep_supervision = config.deep_supervision
        self._checkpointed: frozenset[int] = frozenset()
        encoder_block = ResidualBlock if config.architecture == "resenc" else ConvBlock
        inside = in_channels
        encoder = []
        for level, (width, kernel, stride) in enumerate(
            zip(features, kernels, strides, strict=True)
        ):
            blocks = config.blocks_per_level[level]
            encoder.append(
                build_stack(encoder_block, inside, width, kernel, stride, config.norm, blocks)
            )
            inside = width
        self.encoder = nn.ModuleList(encoder)
        # A residual encoder goes with one convolution per decoder level (ResEnc U-Net); a plain one mirrors it.
        decoder_blocks = [
            1 if config.architecture == "resenc" else n for n in config.blocks_per_level
        ]
        self.decoder = nn.ModuleList(
            DecoderLevel(
                features[i + 1],
                features[i],
                kernels[i],
                strides[i + 1],
                config.norm,
                decoder_blocks[i],
                config.upsampling_bias,
            )
            for i in range(self.num_levels - 1)
        )
        outputs = 2 if config.regions else NUM_CLASSES
        supervised = max(1, self.num_levels - 2) if config.deep_supervision else 1
        self.heads = nn.ModuleList(Head(features[i], outputs) for i in range(supervised))
        self.apply(_initialise)

    def set_checkpointing(self, levels: Collection[int]) -> None:
        """Levels (0: full resolution) whose activations are computed again in backward instead of being kept."""
        unknown = [level for level in levels if not 0 <= level < self.num_levels]
        if unknown:
            raise ValueError(
                f"levels {unknown} do not exist; this network has 0 to {self.num_levels - 1}"
            )
        self._checkpointed = frozenset(levels)

    def by_distance(self) -> list[nn.Module]:
        """Heads, decoder from the top down, encoder from the bottom up: what lies further from the output is later."""
        return [self.heads, *self.decoder, *reversed(list(self.encoder))]

    def shard_groups(self) -> list[nn.Module]:
        """Modules that FSDP gathers one at a time."""
        return [*self.encoder, *self.decoder]

    def forward(self, image_BCDHW: Tensor) -> Tensor | list[Tensor]:
        skips: list[Tensor] = []
        x = image_BCDHW
        for level, stage in enumerate(self.encoder):
            x = self._run(level, stage, x)
            skips.append(x)
        skips.pop()
        supervise = self.training and self.deep_supervision
        outputs: list[Tensor] = []
        for level in range(self.num_levels - 2, -1, -1):
            x = self._run(level, self.decoder[level], x, skips.pop())
            if level == 0 or (supervise and level < len(self.heads)):
                outputs.insert(0, self.heads[level](x))
        if self.num_levels == 1:
            outputs.append(self.heads[0](x))
        return outputs if supervise and len(self.heads) > 1 else outputs[0]

    def _run(self, level: int, stage: nn.Module, *inputs: Tensor) -> Tensor:
        if level in self._checkpointed and self.training:
            with recompute_in_backward(*inputs):
                return keep_storage(checkpoint(stage, *inputs, use_reentrant=False))
        out: Tensor = stage(*inputs)
        return out


def _initialise(module: nn.Module) -> None:
    """He initialisation for the leaky ReLU; heads and biases start at small and zero values."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
