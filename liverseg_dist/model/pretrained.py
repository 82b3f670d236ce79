"""Start from weights that exist: a run of ours, a safetensors file, or a foreign state dict of tensors.

Nothing is unpickled but tensors (`weights_only=True`). What does not fit stays at its fresh start, and the report says
what was taken and what was not.
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
    """Parameter names by what became of them."""

    source: Path
    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"pretrained {self.source}: {len(self.matched)} tensors taken, {len(self.adapted)} adapted"
        if self.missing:
            text += f", {len(self.missing)} left fresh ({', '.join(self.missing[:4])}{', ...' * (len(self.missing) > 4)})"
        return text + (f", {len(self.unused)} of the file not used" if self.unused else "")


def load_pretrained(
    model: nn.Module, path: Path, names: Mapping[str, str] | None = None
) -> PretrainedReport:
    """Copy what fits into `model`; `names`: the file's name of a tensor -> ours (`model.foreign`).

    Raises `UserError` when the file is unreadable, nothing fits, or most of it has other shapes.
    """
    source = read_tensors(path)
    if names is not None:
        source = {names.get(name, name): tensor for name, tensor in source.items()}
    report = PretrainedReport(path)
    target = model.state_dict()
    unlike: list[str] = []
    for name, tensor in target.items():
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
            unlike.append(f"{name} is {list(found.shape)} there, {list(tensor.shape)} here")
    report.unused = sorted(source)
    if not report.matched and not report.adapted:
        raise UserError(
            f"{path}: none of its {len(report.unused)} tensors fits this network; check model.* settings"
        )
    if len(unlike) > len(report.matched) + len(report.adapted):
        raise UserError(
            f"{path}: of another network: {unlike[0]}, and so on; give its model.features, kernels, blocks"
        )
    return report


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, wrappers' prefixes removed. `path`: a run folder, .safetensors, or a torch file of tensors."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file}: no such weights; model.pretrained takes a run folder, .safetensors or a state dict"
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
    except Exception as error:  # the unpickler's refusal of anything but tensors
        raise UserError(
            f"{file}: holds more than tensors, which is never loaded ({type(error).__name__}). If you trust it, save "
            "its tensors alone: torch.save(torch.load(FILE, weights_only=False)['network_weights'], 'weights.pt')"
        ) from None
    for key in NESTED:
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
            break
    if not isinstance(tensors, dict):
        raise UserError(f"{file}: not a state dict")
    return {_bare(name): value for name, value in tensors.items() if isinstance(value, Tensor)}


def adapt_kernel(found: Tensor, shape: torch.Size) -> Tensor | None:
    """A convolution weight for other channels or dimensions, or None.

    2D to 3D: the kernel is repeated along z and divided by its length, so that a constant volume gives the 2D answer
    (inflation, https://arxiv.org/abs/1705.07750). Other input channels: the mean over channels, scaled to keep the sum.
    """
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
        found = (
            found.sum(dim=1, keepdim=True).repeat(1, shape[1], *([1] * (found.dim() - 2)))
            / shape[1]
        )
    return found


def _bare(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name
