"""Label schemes: every form of `labels` that the Decathlon and nnU-Net write, and every mistake in
them."""

import json
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.errors import UserError
from liverseg_dist.label_scheme import parse_label_options, read_label_scheme, scheme_from_labels
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure


def structures(scheme: LabelScheme) -> dict[str, tuple[tuple[int, ...], str, str | None]]:
    return {s.name: (s.values, s.kind, s.inside) for s in scheme.structures}


def test_the_default_is_lits_as_it_is_scored() -> None:
    labels = np.array([0, 1, 2, 255], dtype=np.uint8)
    assert LITS_SCHEME.mask_of(labels, "liver").tolist() == [False, True, True, False]
    assert LITS_SCHEME.mask_of(labels, "tumour").tolist() == [False, False, True, False]
    assert LITS_SCHEME.ignore == 255
    assert [s.name for s in LITS_SCHEME.lesions] == ["tumour"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param(
            {"0": "background", "1": "liver", "2": "cancer"},
            {"liver": ((1, 2), "organ", None), "cancer": ((2,), "lesion", "liver")},
            id="decathlon",
        ),
        pytest.param(
            {"background": 0, "liver": [1, 2], "tumour": 2, "ignore": 3},
            {"liver": ((1, 2), "organ", None), "tumour": ((2,), "lesion", "liver")},
            id="nnunet regions",
        ),
        pytest.param(
            {"background": "0", "liver": "1", "tumor": "2"},
            {"liver": ((1, 2), "organ", None), "tumor": ((2,), "lesion", "liver")},
            id="numbers as text",
        ),
        pytest.param(
            {"0": "background", "1": "liver", "2": "right kidney", "3": "left kidney"},
            {
                "liver": ((1,), "organ", None),
                "right kidney": ((2,), "organ", None),
                "left kidney": ((3,), "organ", None),
            },
            id="organs only",
        ),
        pytest.param(
            {"background": 0, "liver": 6, "kidney": 2, "liver_tumor": 7, "kidney cyst": 8},
            {
                "liver": ((6, 7), "organ", None),
                "kidney": ((2, 8), "organ", None),
                "liver_tumor": ((7,), "lesion", "liver"),
                "kidney cyst": ((8,), "lesion", "kidney"),
            },
            id="each lesion in the organ it names",
        ),
        pytest.param(
            {"0": "background", "1": "liver", "2": "spleen", "3": "tumour"},
            {
                "liver": ((1,), "organ", None),
                "spleen": ((2,), "organ", None),
                "tumour": ((3,), "lesion", None),
            },
            id="no guess between two organs",
        ),
        pytest.param(
            {"0": "background", "1": "Vessel", "2": "Tumour"},
            {"Vessel": ((1,), "organ", None), "Tumour": ((2,), "lesion", None)},
            id="a vessel holds no tumour",
        ),
        pytest.param(
            {"0": "background", "1": "colon cancer primaries"},
            {"colon cancer primaries": ((1,), "lesion", None)},
            id="a lesion alone",
        ),
        pytest.param(
            {"liver": 40},
            {"liver": ((40,), "organ", None)},
            id="no background named",
        ),
    ],
)
def test_labels_of_the_field(labels: dict, expected: dict) -> None:
    assert structures(scheme_from_labels(labels)) == expected


