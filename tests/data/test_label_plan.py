"""The classes of a store that is made of one or several sources."""

from typing import Any

import numpy as np
import pytest

from liverseg_dist.config import load_settings
from liverseg_dist.config.labels import LabelSettings
from liverseg_dist.data.io.source_labels import SourceLabels
from liverseg_dist.data.label_mapping import LabelMapping
from liverseg_dist.data.label_plan import LabelPlan, plan_labels
from liverseg_dist.errors import UserError
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.labels import IGNORE, LITS_SCHEME

LIVER = {"background": 0, "liver": 1, "tumor": 2}
ABDOMEN = {"background": 0, "spleen": 1, "right kidney": 2, "liver": 6}


def make_source(labels: dict[str, Any], **more: Any) -> SourceLabels:
    return SourceLabels("set", scheme_from_labels(labels), is_named=True, **more)


def make_settings(yaml: str) -> LabelSettings | None:
    return load_settings([], [f"convert.labels={yaml}"]).convert.labels


def classes_of(plan: LabelPlan, source: int, values: list[int]) -> list[int]:
    return map_values(plan.mappings[source], values)


def map_values(mapping: LabelMapping, values: list[int]) -> list[int]:
    label_zyx = np.array(values, dtype=np.uint8).reshape(1, 1, -1)
    return mapping.to_classes(label_zyx).reshape(-1).tolist()


def test_the_values_of_lits_stay_as_they_are() -> None:
    plan = plan_labels([SourceLabels("set")])
    assert plan.scheme == LITS_SCHEME
    assert plan.mappings[0].is_identity


def test_other_values_become_classes_without_gaps() -> None:
    plan = plan_labels([make_source(ABDOMEN)])
    assert plan.scheme.is_contiguous
    assert plan.scheme.class_names == ("background", "spleen", "right kidney", "liver")
    assert classes_of(plan, 0, [0, 1, 2, 6]) == [0, 1, 2, 3]


def test_sources_are_joined_by_the_names_of_their_structures() -> None:
    """The liver is 1 in one source and 6 in the other."""
    plan = plan_labels([make_source(LIVER), make_source(ABDOMEN)])
    liver = plan.scheme.structure("liver")
    spleen = plan.scheme.structure("spleen")
    first = classes_of(plan, 0, [0, 1, 2])
    second = classes_of(plan, 1, [0, 1, 2, 6])
    assert first[0] == second[0] == 0
    assert set(first[1:]) == set(liver.values)
    assert second[3] == first[1], "a liver without a tumour is one class in both"
    assert (second[1],) == spleen.values


def test_a_structure_that_a_source_does_not_name_is_not_annotated() -> None:
    plan = plan_labels([make_source(LIVER), make_source(ABDOMEN)])
    assert set(plan.mappings[0].annotated) == {"liver", "tumor"}
    assert set(plan.mappings[1].annotated) == {"spleen", "right kidney", "liver"}


def test_the_order_of_sources_does_not_change_the_structures() -> None:
    one = plan_labels([make_source(LIVER), make_source(ABDOMEN)]).scheme
    other = plan_labels([make_source(ABDOMEN), make_source(LIVER)]).scheme
    assert set(one.structure_names) == set(other.structure_names)
    for name in one.structure_names:
        assert one.structure(name).kind == other.structure(name).kind
        assert one.structure(name).inside == other.structure(name).inside
        assert len(one.structure(name).values) == len(other.structure(name).values)


def test_spellings_of_a_name_are_one_structure() -> None:
    other = {"background": 0, "Right_Kidney": 4}
    plan = plan_labels([make_source(ABDOMEN), make_source(other)])
    assert len(plan.scheme.structures) == 3
    assert classes_of(plan, 1, [4]) == classes_of(plan, 0, [2])


def test_settings_rename_merge_and_drop() -> None:
    labels = {"background": 0, "left kidney": 1, "right kidney": 2, "spleen": 3, "aorta": 4}
    settings = make_settings("{kidneys: [left kidney, 2], milt: spleen, '*': drop}")
    plan = plan_labels([make_source(labels)], settings)
    assert plan.scheme.structure_names == ("kidneys", "milt")
    assert classes_of(plan, 0, [0, 1, 2, 3, 4]) == [0, 1, 1, 2, 0]


def test_settings_state_kind_container_and_code() -> None:
    settings = make_settings(
        "{liver: {snomed: '10200004'}, metastasis: {from: tumor, kind: lesion, inside: liver}}"
    )
    plan = plan_labels([make_source(LIVER)], settings)
    liver, lesion = plan.scheme.structure("liver"), plan.scheme.structure("metastasis")
    assert (lesion.kind, lesion.inside, liver.snomed) == ("lesion", "liver", "10200004")
    assert set(lesion.values) < set(liver.values)


def test_the_ignore_value_of_a_source_is_kept_as_unknown() -> None:
    labels = {"background": 0, "liver": [1, 2], "tumour": 2, "ignore": 3}
    plan = plan_labels([make_source(labels, ignore=3)])
    assert classes_of(plan, 0, [3]) == [IGNORE]


def test_a_value_outside_of_the_scheme_is_not_known() -> None:
    mapping = plan_labels([make_source(ABDOMEN)]).mappings[0]
    assert mapping.knows(6)
    assert not mapping.knows(5)
    assert "6 liver" in mapping.expected


def test_dropping_the_others_accepts_every_value() -> None:
    mapping = plan_labels([make_source(ABDOMEN)], make_settings("{liver: , '*': drop}")).mappings[0]
    assert mapping.knows(77)
    assert map_values(mapping, [6, 77, 1]) == [1, 0, 0]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("{heart: }", "heart"),
        ("{organs: [liver, heart]}", "heart"),
        ("{'*': drop}", "no structure"),
        ("{liver: {inside: heart}}", "heart"),
    ],
)
def test_a_wrong_setting_is_one_line(yaml: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_labels([make_source(ABDOMEN)], make_settings(yaml))
    assert "\n" not in str(caught.value)
