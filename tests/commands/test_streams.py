"""Lost readers, closed streams, full disks: a choice of what `tools/fuzz --target streams` tries. Real processes."""

from pathlib import Path

import pytest

from tests.fuzz.targets.streams import HOW, Inputs, check_disturbed


@pytest.fixture
def inputs(phantom_source: Path, phantom_store: Path, tmp_path: Path) -> Inputs:
    return Inputs(phantom_source, phantom_store, tmp_path / "run", tmp_path / "masks")


@pytest.mark.parametrize("how", HOW)
def test_short_commands_end_with_their_own_exit_code(
    how: str, inputs: Inputs, tmp_path: Path
) -> None:
    for name, which, after_bytes in (
        ("help", "stdout", 5),
        ("settings", "both", 700),
        ("launch status", "stderr", 0),
    ):
        check_disturbed(inputs, tmp_path / name, name, how, which, after_bytes)


@pytest.mark.parametrize("how", ["closed", "full"])
def test_a_result_for_a_program_is_written_or_the_command_fails(
    how: str, inputs: Inputs, tmp_path: Path
) -> None:
    check_disturbed(inputs, tmp_path / "out", "verify", how, "both")


@pytest.mark.parametrize(
    ("name", "how", "which", "after_bytes"),
    [
        ("convert", "no reader", "stderr", 0),
        ("phantom", "reader leaves", "both", 20),
        ("train", "reader leaves", "both", 200),
        ("train", "terminal, nohup", "both", 200),
        ("train, two ranks", "no reader", "both", 0),
    ],
)
def test_work_goes_on_without_a_reader(
    name: str, how: str, which: str, after_bytes: int, inputs: Inputs, tmp_path: Path
) -> None:
    check_disturbed(inputs, tmp_path / "out", name, how, which, after_bytes)
