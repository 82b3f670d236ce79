"""Misspelt options: the nearest known name is in the message."""

import pytest

from liverseg_dist.texts.suggestions import SuggestingParser, suggest_name


@pytest.mark.parametrize(
    ("word", "expected"), [("traim", "train"), ("train", "train"), ("xyz", None), ("", None)]
)
def test_nearest_name(word: str, expected: str | None) -> None:
    assert suggest_name(word, ["train", "evaluate", "predict"]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devise", "cpu"], "did you mean --device?"),
        (["--devise=cpu"], "did you mean --device?"),
        (["--zzzzzzzz"], "unrecognized arguments: --zzzzzzzz"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = SuggestingParser(prog="liverseg")
    parser.add_argument("--device")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert ("did you mean" in error) == ("did you mean" in message)
