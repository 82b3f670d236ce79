"""The folder of a run: resolved settings, status, weights, checkpoints.

It has everything that the same command line needs to continue the run.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import stat
import time
from collections.abc import Sequence
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
from liverseg_dist.training.data_description import check_same_data, complete_settings

FREE_TO_CHANGE = (
    "run.", "memory.", "checkpoint.", "inference.",
    "data.workers", "data.prefetch", "data.cache_gib", "data.cache_dir", "data.store",
    "data.on_read_error", "data.stall_timeout_s",
    "model.pretrained", "validation.pictures",
    "train.log_every_steps", "train.stop_at_step", "train.threads", "train.strategy",
    "train.zero_stage", "train.offload_optimizer", "train.micro_batch_size",
    "train.activation_checkpointing", "train.profile_steps", "train.on_nonfinite",
    "train.collective_timeout_s", "train.fsdp_reshard_after_forward", "train.ddp_static_graph",
)  # fmt: skip
"""Prefixes of keys that may change when a run is resumed. They do not change the result (except for
the order of float sums), or they only decide about a step or case that would end the run."""
EXTENSIBLE = ("train.max_steps",)
"""Keys that a training run may change at its present step (see `training.extension`)."""
DATA_SET_FILES = ("dataset.json", "imagesTr", "labelsTr", "zarr.json")
"""Names in data sets and stores. A folder with one of them was given as run.dir by mistake."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and its small files. Only rank 0 may call methods that write."""

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

    @property
    def starts(self) -> Path:
        """One JSON line per start: step, ranks, threads of each rank, changed settings."""
        return self.path / "starts.jsonl"

    def open(self, settings: Settings) -> bool:
        """Create the folder, or check that its run has these settings.

        Returns:
            Whether the folder already has a run.

        Raises:
            UserError: the folder is not a run's, or its run has other settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self._check_new_folder()
            # From now on the folder belongs to this run.
            write_text(self.config, settings.to_yaml())
            write_text(self.path / "environment.json", json.dumps(version_environment(), indent=1))
            return False
        check_settings_compatible(
            load_settings([self.config], warn_of_old_keys=False), settings, self.path, EXTENSIBLE
        )
        return True

    def _check_new_folder(self) -> None:
        for name in DATA_SET_FILES:
            if (self.path / name).exists():
                raise UserError(
                    f"{self.path}: contains {name} and cannot be used as a run folder; choose "
                    "another run.dir"
                )
        names = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        # Names of TensorBoard's files contain "events".
        if "events" in " ".join(names) or "model.safetensors" in names:
            raise UserError(
                f"{self.path}: contains files of a run but no config.yaml; choose another run.dir"
            )

    def record_start(self, settings: Settings, step: int, threads: Sequence[int]) -> None:
        """Add this start to `starts.jsonl`.

        Args:
            threads: CPU threads of each rank.
        """
        recorded = load_settings([self.config], warn_of_old_keys=False)
        changed = setting_changes(complete_settings(recorded), complete_settings(settings))
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "step": step,
            "ranks": len(threads),
            "threads": list(threads),
            "host": platform.node(),
            "changed_settings": {key: new for key, (_, new) in changed.items()},
        }
        with self.starts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def recorded_threads(self, rank: int, ranks: int) -> int:
        """Return the CPU threads of `rank` in the last start with `ranks` ranks; 0 without one.

        The number determines the order of float sums: with the same number, a resumed run has the
        same bytes as an uninterrupted one.
        """
        try:
            lines = self.starts.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return 0
        # The last start counts: its checkpoints are the ones that exist.
        for line in reversed(lines):
            try:
                threads = json.loads(line)["threads"]
                if len(threads) == ranks and isinstance(threads[rank], int) and threads[rank] > 0:
                    return int(threads[rank])
            # A crash of the machine may have left an incomplete line.
            except (ValueError, KeyError, TypeError):
                continue
        return 0

    def newest_checkpoint(self) -> int:
        """Return the step of the newest checkpoint on disk, by its name; 0 without one."""
        newest = 0
        for path in self.checkpoints.glob("step_*"):
            number = path.name.removeprefix("step_")
            if number.isascii() and number.isdecimal():
                newest = max(newest, int(number))
        return newest

    def set_status(self, state: str, step: int, max_steps: int, message: str = "") -> None:
        """Write `status.json`. Its `saved_step` is the step from which a killed run continues.

        Args:
            state: running, stopped (the same command continues), finished or failed.
            step: optimizer steps done.
            max_steps: last step of the run.
            message: reason of the state, for the user.
        """
        content = {
            "state": state,
            "step": step,
            "saved_step": self.newest_checkpoint(),
            "max_steps": max_steps,
            "message": message,
        }
        write_text(self.path / "status.json", json.dumps(content))

    def is_finished_at(self, step: int) -> bool:
        """Return whether `status.json` records that the run finished after `step` steps."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
            return bool(status["state"] == "finished" and status["step"] == step)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def export(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write weights as safetensors, atomically. Equal weights give equal bytes (no metadata).

        Raises:
            RunFailed: the file cannot be written; an earlier one is kept.
        """
        staging = path.with_name(f".{path.name}.tmp")
        try:
            contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(contiguous, str(staging))
            # safetensors creates files that only their owner can read.
            staging.chmod(stat.S_IMODE(self.config.stat().st_mode))
            os.replace(staging, path)
        except (OSError, SafetensorError) as error:
            staging.unlink(missing_ok=True)
            reason = " ".join(str(error).split())
            raise RunFailed(
                f"{path}: the weights cannot be written: {reason}; all other files are kept, free "
                "some space and run the same line again"
            ) from None


def check_settings_compatible(
    before: Settings, now: Settings, folder: Path, extensible: tuple[str, ...] = ()
) -> None:
    """Check that a run is continued with its own settings.

    Args:
        before: settings of the run.
        now: settings of this call.
        folder: folder of the run, for the message.
        extensible: keys that may differ in addition to those of `FREE_TO_CHANGE`.

    Raises:
        UserError: a setting differs; the message names it and both ways to continue.
    """
    # Runs of earlier versions do not record what they read and segment.
    before, now = complete_settings(before), complete_settings(now)
    check_same_data(before, now, folder)
    # They agree where it matters; codes of structures may have been added since.
    data = before.data.model_copy(update={"labels": now.data.labels})
    before = before.model_copy(update={"data": data})
    conflicts: list[str] = []
    for key, (old, new) in setting_changes(before, now).items():
        if not key.startswith(FREE_TO_CHANGE) and key not in extensible:
            conflicts.append(f"{key}={_to_yaml(old)} (not {_to_yaml(new)})")
    if not conflicts:
        return
    more = f" and {len(conflicts) - 3} more" if len(conflicts) > 3 else ""
    raise UserError(
        f"{folder}: this run has {', '.join(conflicts[:3])}{more}; give the same settings to "
        "continue it, or another run.dir to start a new run "
        f"({_suggest_pretrained(folder)})"
    )


def _suggest_pretrained(folder: Path) -> str:
    """Describe how a new run can start from the weights of this one."""
    if (folder / "model.safetensors").is_file():
        return f"model.pretrained={shlex.quote(str(folder))} starts it from this run's weights"
    return "model.pretrained=RUN starts it from the weights of a run that has model.safetensors"


def setting_changes(before: Settings, now: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, sorted, with the values before and now."""
    old = _flatten(before.model_dump(mode="json"))
    new = _flatten(now.model_dump(mode="json"))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def version_environment() -> dict[str, Any]:
    """Return the versions of machine and libraries that results depend on."""
    names = ("liverseg_dist", "torch", "deepspeed", "zarr", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "host": platform.node(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        **{name: importlib.metadata.version(name) for name in names},
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(_flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _to_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
