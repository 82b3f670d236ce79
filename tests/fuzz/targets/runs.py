"""What a run left: weights, settings, checkpoints."""

import hashlib
import json
import struct
from collections import OrderedDict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from liverseg_dist.errors import UserError
from liverseg_dist.inference.load_run import load_run
from liverseg_dist.model import build_model
from liverseg_dist.model.pretrained import read_tensors
from liverseg_dist.training.checkpoint import MANIFEST, STATE, Checkpoints
from liverseg_dist.training.resume_state import parse_progress
from tests.fuzz.judge import Wrong
from tests.fuzz.mutate import damaged, damaged_json, damaged_tree, json_text
from tests.fuzz.targets.small import small_settings

Tensors = dict[str, torch.Tensor]


def damaged_safetensors(raw: bytes, chance: Random) -> bytes:
    """Its JSON header as a tree, its length, or any bytes."""
    (length,) = struct.unpack("<Q", raw[:8])
    how = chance.randrange(6)
    if how <= 2:
        header = damaged_json(json.loads(raw[8 : 8 + length]), chance)
        return struct.pack("<Q", len(header)) + header + raw[8 + length :]
    if how == 3:
        claimed = chance.choice((0, 1, length - 1, length + 1, 10**8, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", claimed) + raw[8:]
    return damaged(raw, chance)


def tensors_of(path: Path) -> dict[str, Any]:
    """safetensors' own reader, to numpy."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


class WeightsTarget:
    """`load_run` of a run folder, and `read_tensors` of weights to start from."""

    name = "weights"

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.settings = small_settings()
        self.model = build_model(self.settings.model)
        save_file(self.model.state_dict(), folder / "m.safetensors")
        self.safetensors = (folder / "m.safetensors").read_bytes()
        torch.save({"state_dict": self.model.state_dict()}, folder / "m.pt")
        self.pt = (folder / "m.pt").read_bytes()

    def make(self, case: Path, chance: Random) -> None:
        what = chance.randrange(5)
        config, weights, pt = self.settings.model_dump(mode="json"), self.safetensors, self.pt
        text = json_text(config)
        if what <= 1:
            weights = damaged_safetensors(weights, chance)
        elif what == 2:
            config["model"] = damaged_tree(config["model"], chance)
            text = json_text(config)
        elif what == 3:
            text = damaged_json(config, chance)
        else:
            pt = damaged(pt, chance)
        (case / "config.yaml").write_bytes(text)
        (case / "model.safetensors").write_bytes(weights)
        (case / "weights.pt").write_bytes(pt)
        (case / "which").write_text("weights.pt" if what == 4 else "")

    def check(self, case: Path) -> None:
        if (case / "which").read_text():
            read_tensors(case / "weights.pt")
            return
        run = load_run(case, torch.device("cpu"))
        for name, expected in tensors_of(case / "model.safetensors").items():
            if not np.array_equal(run.model.state_dict()[name].numpy(), expected, equal_nan=True):
                raise Wrong(f"{name} has other values in the file")
        read_tensors(case)


class CheckpointTarget:
    """`newest` and `load`: the newest whole checkpoint, or none; never a part of one."""

    name = "checkpoint"

    def __init__(self, folder: Path) -> None:
        self.tensors: Tensors = OrderedDict(
            a=torch.arange(12.0).view(3, 4), b=torch.arange(6, dtype=torch.int64)
        )
        self.state = {
            "progress": {"step": 5, "best_score": 0.5, "best_step": 4, "last_dice": {"liver": 0.9}}
        }
        checkpoints = Checkpoints(folder / "checkpoints", keep_last=2)
        checkpoints.save(5, self.tensors, self.state, wait=True)
        checkpoints.close()
        self.files = {p.name: p.read_bytes() for p in (folder / "checkpoints" / "step_5").iterdir()}

    def make(self, case: Path, chance: Random) -> None:
        files = dict(self.files)
        shards = [name for name in files if name.endswith(".safetensors")]
        name = chance.choice((MANIFEST, MANIFEST, STATE, STATE, *shards, *shards, *files))
        if name.endswith(".json"):
            files[name] = damaged_json(json.loads(files[name]), chance)
        elif name in shards:
            files[name] = damaged_safetensors(files[name], chance)
        else:
            files[name] = damaged(files[name], chance)
        if name != MANIFEST and chance.random() < 0.7:  # signed anew: what no accident makes
            sums = {n: hashlib.sha256(raw).hexdigest() for n, raw in files.items() if n != MANIFEST}
            files[MANIFEST] = json.dumps({"schema": 1, "sha256": sums}).encode()
        if chance.random() < 0.05:
            del files[chance.choice(sorted(files))]
        step = (
            case
            / "checkpoints"
            / chance.choice(("step_5", "step_5", "step_5", "step_²", "step_" + "9" * 30))
        )
        step.mkdir(parents=True)
        for name, raw in files.items():
            (step / name).write_bytes(raw)

    def check(self, case: Path) -> None:
        checkpoints = Checkpoints(case / "checkpoints", keep_last=2)
        try:
            state = checkpoints.newest()
            if state is None:
                raise UserError("passed over")
            tensors = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
            checkpoints.load(state["step"], tensors)
        finally:
            checkpoints.close()
        progress = parse_progress(state)
        if (
            not isinstance(progress.step, int)
            or isinstance(progress.step, bool)
            or progress.step < 0
        ):
            raise Wrong(f"goes on at step {progress.step!r}")
        folder = case / "checkpoints" / f"step_{state['step']}"
        if json.loads((folder / STATE).read_text()) != state:
            raise Wrong("json reads another state")
        for file in folder.glob("*.safetensors"):
            for name, expected in tensors_of(file).items():
                if name in tensors and not np.array_equal(
                    tensors[name].numpy(), expected, equal_nan=True
                ):
                    raise Wrong(f"{name} has other values in {file.name}")
