"""`audit.html`: every scan with its picture, status and findings.

The page shows in a minute what a conversion stored, repaired and left out. `commands.convert`
writes it beside the store.
"""

import base64
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from liverseg_dist.data.audit.anatomy import code_name
from liverseg_dist.data.conversion.thumbnail import colour_of
from liverseg_dist.data.io.modality import describe_channels, is_one_ct_channel
from liverseg_dist.data.store.layout import TRAIN_ONLY
from liverseg_dist.data.store.metadata_checks import parse_channels, parse_intensities
from liverseg_dist.errors import printable
from liverseg_dist.files import natural_key
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.pages import PADDING_RGB, hex_colour, load_theme
from liverseg_dist.texts.names import list_some

STATUS_ORDER = ("quarantined", "excluded", "repaired", "imputed", "unlabelled", "kept")
"""Worst first."""
MAX_PICTURES = 500
"""Embedded, of the worst scans first: no browser opens a page with 10,000 pictures."""
MAX_SETTING_CHARACTERS = 120
SHORTENED_CHARACTERS = 40
MAX_STRUCTURES = 20


def render_audit_page(root: Mapping[str, Any], thumbnails: Mapping[str, Path]) -> str:
    """Render the audit of a store as a self-contained HTML page.

    Args:
        root: The store's root attributes.
        thumbnails: Picture file (PNG) by scan name.

    Returns:
        HTML. All text that comes from data is escaped.
    """
    environment = Environment(
        loader=PackageLoader("liverseg_dist.data.audit", "templates"),
        autoescape=select_autoescape(["html.j2"]),
        # A misspelt name in the template fails instead of printing nothing.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    entries = sorted(
        root["audit"].items(), key=lambda item: (_severity_key(item[1]), natural_key(item[0]))
    )
    parts = _map_case_parts(root["splits"])
    labels = LabelScheme.from_json(root["labels"])
    scans = []
    for number, (name, entry) in enumerate(entries):
        picture = thumbnails.get(name) if number < MAX_PICTURES else None
        scans.append(_build_scan_entry(name, entry, picture, parts, labels))
    return environment.get_template(
        "audit.html.j2"
    ).render(
        root=root,
        # The theme is a file of this package and holds no text from data.
        theme=Markup(load_theme()),  # nosec B704
        padding=hex_colour(PADDING_RGB),
        legend=_list_legend(labels),
        coverage=_describe_coverage(root["coverage"], labels),
        shown=_describe_shown(labels),
        scans=scans,
        pictures=MAX_PICTURES if len(entries) > MAX_PICTURES else 0,
        counts=_count_statuses(root["audit"]),
        settings=_flatten_settings(root["convert"]),
        intensities=[f"{line[0].upper()}{line[1:]}" for line in describe_intensities(root)],
    )


def describe_intensities(root: Mapping[str, Any]) -> list[str]:
    """The channels of a store if they are not one CT, and the normalisation of each, as lines.

    Args:
        root: The store's root attributes.
    """
    channels = parse_channels(root)
    intensities = parse_intensities(root, len(channels))
    has_other_channels = not is_one_ct_channel(channels)
    lines = [f"channels: {describe_channels(channels)}"] if has_other_channels else []
    cases = root["cases"].values()
    for number, (channel, intensity) in enumerate(zip(channels, intensities, strict=True)):
        text = f"intensity of {channel.name}" if has_other_channels else "intensity"
        if intensity is None:
            text += f": {channel.intensity} of each scan"
        else:
            text += (
                f": {intensity.lower_hu:g} to {intensity.upper_hu:g} HU is mapped to 0 to 1, "
                f"then (v - {intensity.mean:.4f}) / {intensity.std:.4f}"
            )
        absent = sum("present" in case and not case["present"][number] for case in cases)
        if absent:
            text += f"; absent in {absent} of {len(cases)} cases"
        lines.append(text)
    return lines


def _map_case_parts(splits: Mapping[str, Any]) -> dict[str, str]:
    """Case id -> name of its part of the splits."""
    parts = dict.fromkeys(splits["test"], "test")
    parts |= dict.fromkeys(splits.get(TRAIN_ONLY, []), "training only")
    for number, fold in enumerate(splits["folds"]):
        parts |= dict.fromkeys(fold, f"fold {number}")
    return parts


def _count_statuses(audit: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int]]:
    counts = Counter(entry["status"] for entry in audit.values())
    return [(status, counts[status]) for status in STATUS_ORDER if counts[status]]


