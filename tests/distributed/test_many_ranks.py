"""64 ranks on one machine start, train, save and stop cleanly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import clean_environment
from tests.training.test_resume import arguments, steps_logged

RANKS = 64


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_sixty_four_ranks_start_and_stop_cleanly(phantom_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = (
        f"train.global_batch_size={RANKS}",
        "train.max_steps=3",
        "checkpoint.every_steps=2",
        "data.workers=0",
    )
    words = arguments(
        phantom_store, run, *few, "validation.every_steps=0", "data.augmentation=none"
    )[2:]
    command = [sys.executable, "-m", "tests.distributed.many_ranks", str(RANKS), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(), timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert (result["clean"], result["left"]) == (RANKS, 0), done.stderr[-3000:]
    assert f"{RANKS} x cpu, ddp" in done.stdout
    assert steps_logged(run) == [1, 2, 3]
    assert (run / "model.safetensors").is_file()
    assert not (run / "errors").exists()
