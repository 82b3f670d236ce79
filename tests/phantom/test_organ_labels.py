"""Labelled structures: names, values, and the labels of dataset.json as other code reads them."""

import pytest

from liverseg_dist.errors import UserError
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.phantom.organ_labels import ORGANS, parse_organs, select_annotated


def test_liver_comes_first_and_brings_its_tumours() -> None:
    plan = parse_organs("Spleen, kidneys,liver,kidney_left")
    assert plan.values == {
        "liver": 1, "tumour": 2, "spleen": 3, "kidney_right": 4, "kidney_left": 5,
    }  # fmt: skip
    assert parse_organs("vena cava").structures == ("inferior_vena_cava",)
    assert len(parse_organs("all").structures) == len(ORGANS) + 1 == 15


def test_labels_read_as_a_scheme_with_the_tumour_inside_the_liver() -> None:
    plan = parse_organs("liver,spleen,aorta")
    scheme = scheme_from_labels(plan.nnunet_labels())
    assert [s.name for s in scheme.structures] == ["liver", "tumour", "spleen", "aorta"]
    assert scheme.structure("liver").values == (1, 2)
    assert (scheme.structure("tumour").kind, scheme.structure("tumour").inside) == (
        "lesion",
        "liver",
    )
    # The Decathlon's form has no regions: the name of the tumour leads to its organ.
    scheme = scheme_from_labels(plan.decathlon_labels())
    assert scheme.structure("liver").values == (1, 2)
    assert scheme.structure("liver tumour").inside == "liver"
    assert scheme.structure("spleen").values == (3,)


def test_annotated_structures_have_consecutive_values() -> None:
    plan = parse_organs("liver,spleen,kidneys")
    assert select_annotated(plan, "tumour,liver").nnunet_labels() == {
        "background": 0, "liver": [1, 2], "tumour": 2,
    }  # fmt: skip
    assert select_annotated(plan, "kidneys,spleen").values == {
        "spleen": 1, "kidney_right": 2, "kidney_left": 3,
    }  # fmt: skip
    only_liver = select_annotated(plan, "liver")
    assert only_liver.nnunet_labels() == {"background": 0, "liver": 1}
    assert not only_liver.has_region


@pytest.mark.parametrize("text", ["", "liver,", "lung", "liver,Heart", "tumour", "all\n"])
def test_unknown_organ_is_refused_with_the_known_names(text: str) -> None:
    if text == "all\n":
        assert parse_organs(text) == parse_organs("all")
        return
    with pytest.raises(
        UserError, match=r"--organs .* is not known; known names: liver, spleen, .*"
    ):
        parse_organs(text)


def test_annotate_takes_structures_of_the_set_only() -> None:
    with pytest.raises(
        UserError, match=r"'kidneys' is not known; known names: liver, tumour, spleen$"
    ):
        select_annotated(parse_organs("liver,spleen"), "kidneys")