def _severity_key(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Sort key: worst status first, then most errors and warnings first."""
    status = STATUS_ORDER.index(entry["status"]) if entry["status"] in STATUS_ORDER else 0
    problems = sum(finding["severity"] != "info" for finding in entry["findings"])
    return status, -problems


def _build_scan_entry(
    name: str,
    entry: Mapping[str, Any],
    picture: Path | None,
    parts: Mapping[str, str],
    labels: LabelScheme,
) -> dict[str, Any]:
    """The fields of one scan in the template."""
    case_parts = {parts[case_id] for case_id in entry["stored_as"] if case_id in parts}
    return {
        "name": name,
        "status": entry["status"],
        "findings": entry["findings"],
        "lines": _describe_facts(entry["facts"], labels),
        "part": ", ".join(sorted(case_parts)),
        "picture": _encode_picture(picture),
    }


def _describe_facts(facts: Mapping[str, Any], labels: LabelScheme) -> list[str]:
    """Lines on size and labelled volumes; an unreadable scan has neither."""
    lines = []
    if "shape_zyx" in facts:
        shape = " × ".join(map(str, facts["shape_zyx"]))
        spacing = " × ".join(f"{mm:.3g}" for mm in facts["spacing_mm"])
        lines.append(f"{shape} voxels (z, y, x) of {spacing} mm, {facts['orientation']}")
    if "channels" in facts:
        channels = []
        for channel in facts["channels"]:
            absent = "" if channel["present"] else " (absent)"
            channels.append(f"{channel['name']}{absent}")
        lines.append(f"channels: {', '.join(channels)}")
    if "volumes_ml" in facts:
        lines.append(_describe_volumes(facts, labels))
    if "annotated" in facts:
        names = list_some([printable(name) for name in facts["annotated"]], MAX_STRUCTURES)
        lines.append(f"annotated: {names or 'nothing'}")
    return lines


def _describe_volumes(facts: Mapping[str, Any], labels: LabelScheme) -> str:
    """`liver 1500 ml, 2 tumours 12.3 ml`."""
    class_volumes = [0.0, *facts["volumes_ml"].values()]
    parts = []
    for structure in labels.structures:
        volume_ml = sum(class_volumes[value] for value in structure.values)
        name = printable(structure.name)
        if structure.kind == "lesion":
            count = facts.get(f"{code_name(structure)}s", 0)
            if count:
                counted = f"1 {name}" if count == 1 else f"{count} {name}s"
                parts.append(f"{counted} {volume_ml:.1f} ml")
        elif volume_ml or len(labels.organs) == 1:
            parts.append(f"{name} {volume_ml:.0f} ml")
    return list_some(parts, MAX_STRUCTURES)


def _list_legend(labels: LabelScheme) -> list[tuple[str, str]]:
    """(colour, name) of each structure's outline."""
    entries = []
    for structure in labels.structures:
        colour = hex_colour(colour_of(structure, labels))
        if LITS_SCHEME.find(structure.name) is not None:
            # The theme has the colours of these structures, for light and dark pages.
            colour = f"var(--{structure.name})"
        entries.append((colour, structure.name))
    return entries


def _describe_coverage(coverage: Mapping[str, Any], labels: LabelScheme) -> Markup:
    """What the slabs hold of all labels, as HTML; empty without labels."""
    if not coverage:
        return Markup("")
    organs, lesions, losses = [], [], []
    for structure in labels.structures:
        percent = f"{100 * coverage[f'{structure.name}_inside']:.2f} % of all"
        if structure.kind == "organ":
            organs.append(f"{percent} labelled {printable(structure.name)}")
            continue
        key = f"{structure.name}s"
        lesions.append(f"{percent} {printable(structure.name)} voxels")
        losses.append(
            f"of {coverage[key]} {printable(key)} {coverage[f'{key}_cut']} are cut,\n"
            f"{coverage[f'{key}_missed']} missed, {coverage[f'{key}_vanished']} too small for the "
            "slab's voxels"
        )
    shares = list_some(organs, MAX_STRUCTURES)
    if lesions:
        shares = " and\n".join(filter(None, [shares, list_some(lesions, MAX_STRUCTURES)]))
    text = escape(f"The slabs hold {'; '.join([shares, *losses])}.")
    # Names are escaped above; an apostrophe needs no escape between tags.
    return Markup(str(text).replace("&#39;", "'"))  # nosec B704


def _describe_shown(labels: LabelScheme) -> str:
    """Which slices the pictures show, as `thumbnail` chooses them."""
    lesions = list_some([printable(item.name) for item in labels.lesions], 3)
    organs = list_some([printable(item.name) for item in labels.organs], 3)
    return ", or else the most ".join(filter(None, [lesions, organs]))


def _encode_picture(file: Path | None) -> str:
    """The file in base64; empty if there is no picture or it cannot be read."""
    if file is None:
        return ""
    try:
        return base64.b64encode(file.read_bytes()).decode()
    # The page is written also if a picture is missing.
    except OSError:
        return ""


def _flatten_settings(
    content: Mapping[str, Any], prefix: str = "convert."
) -> list[tuple[str, str]]:
    """(dotted key, value) of nested settings. Long values, such as weights, are shortened."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            rows += _flatten_settings(value, f"{prefix}{key}.")
            continue
        text = str(value)
        # Weights of the denoiser, as text, would fill pages.
        if len(text) > MAX_SETTING_CHARACTERS:
            text = f"{text[:SHORTENED_CHARACTERS]}... ({len(text):,} characters)"
        rows.append((f"{prefix}{key}", text))
    return rows
