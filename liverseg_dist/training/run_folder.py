"""The run's folder: resolved settings, status, weights. The same command line, run again, finds here all it needs."""

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

FREE_TO_CHANGE = (
    "run.", "data.workers", "data.prefetch", "data.cache_gib", "data.store", "checkpoint.", "validation.pictures",
    "inference.", "train.log_every_steps", "train.stop_at_step", "train.threads", "train.strategy", "train.zero_stage",
    "train.offload_optimizer", "train.micro_batch_size", "train.activation_checkpointing", "train.profile_steps",
    "model.pretrained", "data.on_read_error", "data.stall_timeout_s", "data.cache_dir", "train.on_nonfinite", "memory.",
)  # fmt: skip
"""Keys that do not change what the run computes (but for the order of float sums), so resuming may change them; and
those that only decide what becomes of a step or a case that would end the run."""


EXTENSIBLE = ("train.max_steps",)
"""Keys that a training run may change at its present step (see `training.extension`)."""
DATA_SET_FILES = ("dataset.json", "imagesTr", "labelsTr", "zarr.json")
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

    @property
    def starts(self) -> Path:
        """One JSON line per start: step, ranks, threads of each rank, settings that differ from config.yaml."""
        return self.path / "starts.jsonl"

    def open(self, settings: Settings) -> bool:
        """Make the folder, or see that it belongs to these settings. True if a run was begun here before."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            if what := next((name for name in DATA_SET_FILES if (self.path / name).exists()), ""):
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
        check_settings_compatible(
            load_settings([self.config], warn_of_old_keys=False), settings, self.path, EXTENSIBLE
        )
        return True

    def record_start(self, settings: Settings, step: int, threads: Sequence[int]) -> None:
        """Add this start to `starts.jsonl`.

        Args:
            threads: CPU threads of each rank.
        """
        changed = setting_changes(load_settings([self.config], warn_of_old_keys=False), settings)
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
        """CPU threads of `rank` in the last start with this number of ranks; 0 where there was none.

        They decide the order of float sums: a run that continues with the same number ends with the same bytes.
        """
        try:
            lines = self.starts.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                threads = json.loads(line)["threads"]
                if len(threads) == ranks and isinstance(threads[rank], int) and threads[rank] > 0:
                    return int(threads[rank])
            except (
                ValueError,
                KeyError,
                TypeError,
            ):  # a line that was cut off when the machine went down
                continue
        return 0

    def newest_checkpoint(self) -> int:
        """Step of the newest checkpoint on disk, by its name; 0 where there is none."""
        names = [path.name.removeprefix("step_") for path in self.checkpoints.glob("step_*")]
        return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=0)

    def set_status(self, state: str, step: int, max_steps: int, message: str = "") -> None:
        """Write `status.json`; its `saved_step` is the step that a killed run would continue from.

        Args:
            state: running, stopped (the same line continues), finished or failed.
            step: optimizer steps done.
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
        """Whether `status.json` says that the run finished with `step` steps."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
            return bool(status["state"] == "finished" and status["step"] == step)
        except (OSError, ValueError, KeyError, TypeError):
            return False

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


def check_settings_compatible(
    before: Settings, now: Settings, folder: Path, extensible: tuple[str, ...] = ()
) -> None:
    """Check that a run continues with the settings it has. Raises `UserError` that names a way to go on.

    Args:
        extensible: keys that may differ beside those of `FREE_TO_CHANGE`.
    """
    changes = setting_changes(before, now)
    refused = [
        key for key in changes if not key.startswith(FREE_TO_CHANGE) and key not in extensible
    ]
    if not refused:
        return
    shown = ", ".join(
        f"{key}={_short(changes[key][0])} (not {_short(changes[key][1])})" for key in refused[:3]
    )
    more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
    raise UserError(
        f"{folder}: this run has {shown}{more}; give the same settings to continue it, or another run.dir to start a "
        f"new run ({_start_from(folder)})"
    )


def _start_from(folder: Path) -> str:
    """How a new run can use what an old one learned."""
    if (folder / "model.safetensors").is_file():
        return f"model.pretrained={shlex.quote(str(folder))} starts it from this run's weights"
    return "model.pretrained=RUN starts it from the weights of a run that has model.safetensors"


def setting_changes(before: Settings, now: Settings) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values, sorted."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


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
