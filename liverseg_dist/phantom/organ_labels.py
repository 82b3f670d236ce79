"""Which structures of a phantom are labelled, with which values, and how `dataset.json` names them.

Names are those of TotalSegmentator. The liver is a region of two values: its own, and that of its
tumours.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from liverseg_dist.errors import UserError, printable

LIVER, TUMOUR = "liver", "tumour"
ORGANS = (
    LIVER,
    "spleen",
    "kidney_right",
    "kidney_left",
    "stomach",
    "pancreas",
    "gallbladder",
    "aorta",
    "inferior_vena_cava",
    "portal_vein",
    "duodenum",
    "small_bowel",
    "colon",
    "esophagus",
)
"""Organs that the anatomy has, in the order of `--organs all`."""
GROUPS = {
    "all": ORGANS,
    "kidneys": ("kidney_right", "kidney_left"),
    "vena_cava": ("inferior_vena_cava",),
    "oesophagus": ("esophagus",),
}
"""Other names, and the organs they mean."""


@dataclass(frozen=True)
class LabelPlan:
    """The labelled structures. Values are their positions, from 1, which nnU-Net requires."""

    structures: tuple[str, ...]

    @property
    def values(self) -> dict[str, int]:
        """Label value of each structure; that of the liver is for voxels outside its tumours."""
        return {name: value for value, name in enumerate(self.structures, 1)}

    @property
    def has_region(self) -> bool:
        """Whether the liver consists of two values, because its tumours have their own."""
        return LIVER in self.structures and TUMOUR in self.structures

    def nnunet_labels(self) -> dict[str, int | list[int]]:
        """Return `labels` of nnU-Net's dataset.json: names and values, a list for the region."""
        labels: dict[str, int | list[int]] = {"background": 0, **self.values}
        if self.has_region:
            labels[LIVER] = [self.values[LIVER], self.values[TUMOUR]]
        return labels

    def decathlon_labels(self) -> dict[str, str]:
        """Return `labels` of the Decathlon's dataset.json: values and names.

        That form has no regions. Without other organs the names are those of Task03_Liver; with
        them, the name of the tumours states their organ.
        """
        tumour = "cancer" if self.structures == (LIVER, TUMOUR) else "liver tumour"
        labels = {"0": "background"}
        for name, value in self.values.items():
            labels[str(value)] = tumour if name == TUMOUR else name
        return labels


def parse_organs(text: str) -> LabelPlan:
    """Return the structures of `--organs`: a list of names with commas.

    The liver comes first and brings its tumours.

    Raises:
        UserError: A name is not known.
    """
    found = _parse_names(text, "--organs", (*ORGANS, *GROUPS))
    if LIVER in found:
        # Liver 1 and tumour 2, the values of Task03_Liver, in any order of the option.
        others = [name for name in found if name != LIVER]
        return LabelPlan((LIVER, TUMOUR, *others))
    return LabelPlan(tuple(found))


def select_annotated(plan: LabelPlan, text: str) -> LabelPlan:
    """Return the structures of `--annotate`, in the order of the plan.

    Raises:
        UserError: A name is not one of the plan's structures.
    """
    # A group with a member that the plan lacks cannot be annotated as a whole.
    groups = [name for name, members in GROUPS.items() if set(members) <= set(plan.structures)]
    wanted = set(_parse_names(text, "--annotate", (*plan.structures, *groups)))
    return LabelPlan(tuple(name for name in plan.structures if name in wanted))


def _parse_names(text: str, option: str, known: Iterable[str]) -> list[str]:
    """Return the names without duplicates, groups replaced by their members."""
    allowed = list(known)
    found: list[str] = []
    for part in text.split(","):
        name = part.strip().lower().replace(" ", "_")
        if name not in allowed:
            raise UserError(
                f"{option} {printable(text)}: {printable(part.strip())!r} is not known; "
                f"known names: {', '.join(allowed)}"
            )
        found += [member for member in GROUPS.get(name, (name,)) if member not in found]
    return found
