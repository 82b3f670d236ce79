"""Initialisation from existing weights: a run folder, a safetensors file, an external state dict or
a result folder of nnU-Net v2.

Only tensors and numbers are unpickled (`torch_files`). Parameters without a fitting tensor keep their
random initialisation; the report lists which tensors were used.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Size, Tensor, nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.model.external_weights import external_parameter_names
from liverseg_dist.model.nnunet_folder import NO_LICENCE, NnunetFolder, is_nnunet_folder
from liverseg_dist.model.torch_files import read_torch_file

_logger = logging.getLogger(__name__)
PREFIXES = ("module.", "_orig_mod.", "network.", "model.", "backbone.")
NESTED = ("state_dict", "network_weights", "model_state_dict", "model", "net")
OTHER_NETWORKS = (
    ("conv_blocks_context.0.0.conv1.", "STU-Net"),
    ("conv_blocks_context.0.blocks.0.", "nnU-Net v1 (Generic_UNet)"),
    ("swinViT.", "SwinUNETR (MONAI, SuPreM)"),
    ("down_tr64.", "the 3D U-Net of Models Genesis and SuPreM"),
    ("convInit.", "SegResNet (MONAI, SuPreM)"),
    ("encoder.conv_init.", "SegResNetDS (MONAI, CT-FM)"),
    ("conv_init.", "the encoder of SegResNetDS (MONAI, CT-FM)"),
    ("enc_block_0.", "MedNeXt"),
)
"""Start of the name of a tensor, and the network that has such a tensor."""


@dataclass
class PretrainedReport:
    """Which parameters were initialised from the file."""

    source: Path
    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    """Convolutions that were adapted to other channels or dimensions."""
    missing: list[str] = field(default_factory=list)
    """Parameters without a fitting tensor in the file."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the file without a parameter."""
    licence: str | None = None
    """Licence of the data that the weights were trained on; None: not known for such files."""

    def __str__(self) -> str:
        text = (
            f"pretrained {self.source}: {len(self.matched)} tensors loaded, "
            f"{len(self.adapted)} adapted"
        )
        if self.missing:
            names = ", ".join(self.missing[:4]) + (", ..." if len(self.missing) > 4 else "")
            text += f", {len(self.missing)} not in the file ({names})"
        if self.unused:
            text += f", {len(self.unused)} of the file not used"
        if self.licence:
            text += f"; licence of its training data: {self.licence}"
        return text


def apply_nnunet_settings(config: ModelConfig) -> ModelConfig:
    """Return the settings with the network of `model.pretrained`, if that is a folder of nnU-Net.

    Raises:
        UserError: the folder cannot be used.
    """
    if config.pretrained is None or not is_nnunet_folder(config.pretrained):
        return config
    values = NnunetFolder.open(config.pretrained).list_model_settings()
    for key, value in values.items():
        if key in config.model_fields_set and getattr(config, key) != value:
            _logger.warning("model.%s is %s, as in %s", key, value, config.pretrained)
    return config.model_copy(update=values)


def load_initial_weights(model: nn.Module, config: ModelConfig) -> PretrainedReport:
    """Copy the weights of `model.pretrained` into a model.

    Args:
        model: is changed in place.
        config: settings `model.*` with the topology filled in.

    Raises:
        UserError: the weights cannot be read, or are of another network.
    """
    assert config.pretrained is not None
    if is_nnunet_folder(config.pretrained):
        folder = NnunetFolder.open(config.pretrained)
        report = copy_tensors(model, folder.rename_tensors(config), folder.checkpoint)
        report.licence = folder.licence or NO_LICENCE
        return report
    kind = config.pretrained_names
    names = None if kind == "ours" else external_parameter_names(kind, config)
    return load_pretrained(model, config.pretrained, names)


def load_pretrained(
    model: nn.Module, path: Path, names: Mapping[str, str] | None = None
) -> PretrainedReport:
    """Copy the tensors of a file that fit into a model.

    Args:
        model: is changed in place.
        path: a run folder, a .safetensors file, or a torch file of tensors.
        names: table from the file's name of a tensor to the model's name (`external_weights`).

    Raises:
        UserError: the file is not readable, no tensor fits, or most tensors have other shapes.
    """
    source = read_tensors(path)
    if names is not None:
        source = {names.get(name, name): tensor for name, tensor in source.items()}
    return copy_tensors(model, source, path)