def test_ignore_is_nnunets_or_255() -> None:
    assert (
        scheme_from_labels({"background": 0, "liver": [1, 2], "tumour": 2, "ignore": 3}).ignore == 3
    )
    assert scheme_from_labels({"0": "background", "1": "liver"}).ignore == 255
    assert scheme_from_labels({"0": "background", "255": "liver"}).ignore is None


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({}, "mapping"),
        ([1, 2], "mapping"),
        ({"background": 0}, "no structure"),
        ({"background": 1, "liver": 2}, "always 0"),
        ({"background": 0, "liver": 300}, "0 to 255"),
        ({"background": 0, "liver": -1}, "0 to 255"),
        ({"background": 0, "liver": 1.5}, "label value"),
        ({"background": 0, "liver": True}, "label value"),
        ({"background": 0, "liver": []}, "no label value"),
        ({"background": 0, "liver": 0}, "background"),
        ({"background": 0, "liver": 1, "ignore": [2, 3]}, "one value"),
        ({"background": 0, "liver": 1, "ignore": 1}, "ignore"),
        ({"background": 0, "liver": 1, "Liver": 2}, "two structures"),
        ({"0": "background", "1": "liver", "2": "liver"}, "twice"),
        ({"0": "background", "1": 1}, "name"),
        ({"0": "background", "1": " "}, "cannot name"),
        ({"0": "background", "1": "a\nb"}, "cannot name"),
    ],
)
def test_a_wrong_scheme_is_refused(labels: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        scheme_from_labels(labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (Structure("tumour", (2,), "lesion", "spleen"), "no other structure"),
        (Structure("tumour", (2,), "lesion", "tumour"), "no other structure"),
        (Structure("tumour", (3,), "lesion", "liver"), "not in the scheme"),
        (Structure("tumour", (0,), "lesion", "liver"), "background"),
        (Structure("tumour", (1,), "lesion", "liver"), "do not include"),
        (Structure("tumour", (2,), "vessel", None), "organ or a lesion"),  # type: ignore[arg-type]
    ],
)
def test_structures_fit_their_scheme(structure: Structure, reason: str) -> None:
    values = ((0, "background"), (1, "liver"), (2, "tumour"))
    with pytest.raises(UserError, match=reason):
        LabelScheme(values, (Structure("liver", (1,)), structure))


def test_a_file_with_a_byte_order_mark_and_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}), encoding="utf-8-sig")
    assert read_label_scheme(file).structures[0].name == "liver"
    for content, reason in (("{}", "no labels"), ("{", "not valid JSON"), ("[]", "no labels")):
        file.write_text(content)
        with pytest.raises(UserError, match=reason) as caught:
            read_label_scheme(file)
        assert "dataset.json" in str(caught.value)
    file.write_text('{"labels": {"liver": 1, "liver": 2}}')
    with pytest.raises(UserError, match="twice"):
        read_label_scheme(file)


def test_options_name_structures(tmp_path: Path) -> None:
    scheme = parse_label_options(["liver=6,7", "hot spot:lesion=7"])
    assert structures(scheme) == {
        "liver": ((6, 7), "organ", None),
        "hot spot": ((7,), "lesion", "liver"),
    }
    assert scheme.drops_other_values
    assert parse_label_options([]) == LITS_SCHEME
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "spleen"}}')
    assert structures(parse_label_options([str(tmp_path)])) == {"spleen": ((1,), "organ", None)}
    for texts in (["liver"], ["liver=x"], ["liver=1", "liver=2"], ["liver:thing=1"]):
        with pytest.raises(UserError):
            parse_label_options(texts)


def test_a_scheme_survives_json() -> None:
    for scheme in (
        LITS_SCHEME,
        scheme_from_labels({"background": 0, "liver": [1, 2], "tumour": 2}),
    ):
        assert LabelScheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    with pytest.raises(UserError, match="damaged"):
        LabelScheme.from_json({"values": {}})


def test_unknown_values_are_found() -> None:
    assert LITS_SCHEME.unknown_values(np.array([0, 1, 2, 255, 9], dtype=np.uint8)) == [9]


def test_a_mapping_of_values_is_the_same_scheme() -> None:
    organ = Structure("spleen", (3,))
    scheme = LabelScheme({3: "spleen", 0: "background"}, [organ])  # type: ignore[arg-type]
    assert scheme == LabelScheme(((0, "background"), (3, "spleen")), (organ,))
    assert hash(scheme) == hash(LabelScheme(((0, "background"), (3, "spleen")), (organ,)))
