"""The options of `liverseg phantom` for modality, structures and layout; nothing is made here."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from liverseg_dist.commands import phantom
from liverseg_dist.commands.phantom_channels import (
    BENIGN_LESIONS,
    MISALIGNMENT_MM,
    asks_for_task03,
    make_channel_set,
    plan_channel_set,
)
from liverseg_dist.errors import UserError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    phantom.add_arguments(parser)
    return parser.parse_args(["folder", *words])


def test_without_options_it_is_task03() -> None:
    assert asks_for_task03(parse())
    assert asks_for_task03(parse("--organs", "liver", "--modality", "CT", "--layout", "msd"))


@pytest.mark.parametrize(
    "words",
    [
        ("--modality", "mr"),
        ("--modality", "ct+mr"),
        ("--organs", "liver,spleen"),
        ("--annotate", "liver"),
        ("--benign-lesions", "2"),
        ("--layout", "nnunet"),
    ],
)
def test_any_other_option_is_another_set(words: tuple[str, ...]) -> None:
    assert not asks_for_task03(parse(*words))


@pytest.mark.parametrize(
    ("words", "channels", "layout"),
    [
        ((), ("CT",), "msd"),
        (("--modality", "mr"), ("T1",), "msd"),
        (("--modality", "ct+mr"), ("CT", "T1"), "nnunet"),
        (("--organs", "liver,spleen"), ("CT",), "nnunet"),
        (("--modality", "mr", "--mr-sequence", "gre,tse,pd"), ("T1", "T2", "PD"), "nnunet"),
    ],
)
def test_channels_and_layout_follow_from_the_modality(
    words: tuple[str, ...], channels: tuple[str, ...], layout: str
) -> None:
    wanted = plan_channel_set(parse(*words))
    assert len(wanted.recipe.channels) == len(channels)
    assert wanted.layout == layout


def test_ct_with_mr_is_misaligned_and_has_benign_lesions() -> None:
    recipe = plan_channel_set(parse("--modality", "ct+mr")).recipe
    assert (recipe.misalignment_mm, recipe.benign_lesions) == (MISALIGNMENT_MM, BENIGN_LESIONS)
    alone = plan_channel_set(parse("--modality", "mr")).recipe
    assert (alone.misalignment_mm, alone.benign_lesions) == (0, 0)


def test_one_4d_file_holds_registered_channels() -> None:
    recipe = plan_channel_set(parse("--modality", "ct+mr", "--layout", "msd4d")).recipe
    assert recipe.one_grid
    assert recipe.misalignment_mm == 0


def test_given_values_replace_the_defaults() -> None:
    words = ("--modality", "ct+mr", "--misalignment-mm", "12.5", "--benign-lesions", "0")
    recipe = plan_channel_set(parse(*words, "--missing-channel", "0.25")).recipe
    assert recipe.misalignment_mm == 12.5
    assert recipe.benign_lesions == 0
    assert recipe.missing_share == 0.25


def test_labels_are_those_that_are_annotated() -> None:
    wanted = plan_channel_set(parse("--organs", "liver,spleen,kidneys", "--annotate", "spleen"))
    assert wanted.recipe.labels.structures == ("spleen",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modality", "pet"), "--modality pet: not known; known names: ct, mr"),
        (("--organs", "heart"), "'heart' is not known"),
        (("--organs", "liver", "--annotate", "spleen"), "'spleen' is not known"),
        (("--mr-sequence", "gre"), "--mr-sequence needs --modality mr or ct"),
        (("--modality", "mr", "--mr-sequence", "flair"), "--mr-sequence flair: not known"),
        (("--modality", "mr", "--mr-sequence", "gre,gre"), "gre is given twice"),
        (("--modality", "ct+mr", "--layout", "msd"), "--layout msd holds one channel, not 2"),
        (("--layout", "msd4d"), "--layout msd4d holds 2 to 4 channels, not 1"),
        (("--misalignment-mm", "5"), "it needs --modality ct"),
        (("--modality", "ct+mr", "--misalignment-mm", "-1"), "must be 0 to 50, not -1"),
        (("--modality", "ct+mr", "--misalignment-mm", "nan"), "must be 0 to 50, not nan"),
        (
            ("--modality", "ct+mr", "--layout", "msd4d", "--misalignment-mm", "5"),
            "holds registered channels",
        ),
        (("--missing-channel", "0.5"), "needs two channels or more"),
        (("--modality", "ct+mr", "--missing-channel", "1.5"), "must be 0 to 1, not 1.5"),
        (("--benign-lesions", "99"), "--benign-lesions must be 0 to 10"),
    ],
)
def test_options_that_do_not_fit_are_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_channel_set(parse(*words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("--modality", "ct+mr", "--dry-run", "--cases", "3")
    args.folder = tmp_path / "both"
    found: dict[str, Any] = make_channel_set(args, most_pictures=0)
    assert found["dry_run"]
    assert not args.folder.exists()
    assert "would make 3 labelled and 0 unlabelled small cases of CT + " in capsys.readouterr().out
