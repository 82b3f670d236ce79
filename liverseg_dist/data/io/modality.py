"""The channels that `dataset.json` names: modality and normalisation follow from the name.

CT is read as Hounsfield units, everything else as arbitrary units with a normalisation of each scan
(nnU-Net's rule). A run is used for the channels it was trained on only: `check_same_channels`
refuses a data set of others as a whole, before its scans are read, because some MR scans have
values that look like HU and would pass the audit of single scans.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from liverseg_dist.config import ChannelConfig
from liverseg_dist.config.channels import check_channel_names
from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import UserError, printable

AllowedModality = Literal["CT", "any"]
MODALITY_KEYS = ("modality", "channel_names")
"""Keys of `dataset.json`: of MSD and nnU-Net 1, and of nnU-Net 2."""
MAX_SHOWN_CHARACTERS = 80
CT_WORDS = frozenset({"ct", "cect", "ncct", "ldct", "cbct", "cta", "hu"})
CT_PHRASES = ("computed tomography", "computed axial tomography", "hounsfield")
MR_WORDS = frozenset(
    ("mr", "mri", "mra", "cmr", "mrt", "t1", "t2", "t1w", "t2w", "t1c", "t1ce", "t1gd", "pd", "pdw",
     "flair", "dwi", "adc", "swi", "dce", "bold")
)  # fmt: skip
NUCLEAR_WORDS = frozenset(("pet", "fdg", "suv", "spect"))
ULTRASOUND_WORDS = frozenset(("us", "ultrasound", "sonography"))
RADIOGRAPHY_WORDS = frozenset(("xray", "dx", "cr", "angiography", "mammography"))
PICTURE_WORDS = frozenset(("rgb", "rgba", "red", "green", "blue", "histology", "microscopy", "oct"))
OTHER_WORDS = NUCLEAR_WORDS | ULTRASOUND_WORDS | RADIOGRAPHY_WORDS | PICTURE_WORDS
MR_PHRASES = ("magnetic resonance",)
OTHER_PHRASES = ("positron emission", "single photon", "x ray")
MAX_CHANNELS = 64
MAX_CHANNEL_DIGITS = 4


def read_channels(index: str, entry: object) -> tuple[tuple[ChannelConfig, ...], list[Finding]]:
    """The channels that an entry `modality` or `channel_names` declares.

    Args:
        index: Name of the file, for messages.
        entry: {"0": "CT", "1": "T2"} (Decathlon, nnU-Net), a list of names, or one name.

    Returns:
        The channels; and a finding for each name of another modality than CT: info `not_ct`, or
        warning `modality_unknown` for a name that is in no list, such as nnU-Net's `zscore`.

    Raises:
        UserError: The numbers are not 0, 1, 2, ..., or a name is used twice.
    """
    names = _list_channel_names(index, entry)
    channels = []
    findings = []
    for number, name in enumerate(names):
        text = printable(name)[:MAX_SHOWN_CHARACTERS]
        kind = _classify_modality(text)
        channel_name = text.strip() or f"channel {number}"
        if kind == "CT":
            channels.append(ChannelConfig(name=channel_name))
            continue
        modality: Literal["MR", "other"] = "MR" if kind == "MR" else "other"
        channels.append(ChannelConfig(name=channel_name, modality=modality))
        if kind == "unknown":
            message = (
                f"{index} names modality {text}, which is not known; its voxels are read as "
                "arbitrary units (convert.channels can declare a CT)"
            )
            findings.append(Finding("warning", "modality_unknown", message))
        else:
            message = f"{index} names modality {text}, not CT; voxels are read as arbitrary units"
            findings.append(Finding("info", "not_ct", message))
    try:
        check_channel_names(channels)
    except ValueError as error:
        raise UserError(
            f"{index}: {error}; give each channel a name of its own, here or in convert.channels"
        ) from None
    return tuple(channels), findings


def _list_channel_names(index: str, entry: object) -> list[object]:
    """Names of the channels by their number."""
    if isinstance(entry, Mapping):
        numbers: dict[int, object] = {}
        for key, name in entry.items():
            digits = str(key).strip()
            if not (digits.isascii() and digits.isdigit() and len(digits) <= MAX_CHANNEL_DIGITS):
                raise UserError(f"{index}: {printable(key)[:40]!r} is not the number of a channel")
            numbers[int(digits)] = name
        names = [numbers[number] for number in sorted(numbers)]
        if sorted(numbers) != list(range(len(entry))):
            raise UserError(
                f"{index}: the channels have the numbers {', '.join(map(str, sorted(numbers)))}; "
                f"expected 0 to {len(entry) - 1}"
            )
    else:
        names = list(entry) if isinstance(entry, list) else [entry]
    if not 1 <= len(names) <= MAX_CHANNELS:
        raise UserError(f"{index}: names {len(names)} channels; 1 to {MAX_CHANNELS} are possible")
    return names


def refuse_other_modality(
    where: object, notes: Iterable[Finding], allowed: AllowedModality
) -> None:
    """Raise `UserError` if a data set has another modality than CT, unless `allowed` is any.

    For runs of one CT channel; `check_same_channels` compares any channels.

    Args:
        where: The data set, for the message.
        notes: Its findings, with those of `read_channels`.
        allowed: The setting `convert.modality` of the run.
    """
    for note in notes:
        if note.code == "not_ct" and allowed == "CT":
            raise UserError(
                f"{printable(where)}: {note.message}. The network was trained on CT: correct "
                "dataset.json if it is wrong, or set convert.modality=any to read the voxels as HU"
            )


def check_same_channels(
    where: object, found: Sequence[ChannelConfig], expected: Sequence[ChannelConfig]
) -> None:
    """Check that a data set has the channels of a run, in the same order.

    Names decide, regardless of case. One channel of the same modality may have another name (`CT`
    and `portal venous CT`).

    Args:
        where: The data set, for the message.
        found: Its channels.
        expected: The channels that the run was trained on.

    Raises:
        UserError: A channel is missing, is additional or stands in another place.
    """
    if [c.name.casefold() for c in found] == [c.name.casefold() for c in expected]:
        if [c.modality for c in found] == [c.modality for c in expected]:
            return
    elif len(found) == len(expected) == 1 and found[0].modality == expected[0].modality:
        return
    raise UserError(
        f"{printable(where)}: has the channels {describe_channels(found)}; the run was trained on "
        f"{describe_channels(expected)}"
    )


def describe_channels(channels: Sequence[ChannelConfig]) -> str:
    """`CT, T2 (MR)`: names with their modality, where it is not the name itself."""
    texts = []
    for channel in channels:
        same = channel.name.casefold() == channel.modality.casefold()
        texts.append(channel.name if same else f"{channel.name} ({channel.modality})")
    return ", ".join(texts)


def is_one_ct_channel(channels: Sequence[ChannelConfig]) -> bool:
    """Whether the images are one channel of CT, normalised by the HU of the data set."""
    return len(channels) == 1 and channels[0].is_ct and channels[0].intensity == "ct"


def _classify_modality(name: str) -> Literal["CT", "MR", "other", "unknown"]:
    # Words, not substrings: "CT" is contained in "direct".
    text = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    words = set(text.split())
    found = set()
    for kind, kind_words, phrases in (
        ("CT", CT_WORDS, CT_PHRASES),
        ("MR", MR_WORDS, MR_PHRASES),
        ("other", OTHER_WORDS, OTHER_PHRASES),
    ):
        if words & kind_words or any(phrase in text for phrase in phrases):
            found.add(kind)
    # "PET/CT" names two modalities, but a channel has one: it is unknown which of the two.
    if len(found) != 1:
        return "unknown"
    if "CT" in found:
        return "CT"
    return "MR" if "MR" in found else "other"
