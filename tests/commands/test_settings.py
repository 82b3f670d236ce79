"""`liverseg settings` tells of each key that a config may have, and nothing else."""

import json
from typing import Any

import pytest
import yaml

from liverseg_dist.commands.main import main
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.errors import EXIT_USER


def leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= (
            leaves(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return found


def test_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
    assert {key: one["default"] for key, one in told.items()} == leaves(
        Settings().model_dump(mode="json")
    )
    assert told["train.optimizer"]["kind"] == "sgd | adamw"
    assert told["data.oversample_foreground"]["kind"] == "number >= 0 <= 1"
    assert told["convert.cleaning.spacing_mm"]["kind"] == "list of 3 number > 0 or null"
    for key, one in told.items():  # what is printed can be given
        load_settings([], [f"{key}={json.dumps(one['default'])}"])


def test_a_section_a_key_and_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    assert "liverseg settings SECTION" in capsys.readouterr().out
    assert main(["settings", "train.schedule"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.partition(" = ")[0] for line in lines] == [
        "train.schedule.name", "train.schedule.warmup_steps", "train.schedule.power",
    ]  # fmt: skip
    assert yaml.safe_load(lines[0].partition(" = ")[2].partition("   (")[0]) == "poly"
    assert main(["settings", "--find", "DeepSpeed only"]) == 0
    assert "train.zero_stage = 1   (0 | 1 | 2 | 3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["trian"], ["train.lr"], ["--find", "no such word"], ["train", "--find", "liver"]]
)
def test_what_is_not_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", *words]) == EXIT_USER
    assert len(capsys.readouterr().err.splitlines()) == 1
