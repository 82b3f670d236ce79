"""Initialisation from existing weights: a run folder, a safetensors file or an external state dict.

Only tensors are unpickled (`weights_only=True`). Parameters without a fitting tensor keep their
random initialisation; the report lists which tensors were used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from liverseg_dist.errors import UserError

PREFIXES = ("module.", "_orig_mod.", "network.", "model.")
NESTED = ("state_dict", "network_weights", "model_state_dict", "model")


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
        return text


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
    try:
        tensors = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, "cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise UserError(
            f"{file}: not readable as weights: {' '.join(str(error).split())[:200]}"
        ) from None
    # The unpickler raises several types when it refuses anything but tensors.
    except Exception as error:
        raise UserError(
            f"{file}: contains more than tensors, which is never loaded ({type(error).__name__}). "
            "If you trust it, save only its tensors: torch.save(torch.load(FILE, "
            "weights_only=False)['network_weights'], 'weights.pt')"
        ) from None
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


def adapt_kernel(found: Tensor, shape: torch.Size) -> Tensor | None:
    """Adapt a convolution weight to other input channels or dimensions; None: not possible.

    2D to 3D: the kernel is repeated along z and divided by its length, so that a constant volume
    gives the 2D result (inflation, https://arxiv.org/abs/1705.07750). Other input channels: the
    mean over channels, scaled so that the sum stays the same.
    """
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


def _strip_prefixes(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name
