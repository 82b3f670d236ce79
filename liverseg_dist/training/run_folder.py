"""The run's folder: resolved settings, status, weights. The same command line, run again, finds here all it needs."""

import importlib.metadata
import json
import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.files import write_text

FREE_TO_CHANGE = (
    "run.", "data.workers", "data.prefetch", "data.cache_gib", "data.store", "checkpoint.", "validation.pictures",
    "inference.", "train.log_every_steps", "train.stop_at_step", "train.threads", "train.strategy", "train.zero_stage",
    "train.offload_optimizer", "train.micro_batch_size", "train.activation_checkpointing", "train.profile_steps",
    "model.pretrained", "data.unreadable", "data.stall_timeout_s", "data.cache_dir", "train.nonfinite", "memory.",
)  # fmt: skip
"""Keys that do not change what the run computes (but for the order of float sums), so resuming may change them; and
those that only decide what becomes of a step or a case that would end the run."""


NO_RUN = ("dataset.json", "imagesTr", "labelsTr", "zarr.json")
"""What data sets and stores hold, where nobody means to train."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and the small files in it. Writing is for rank 0."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, settings: Settings) -> bool:
        """Make the folder, or see that it belongs to these settings. True if a run was begun here before."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            if what := next((name for name in NO_RUN if (self.path / name).exists()), ""):
                raise UserError(
                    f"{self.path}: holds {what}, so it is no place for a run; choose another run.dir"
                )
            strangers = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            if "events" in " ".join(strangers) or "model.safetensors" in strangers:
                raise UserError(
                    f"{self.path}: holds run files but no config.yaml; choose another run.dir"
                )
            write_text(self.config, settings.to_yaml())
            write_text(self.path / "environment.json", json.dumps(version_environment(), indent=1))
            return False
        check_settings_compatible(load_settings([self.config]), settings, self.path)
        return True

    @property
    def newest_step(self) -> int:
        """Of the newest checkpoint that is complete on disk; 0 without one."""
        names = (path.name.removeprefix("step_") for path in self.checkpoints.glob("step_*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def set_status(self, state: str, step: int, max_steps: int, message: str = "") -> None:
        """`status.json`: running, stopped (the same line continues), finished or failed."""
        content = {"state": state, "step": step, "max_steps": max_steps, "message": message}
        write_text(self.path / "status.json", json.dumps(content))

    def export(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        """Weights as safetensors, written aside and renamed. No metadata: equal weights give equal bytes.

        Raises `RunFailed` where they cannot be written; an earlier file stays.
        """
        aside = path.with_name(f".{path.name}.tmp")
        try:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, str(aside))
            aside.chmod(
                stat.S_IMODE(self.config.stat().st_mode)
            )  # safetensors' own are for their owner alone
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise RunFailed(
                f"{path}: the weights cannot be written: {' '.join(str(error).split())}; all else is kept, make room "
                "and run the same line again"
            ) from None


def check_settings_compatible(before: Settings, now: Settings, folder: Path) -> None:
    """A run goes on only with the settings it was begun with (but for `FREE_TO_CHANGE`). Raises `UserError`."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE):
            raise UserError(
                f"{folder}: this run was begun with {key}={_short(old.get(key))}, now {_short(new.get(key))} is asked "
                "for; give the same settings to continue it, or another run.dir to begin anew"
            )


def version_environment() -> dict[str, Any]:
    """Versions that results depend on."""
    names = ("liverseg_dist", "torch", "deepspeed", "zarr", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "host": platform.node(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        **{name: importlib.metadata.version(name) for name in names},
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _short(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
