"""Paired comparison against scipy and hand-made values."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from liverseg_dist.commands.main import main
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation import Ledger, score_case, write_results
from liverseg_dist.evaluation.compare import COMPARED, apply_holm_correction, compare_evaluations
from tests.evaluation.masks import labels

STRUCTURES = ("liver", "tumour")


def case(case_id: str, **dice: float | None) -> dict:
    return {"case_id": case_id} | {
        s: dict.fromkeys([metric.name for metric in COMPARED], 0.5) | {"dice": dice.get(s, 0.5)}
        for s in STRUCTURES
    }


def row(result: dict, structure: str, metric: str) -> dict:
    (found,) = [
        r for r in result["metrics"] if (r["structure"], r["metric"]) == (structure, metric)
    ]
    return found


def test_p_value_matches_scipy() -> None:
    rng = np.random.default_rng(0)
    a, gain = rng.uniform(0.5, 0.9, 25), rng.normal(0.01, 0.03, 25)
    first = [case(f"c{i:02}", liver=v) for i, v in enumerate(a.tolist())]
    second = [case(f"c{i:02}", liver=v) for i, v in enumerate((a + gain).tolist())][
        ::-1
    ]  # order does not matter
    result = compare_evaluations(first, second)
    found = row(result, "liver", "dice")
    differences = np.array([s - f for f, s in zip(a.tolist(), (a + gain).tolist(), strict=True)])
    assert found["p"] == pytest.approx(wilcoxon(differences).pvalue, rel=1e-12)
    assert found["difference"] == pytest.approx(gain.mean(), rel=1e-9)
    assert found["ci95"][0] < found["difference"] < found["ci95"][1]
    assert (found["n"], found["better"], found["worse"]) == (25, (gain > 0).sum(), (gain < 0).sum())
    json.dumps(result, allow_nan=False)


def test_no_difference_has_no_p_value() -> None:
    cases = [case(f"c{i}") for i in range(5)]
    found = row(compare_evaluations(cases, cases), "tumour", "hd95_mm")
    assert (found["p"], found["p_holm"], found["difference"], found["equal"]) == (
        None,
        None,
        0.0,
        5,
    )


def test_undefined_and_unshared_cases_are_left_out() -> None:
    first = [case("a", tumour=0.1), case("b", tumour=None), case("only_a")]
    second = [case("a", tumour=0.3), case("b", tumour=0.9), case("only_b")]
    result = compare_evaluations(first, second)
    assert (result["n_cases"], result["only_a"], result["only_b"]) == (2, ["only_a"], ["only_b"])
    found = row(result, "tumour", "dice")
    assert (found["n"], found["mean_a"], found["mean_b"], found["better"]) == (1, 0.1, 0.3, 1)


def test_smaller_distance_is_better() -> None:
    first, second = [case("a"), case("b")], [case("a"), case("b")]
    for other, distance in zip(second, (0.2, 0.9), strict=True):
        other["liver"]["assd_mm"] = distance
        other["liver"]["rvd"] = -distance
    result = compare_evaluations(first, second)
    assert [row(result, "liver", "assd_mm")[key] for key in ("better", "worse")] == [1, 1]
    assert [row(result, "liver", "rvd")[key] for key in ("better", "worse")] == [1, 1]


def test_evaluations_without_common_cases_are_refused() -> None:
    with pytest.raises(UserError, match="no case in common"):
        compare_evaluations([case("a")], [case("b")])


def test_holm_correction() -> None:
    """Worked by hand: p = 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never falling."""
    assert apply_holm_correction([0.03, None, 0.01, 0.04, 0.02]) == pytest.approx(
        [0.06, None, 0.04, 0.06, 0.06]
    )
    assert apply_holm_correction([0.9, 0.8]) == [1.0, 1.0]


def test_folds_are_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"a0": ("c0", "c1"), "a1": ("c2",), "b0": ("c0", "c1"), "b1": ("c2",)}
    for folder, ids in names.items():
        ledger = Ledger(tmp_path / folder / "ledger", {"weights": folder})
        for case_id in ids:
            seed = int(case_id[1])
            scores = score_case(
                case_id, labels(seed + (folder[0] == "b")), labels(seed), (2.5, 0.7, 0.9)
            )
            ledger.write(case_id, scores)
        write_results(tmp_path / folder, ledger.read_all(), ledger=ledger)
    first, second = (",".join(str(tmp_path / f"{run}{fold}") for fold in (0, 1)) for run in "ab")
    assert main(["compare", first, second, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["n_cases"], result["only_a"], result["only_b"]) == (3, [], [])
    assert row(result, "liver", "dice")["worse"] == 3
    assert main(["compare", f"{tmp_path / 'a0'},{tmp_path / 'b0'}", second]) == 2
    assert "folds share no case" in capsys.readouterr().err
