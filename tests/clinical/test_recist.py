"""Every rule of RECIST 1.1 as a table (Eisenhauer et al. 2009, sections 3.1, 4.3 and tables 1 and
2)."""

import pytest

from liverseg_dist.clinical.recist import (
    BaselineLesion,
    best_response,
    choose_targets,
    is_new_lesion,
    measurable_mm,
    non_target_response,
    overall_response,
    target_response,
    volume_response,
)

SIX_LESIONS = list(
    zip("abcdef", ["liver", "lung", "lung", "kidney", "spleen", "pancreas"], strict=True)
)


@pytest.mark.parametrize(("slice_mm", "least"), [(1.0, 10.0), (5.0, 10.0), (7.0, 14.0)])
def test_measurable(slice_mm: float, least: float) -> None:
    assert measurable_mm(slice_mm) == least


@pytest.mark.parametrize(
    ("lesions", "slice_mm", "expected"),
    [
        ([("a", "liver", 10.0), ("b", "liver", 9.9)], 5.0, ["a"]),
        ([("a", "liver", 12.0), ("b", "liver", 13.9), ("c", "liver", 14.0)], 7.0, ["c"]),
        ([("a", "liver", 12.0), ("b", "liver", 30.0), ("c", "liver", 20.0)], 1.0, ["b", "c"]),
        (
            [(name, organ, 20.0 + n) for n, (name, organ) in enumerate(SIX_LESIONS)],
            1.0,
            ["f", "e", "d", "c", "b"],
        ),
        ([("a", "liver", 15.0), ("b", "liver", 15.0), ("c", "liver", 15.0)], 1.0, ["a", "b"]),
        ([], 1.0, []),
    ],
    ids=["10 mm", "twice a thick slice", "two in an organ", "five in all", "ties in order", "none"],
)  # fmt: skip
def test_target_choice(lesions: list[tuple], slice_mm: float, expected: list[str]) -> None:
    assert choose_targets([BaselineLesion(*lesion) for lesion in lesions], slice_mm) == expected


def test_a_cut_lesion_is_no_target() -> None:
    lesions = [
        BaselineLesion("a", "liver", 40.0, is_whole=False),
        BaselineLesion("b", "liver", 12.0),
    ]
    assert choose_targets(lesions, 1.0) == ["b"]


@pytest.mark.parametrize(
    ("baseline", "nadir", "current", "all_measured", "all_gone", "expected"),
    [
        (100.0, 100.0, 0.0, True, True, "CR"),
        (100.0, 100.0, 70.0, True, False, "PR"),
        (100.0, 100.0, 70.1, True, False, "SD"),
        (100.0, 100.0, 119.9, True, False, "SD"),
        (100.0, 100.0, 120.0, True, False, "PD"),
        (100.0, 50.0, 60.0, True, False, "PD"),  # from the nadir, although below baseline
        (100.0, 50.0, 59.9, True, False, "PR"),
        (20.0, 20.0, 24.9, True, False, "SD"),  # 24 %, but under 5 mm
        (20.0, 20.0, 25.0, True, False, "PD"),
        (100.0, 0.0, 6.0, True, False, "PD"),  # back after a complete response
        (100.0, 100.0, 60.0, False, False, "NE"),
        (100.0, 100.0, 130.0, False, False, "PD"),  # what was measured suffices
        (100.0, 100.0, 0.0, False, False, "NE"),
    ],
)
def test_targets(
    baseline: float, nadir: float, current: float, all_measured: bool, all_gone: bool, expected: str
) -> None:
    category, rule = target_response(baseline, nadir, current, all_measured, all_gone)
    assert category == expected
    assert rule


@pytest.mark.parametrize(
    ("baseline", "nadir", "current", "expected"),
    [(10.0, 10.0, 3.4, "PR"), (10.0, 10.0, 3.5, "SD"), (10.0, 10.0, 17.2, "SD"), (10.0, 10.0, 17.3, "PD"),
     (10.0, 2.0, 3.46, "PD"), (10.0, 0.0, 1.0, "PD")],
)  # fmt: skip
def test_volumes(baseline: float, nadir: float, current: float, expected: str) -> None:
    assert volume_response(baseline, nadir, current, True, False)[0] == expected


def test_volumes_gone_or_unmeasured() -> None:
    assert volume_response(10.0, 10.0, 0.0, True, True)[0] == "CR"
    assert volume_response(10.0, 10.0, 1.0, False, False)[0] == "NE"


@pytest.mark.parametrize(
    ("nadir", "current", "all_seen", "count", "expected"),
    [(5.0, 0.0, True, 2, "CR"), (5.0, 1.0, True, 2, "non-CR/non-PD"), (5.0, 8.64, True, 2, "non-CR/non-PD"),
     (5.0, 8.65, True, 2, "PD"), (5.0, 5.0, False, 2, "NE"), (0.0, 0.0, True, 0, "none"), (0.0, 1.0, True, 1, "PD")],
)  # fmt: skip
def test_other_lesions(
    nadir: float, current: float, all_seen: bool, count: int, expected: str
) -> None:
    assert non_target_response(5.0, nadir, current, all_seen, count)[0] == expected


@pytest.mark.parametrize(
    ("target", "non_target", "new", "expected"),
    [
        # Table 1: patients with target lesions.
        ("CR", "CR", False, "CR"), ("CR", "none", False, "CR"), ("CR", "non-CR/non-PD", False, "PR"),
        ("CR", "NE", False, "PR"), ("PR", "CR", False, "PR"), ("PR", "non-CR/non-PD", False, "PR"),
        ("PR", "NE", False, "PR"), ("PR", "none", False, "PR"), ("SD", "CR", False, "SD"),
        ("SD", "non-CR/non-PD", False, "SD"), ("SD", "NE", False, "SD"), ("NE", "CR", False, "NE"),
        ("NE", "non-CR/non-PD", False, "NE"), ("PD", "CR", False, "PD"), ("PD", "NE", False, "PD"),
        ("CR", "PD", False, "PD"), ("PR", "PD", False, "PD"), ("SD", "PD", False, "PD"), ("NE", "PD", False, "PD"),
        ("CR", "CR", True, "PD"), ("PR", "CR", True, "PD"), ("SD", "none", True, "PD"), ("NE", "NE", True, "PD"),
        # Table 2: patients without target lesions.
        (None, "CR", False, "CR"), (None, "non-CR/non-PD", False, "non-CR/non-PD"), (None, "NE", False, "NE"),
        (None, "PD", False, "PD"), (None, "CR", True, "PD"), (None, "none", True, "PD"), (None, "none", False, "ND"),
    ],
)  # fmt: skip
def test_overall(target: str | None, non_target: str, new: bool, expected: str) -> None:
    category, rule = overall_response(target, non_target, new)  # type: ignore[arg-type]
    assert category == expected
    assert rule


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        (["SD", "PR", "SD"], ("PR", 1)),
        (["PR", "CR", "PD"], ("CR", 1)),
        (["SD", "PD", "PR"], ("SD", 0)),  # what follows progression does not count
        (["PD", "SD"], ("PD", 0)),
        (["NE", "SD"], ("SD", 1)),
        (["NE", "PD"], ("PD", 1)),
        (["non-CR/non-PD", "CR"], ("CR", 1)),
        (["SD", "SD"], ("SD", 0)),
    ],
)
def test_best_overall(responses: list[str], expected: tuple[str, int]) -> None:
    assert best_response(responses) == expected  # type: ignore[arg-type]


def test_a_speck_is_no_new_lesion() -> None:
    assert not is_new_lesion(4.9)
    assert is_new_lesion(5.0)
