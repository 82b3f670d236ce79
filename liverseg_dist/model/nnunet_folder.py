"""A result folder of nnU-Net v2 (`Dataset003_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres`).

`plans.json` describes preprocessing and network, `dataset.json` channels and labels, and each
`fold_*` has checkpoints. A checkpoint is a pickle with more than tensors, so it is read with
PyTorch's restricted unpickler (`read_torch_file`). nnU-Net may move the coarsest axis to the front
(`transpose_forward`); here everything is in the order of its files, z, y, x. Used by `pretrained`
and by `inference.nnunet_run`.

Format: https://github.com/MIC-DKFZ/nnUNet, `PlansManager` and `nnUNetTrainer.save_checkpoint`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError, printable
from liverseg_dist.model.external_weights import external_parameter_names
from liverseg_dist.model.nnunet_network import list_network_settings
from liverseg_dist.model.torch_files import read_torch_file
from liverseg_dist.texts.structured import read_json

PLANS, DATASET = "plans.json", "dataset.json"
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
"""In the order in which they are looked for; nnU-Net predicts with the first."""
COPIES = ("decoder.encoder.", ".all_modules.")
"""Parts of the names of tensors that nnU-Net's modules list a second time."""
NO_LICENCE = "not stated in dataset.json; ask the publisher of the weights"
CASCADE_KEY = "previous_stage"
NUM_AXES = 3
Axes = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class NnunetFolder:
    """A trained network of nnU-Net.

    Attributes:
        root: the folder with `plans.json`.
        checkpoint: the file of the weights.
        plans: content of `plans.json`.
        dataset: content of `dataset.json`.
        configuration_name: for example 3d_fullres.
        configuration: its part of the plans, with what it inherits.
        trainer: name of the trainer's class.
        mirror_axes: axes of z, y, x along which the training mirrored.
        file_axes: for each axis of z, y, x its number in the plans (`transpose_backward`).
        tensors: weights in nnU-Net's axis order, by nnU-Net's names.
    """

    root: Path
    checkpoint: Path
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    configuration_name: str
    configuration: Mapping[str, Any]
    trainer: str
    mirror_axes: tuple[int, ...]
    file_axes: Axes
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> "NnunetFolder":
        """Read a result folder, or one of its `fold_*`.

        Raises:
            UserError: it has several folds, a file is missing or cannot be read, or the network is
                not a 3D network of one stage.
        """
        root, checkpoint = _find_checkpoint(path)
        plans, dataset = _read_object(root / PLANS), _read_object(root / DATASET)
        content = read_torch_file(checkpoint)
        try:
            name = str(content["init_args"]["configuration"])
            weights = content["network_weights"].items()
            tensors = {key: value for key, value in weights if isinstance(value, Tensor)}
            # Earlier versions did not record the axes; all were mirrored then.
            mirrored = content.get("inference_allowed_mirroring_axes", range(NUM_AXES)) or ()
            backward = tuple(int(axis) for axis in plans["transpose_backward"])
            forward = tuple(int(axis) for axis in plans["transpose_forward"])
            mirror_axes = tuple(sorted(forward[axis] for axis in mirrored))
            trainer = str(content["trainer_name"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"{checkpoint}: not a checkpoint of nnU-Net v2 with {PLANS} ({error!r})"
            ) from None
        configuration = _find_configuration(plans, name, root / PLANS)
        if sorted(backward) != list(range(NUM_AXES)) or [forward[axis] for axis in backward] != [
            *range(NUM_AXES)
        ]:
            raise UserError(
                f"{root / PLANS}: transpose_forward {list(forward)} and transpose_backward "
                f"{list(backward)} are not the inverse of each other"
            )
        z, y, x = backward
        return cls(
            root, checkpoint, plans, dataset, name, configuration, trainer, mirror_axes, (z, y, x),
            tensors,
        )  # fmt: skip

    @property
    def licence(self) -> str | None:
        """The licence of the training data as `dataset.json` states it, or None."""
        for key in ("licence", "license"):
            if isinstance(self.dataset.get(key), str) and self.dataset[key].strip():
                return printable(self.dataset[key].strip())
        return None

    @property
    def name(self) -> str:
        """Data set, configuration and trainer, for messages."""
        dataset = printable(str(self.plans.get("dataset_name", self.root.parent.name)))
        return f"{dataset}, {self.configuration_name}, {printable(self.trainer)}"

    def list_by_file_axes(self, key: str) -> list[Any]:
        """An entry of the configuration with one value for each axis, in the order z, y, x.

        Raises:
            UserError: the entry is missing or has another length.
        """
        values = self.configuration.get(key)
        if not isinstance(values, Sequence) or len(values) != NUM_AXES:
            raise UserError(
                f"{self.root / PLANS}: {key} of {self.configuration_name} has no three values"
            )
        return [values[axis] for axis in self.file_axes]

    def list_model_settings(self) -> dict[str, Any]:
        """The settings `model.*` of an equal network.

        Raises:
            UserError: the network has no equal in this program.
        """
        return list_network_settings(self.configuration, self.file_axes, self.root / PLANS)

    def rename_tensors(self, config: ModelConfig) -> dict[str, Tensor]:
        """The weights in the order z, y, x, by the names of this program's network.

        Args:
            config: settings `model.*` with the topology filled in.
        """
        names = external_parameter_names("nnunet", config)
        renamed = {}
        for external, tensor in self.tensors.items():
            if any(part in f".{external}" for part in COPIES) or external not in names:
                continue
            own = names[external]
            if tensor.dim() == 2 + NUM_AXES:
                tensor = tensor.permute(0, 1, *(2 + axis for axis in self.file_axes)).contiguous()
            renamed[own] = tensor.float()
        return renamed


def is_nnunet_folder(path: Path) -> bool:
    """Whether a path is a result folder of nnU-Net v2 or one of its folds."""
    return path.is_dir() and any((folder / PLANS).is_file() for folder in (path, path.parent))


def _find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The folder of `plans.json`, and the checkpoint."""
    if not (path / PLANS).is_file():
        folder, root = path, path.parent
    else:
        folds = sorted(folder for folder in path.glob("fold_*") if folder.is_dir())
        if len(folds) != 1:
            found = ", ".join(fold.name for fold in folds) or "none"
            raise UserError(f"{path}: give one fold as {path}/fold_N; it has {found}")
        folder, root = folds[0], path
    for name in CHECKPOINTS:
        if (folder / name).is_file():
            return root, folder / name
    raise UserError(f"{folder}: has none of {', '.join(CHECKPOINTS)}")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a result folder of nnU-Net v2 has one")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def _find_configuration(plans: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    """The configuration with the entries that it inherits. Raises `UserError`."""
    configurations = plans.get("configurations")
    merged: dict[str, Any] = {}
    parent: object = name
    seen = set()
    while parent is not None:
        is_known = isinstance(configurations, Mapping) and isinstance(parent, str)
        found = configurations.get(parent) if is_known else None  # type: ignore[union-attr]
        if not isinstance(found, Mapping) or parent in seen:
            raise UserError(f"{where}: configuration {printable(str(parent))} cannot be found")
        seen.add(parent)
        # Entries of the heir come first.
        merged = {**found, **merged}
        parent = found.get("inherits_from")
    if merged.get(CASCADE_KEY):
        raise UserError(
            f"{where}: {name} is the second stage of a cascade, which is not supported; give "
            "3d_fullres or 3d_lowres"
        )
    patch = merged.get("patch_size")
    if not isinstance(patch, Sequence) or len(patch) != NUM_AXES:
        raise UserError(f"{where}: {name} is not a 3D network; give 3d_fullres or 3d_lowres")
    return merged
