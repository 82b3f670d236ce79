"""Access to the scores of a case by structure.

A case is the JSON-able dict of `metrics.case.score_case`. Cases of LiTS keep the form of the first
version: lesions and burden are entries of the case itself. All other cases have them within their
structure, because there may be several lesion structures. Everything that reads cases uses these
functions, so that no other code depends on the form.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from liverseg_dist.labels import LITS_SCHEME, LabelScheme

Case = dict[str, Any]
STRUCTURES_KEY = "structures"
LESION_SCORES_KEY = "lesion_scores"
BURDEN_KEY = "burden"


def list_structures(case: Case) -> tuple[str, ...]:
    """Names of all structures of the case's scheme, in the order of results."""
    return tuple(case.get(STRUCTURES_KEY, LITS_SCHEME.structure_names))


def find_scores(case: Case, structure: str) -> dict[str, Any] | None:
    """Overlap and surface scores of a structure; None where it was not annotated."""
    scores: dict[str, Any] | None = case.get(structure)
    return scores


def list_scored(case: Case) -> tuple[str, ...]:
    """Names of the structures that the case has scores of."""
    return tuple(name for name in list_structures(case) if find_scores(case, name) is not None)


def find_lesion_scores(case: Case, structure: str) -> dict[str, Any] | None:
    """`detection`, `detected_pairs` and `lesions` of a lesion structure, else None."""
    if STRUCTURES_KEY not in case:
        is_lesion = structure in {lesion.name for lesion in LITS_SCHEME.lesions}
        return case if is_lesion else None
    scores = find_scores(case, structure)
    return None if scores is None else scores.get(LESION_SCORES_KEY)


def find_burden(case: Case, structure: str) -> dict[str, float | None] | None:
    """Burden of a structure that lies inside another one, else None."""
    if STRUCTURES_KEY not in case:
        burden: dict[str, float | None] | None = case[BURDEN_KEY]
        return burden if LITS_SCHEME.structure(structure).inside is not None else None
    scores = find_scores(case, structure)
    return None if scores is None else scores.get(BURDEN_KEY)


def list_all_lesions(case: Case) -> list[tuple[str, dict[str, Any]]]:
    """(structure, lesion) of every listed lesion of a case."""
    found = []
    for structure in list_structures(case):
        scores = find_lesion_scores(case, structure)
        for lesion in scores["lesions"] if scores is not None else ():
            found.append((structure, lesion))
    return found


def find_common_structures(cases: Iterable[Case]) -> tuple[str, ...]:
    """Names of the structures of all cases, in the order of their first appearance."""
    names: dict[str, None] = {}
    for case in cases:
        names |= dict.fromkeys(list_structures(case))
    return tuple(names) or LITS_SCHEME.structure_names


def list_lesion_structures(cases: Sequence[Case]) -> tuple[str, ...]:
    """Names of the lesion structures that some case has scores of; those of LiTS without cases."""
    if not cases:
        return tuple(lesion.name for lesion in LITS_SCHEME.lesions)
    names: dict[str, None] = {}
    for case in cases:
        for structure in list_structures(case):
            if find_lesion_scores(case, structure) is not None:
                names[structure] = None
    return tuple(names)


def has_first_form(labels: LabelScheme) -> bool:
    """Whether cases of a scheme have the form of the first version.

    Names, kinds and containers decide; the class values do not, because cases hold none.
    """
    return _describe_form(labels) == _describe_form(LITS_SCHEME)


def _describe_form(labels: LabelScheme) -> list[tuple[str, str, str | None]]:
    # Without the container a tumour that lies in no organ would have no burden to read.
    return [(one.name, one.kind, one.inside) for one in labels.structures]


def has_first_form_of(cases: Sequence[Case]) -> bool:
    """Whether all of these cases have the form of the first version."""
    return not any(STRUCTURES_KEY in case for case in cases)


def structures_of_summary(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the structures of a summary; those of LiTS for schema 1."""
    return tuple(summary.get(STRUCTURES_KEY, LITS_SCHEME.structure_names))


def lesions_of_summary(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the structures of a summary whose lesions were counted."""
    return tuple(name for name in structures_of_summary(summary) if "detection" in summary[name])


def burdens_of_summary(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Burden by structure."""
    found = {}
    for name in structures_of_summary(summary):
        if "burden" in summary[name]:
            found[name] = summary[name]["burden"]
    # Schema 1 has one burden, that of the only lesion structure.
    if not found and BURDEN_KEY in summary:
        found[lesions_of_summary(summary)[0]] = summary[BURDEN_KEY]
    return found