def copy_tensors(model: nn.Module, source: dict[str, Tensor], path: Path) -> PretrainedReport:
    """Copy the tensors that fit into a model.

    Args:
        model: is changed in place.
        source: tensors by the model's names; is emptied.
        path: where they come from, for messages.

    Raises:
        UserError: no tensor fits, or most tensors have other shapes.
    """
    report = PretrainedReport(path)
    target = model.state_dict()
    mismatches: list[str] = []
    for name, tensor in target.items():
        # What remains in `source` afterwards was not used.
        found = source.pop(name, None)
        if found is None:
            report.missing.append(name)
        elif found.shape == tensor.shape:
            tensor.copy_(found)
            report.matched.append(name)
        elif (adapted := adapt_kernel(found, tensor.shape)) is not None:
            tensor.copy_(adapted)
            report.adapted.append(name)
        else:
            report.missing.append(name)
            mismatches.append(
                f"{name} has shape {list(found.shape)} in the file and "
                f"{list(tensor.shape)} in the model"
            )
    report.unused = sorted(source)
    if not report.matched and not report.adapted:
        if (project := name_other_network(report.unused)) is not None:
            raise UserError(
                f"{path}: these are weights of {project}, a network that this program does not have"
            )
        raise UserError(
            f"{path}: none of the {len(report.unused)} tensors fits this network; "
            "check the settings model.*"
        )
    # A few mismatches are normal (other classes); many mean that it is another architecture.
    if len(mismatches) > len(report.matched) + len(report.adapted):
        raise UserError(
            f"{path}: the weights are of another network: {mismatches[0]}, and others; "
            "set model.features, model.kernels and model.blocks_per_level to those of that network"
        )
    return report


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors by name; prefixes of wrapper modules are removed.

    Args:
        path: a run folder, a .safetensors file, or a torch file of tensors.

    Raises:
        UserError: the file is missing, not readable, or contains more than tensors.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; set model.pretrained to a run folder, a .safetensors file or a "
            "state dict"
        )
    tensors = _load_safetensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
    # Trainers store the weights below different keys.
    for key in NESTED:
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
            break
    if not isinstance(tensors, dict):
        raise UserError(f"{file}: not a state dict; save a dictionary of tensors")
    result = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            result[_strip_prefixes(name)] = value
    return result


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not readable as weights: {' '.join(str(error).split())[:200]}"
        ) from None


def adapt_kernel(found: Tensor, shape: Size) -> Tensor | None:
    """Adapt a convolution weight to other input channels or dimensions; None: not possible.

    2D to 3D: the kernel is repeated along z and divided by its length, so that a constant volume
    gives the 2D result (inflation, https://arxiv.org/abs/1705.07750). Other input channels: the
    mean over channels, scaled so that the sum stays the same. A larger kernel of a depthwise
    convolution: trilinear interpolation (UpKern, https://arxiv.org/abs/2303.09975).
    """
    if _is_smaller_kernel(found, shape):
        return F.interpolate(found, tuple(shape[2:]), mode="trilinear")
    # A 2D kernel (out, in, y, x) for a 3D convolution (out, in, z, y, x).
    if found.dim() == 4 and len(shape) == 5:
        found = found.unsqueeze(2).repeat(1, 1, shape[2], 1, 1) / shape[2]
    if (
        found.dim() != len(shape)
        or found.dim() < 2
        or found.shape[0] != shape[0]
        or found.shape[2:] != shape[2:]
    ):
        return None
    if found.shape[1] != shape[1]:
        repeats = [1] * found.dim()
        repeats[1] = shape[1]
        found = found.sum(dim=1, keepdim=True).repeat(*repeats) / shape[1]
    return found


def _is_smaller_kernel(found: Tensor, shape: Size) -> bool:
    """Whether a tensor is a depthwise kernel (out, 1, z, y, x) with smaller edges than `shape`."""
    is_depthwise = found.dim() == len(shape) == 5 and found.shape[1] == shape[1] == 1
    if not is_depthwise or found.shape[0] != shape[0] or found.shape == shape:
        return False
    pairs = zip(found.shape[2:], shape[2:], strict=True)
    return all(1 < before <= now for before, now in pairs)


def name_other_network(names: Collection[str]) -> str | None:
    """Return the network, of those of `OTHER_NETWORKS`, that has tensors of these names."""
    for start, project in OTHER_NETWORKS:
        if any(name.startswith(start) for name in names):
            return project
    return None


def _strip_prefixes(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name
