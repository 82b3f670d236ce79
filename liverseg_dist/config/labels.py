"""Settings that choose the structures of a store from the labels of its sources (`convert.labels`).

labels:
  liver: {kind: organ, snomed: "10200004"}          # the label of that name
  tumour: {from: cancer, kind: lesion, inside: liver}    # renamed
  kidneys: [right kidney, left kidney]                   # merged
  vessels: 7                                             # by label value
  spleen: drop                                           # becomes background
  "*": drop                                              # all labels that are not named here
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator

from liverseg_dist.config.base import Section
from liverseg_dist.labels import LARGEST_VALUE, StructureKind

OTHER_LABELS = "*"
"""Key for the labels that no other key names; its value is keep or drop."""
DROP, KEEP = "drop", "keep"
LabelValue = Annotated[int, Field(ge=1, le=LARGEST_VALUE, strict=True)]
LabelName = Annotated[str, Field(min_length=1, max_length=100)]


class StructureConfig(Section):
    """One structure of the stored labels."""

    # `from` is a word of Python; the settings file has it nevertheless, because it reads best.
    from_labels: tuple[LabelValue | LabelName, ...] | None = Field(
        default=None,
        validation_alias=AliasChoices("from", "from_labels"),
        serialization_alias="from",
    )
    """Names or values of the source's labels whose union is the structure; null: the label of the
    structure's own name."""
    kind: StructureKind | None = None
    """organ: measured as a whole; lesion: component by component; null: as its name suggests."""
    inside: LabelName | None = None
    """Structure that contains this one; its voxels count as voxels of the container too."""
    snomed: str | None = Field(default=None, pattern=r"^[0-9]{6,18}$")
    """SNOMED CT code."""
    drop: bool = False
    """The label becomes background."""

    @field_validator("from_labels", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A single label is a list of one."""
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, (list, tuple)) and not value:
            raise ValueError("names no label; give a name or a value, or drop the structure")
        return value

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """`kidneys: [right kidney, left kidney]` is short for `kidneys: {from: [...]}`."""
        if value is None or value == KEEP:
            return {}
        if value == DROP:
            return {"drop": True}
        if isinstance(value, (str, int, list, tuple)) and not isinstance(value, bool):
            return {"from": value}
        return value


LabelSettings = dict[LabelName, StructureConfig]
ENTRY_KEYS = "from, kind, inside, snomed, drop"


def parse_label_settings(value: object) -> object:
    """`convert.labels` as structures by name; values that are no mapping are returned unchanged.

    Raises:
        ValueError: An entry is wrong; the message names it. pydantic's own message would name
            `convert.labels` only.
    """
    if not isinstance(value, Mapping):
        return value
    structures: dict[str, StructureConfig] = {}
    for name, entry in value.items():
        try:
            structures[str(name)] = StructureConfig.model_validate(entry)
        except ValidationError as error:
            raise ValueError(f"{name}: {_describe_entry_error(error)}") from None
    check_label_settings(structures)
    return structures


def _describe_entry_error(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if problem["type"] == "extra_forbidden":
        return f"{key} is no setting of a structure; known are {ENTRY_KEYS}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return (
            f"{problem['input']!r} is neither {KEEP}, {DROP}, a label, a list of labels nor a "
            f"mapping with {ENTRY_KEYS}"
        )
    return f"{key} = {problem['input']!r}: {message[:1].lower()}{message[1:]}"


def check_label_settings(settings: Mapping[str, StructureConfig]) -> None:
    """Raises `ValueError` for settings that name no structure, or one twice."""
    seen: dict[str, str] = {}
    for name, entry in settings.items():
        key = name.casefold()
        if key in seen:
            raise ValueError(
                f"structures {seen[key]} and {name} differ in upper and lower case only"
            )
        seen[key] = name
        if name == OTHER_LABELS and entry.from_labels:
            raise ValueError(f'"{OTHER_LABELS}" stands for all other labels; it is keep or drop')
        if key == "background" and not entry.drop:
            raise ValueError("background is everything that is no structure; drop the label")
    if not settings:
        raise ValueError(
            "names no label; omit convert.labels to keep those of the data set, or name structures"
        )
