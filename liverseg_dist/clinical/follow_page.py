"""`follow.html` and `follow.csv`: what a reader needs in a minute - response, table of lesions,
curves, aligned slices."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from liverseg_dist.clinical.charts import draw_sums, draw_volumes
from liverseg_dist.clinical.follow_up import FollowUp, TimePoint
from liverseg_dist.clinical.page import render_page
from liverseg_dist.clinical.pictures import draw_position
from liverseg_dist.clinical.tables import csv_text
from liverseg_dist.labels import LabelScheme

MAX_SERIES = 16
"""Lesions with a row of slices: targets first, then by volume."""
WINDOW_MM = 110.0
FOLLOW_COLUMNS = (
    "lesion", "structure", "status", "confidence", "is_target", "merged_into", "split_from",
    "date_index", "date", "day", "state",
    "lesion_number", "volume_ml", "volume_sd_ml", "long_axis_mm", "short_axis_mm", "is_lower_bound",
)  # fmt: skip
CATEGORY_TAGS = {"CR": "good", "PR": "good", "SD": "", "PD": "bad", "NE": "warn"}


def follow_csv(content: Mapping[str, Any]) -> str:
    """A row per lesion and date."""
    rows = []
    targets = set(content["response"]["targets"])
    for lesion in content["lesions"]:
        for index in range(len(content["scans"])):
            rows.append(
                {
                    "lesion": lesion["id"],
                    "is_target": lesion["id"] in targets,
                    **{
                        key: lesion[key]
                        for key in (
                            "structure",
                            "status",
                            "confidence",
                            "merged_into",
                            "split_from",
                        )
                    },
                    "date_index": index,
                    "date": content["dates"][index] if content["dates"] else None,
                    "day": content["days"][index] if content["days"] else None,
                    "state": lesion["states"][index],
                    "lesion_number": lesion["lesion_numbers"][index],
                    "volume_ml": lesion["volume_ml"][index],
                    "volume_sd_ml": lesion["volume_sd_ml"][index],
                    "long_axis_mm": lesion["long_axis_mm"][index],
                    "short_axis_mm": lesion["short_axis_mm"][index],
                    "is_lower_bound": lesion["is_lower_bound"][index],
                }
            )
    return csv_text(FOLLOW_COLUMNS, rows)


def draw_series(
    follow: FollowUp, points: Sequence[TimePoint], scheme: LabelScheme
) -> dict[int, list[dict[str, Any] | None]]:
    """For each shown lesion the slices of all dates, centred on the place where the lesion lies or
    lay."""
    targets = set(follow.content["response"]["targets"])

    def importance(track_number: int) -> tuple[bool, float]:
        lesion = follow.content["lesions"][track_number]
        # False sorts before True: targets come first, then the largest volume at any date.
        return lesion["id"] not in targets, -max(volume or 0.0 for volume in lesion["volume_ml"])

    order = sorted(range(len(follow.tracks)), key=importance)[:MAX_SERIES]
    series = {}
    for number in order:
        track = follow.tracks[number]
        centre = np.array(follow.content["lesions"][number]["centroid_mm"])
        pictures = []
        for date, point in enumerate(points):
            index = track.numbers[date]
            lesion = None if index is None else point.quantities.lesions[index]
            # The centroid is in the baseline's world; each scan has its own.
            to_scan = follow.registrations[date].of_structure(track.structure)
            at = to_scan.to_moving(centre[None])[0]
            pictures.append(
                draw_position(
                    point.mask, scheme, track.structure, at, WINDOW_MM, point.image, lesion
                )
            )
        series[track.identity] = pictures
    return series


def render_follow(
    title: str,
    content: Mapping[str, Any],
    series: Mapping[int, Sequence[Mapping[str, Any] | None]],
) -> str:
    """The page's text."""
    labels = content["dates"] or [f"scan {index}" for index in range(1, len(content["scans"]) + 1)]
    by_identity = {lesion["id"]: lesion for lesion in content["lesions"]}
    shown = [
        {"lesion": by_identity[identity], "pictures": pictures}
        for identity, pictures in series.items()
    ]
    response = content["response"]
    return render_page(
        "follow.html.j2",
        title=title,
        content=content,
        response=response,
        targets=set(response["targets"]),
        labels=labels,
        scan_names=_scan_names(content, labels),
        burden=_describe_burden(content["total"]["burden"]),
        describe_partners=describe_partners,
        shown=shown,
        volumes_chart=draw_volumes(content, labels),
        sums_chart=draw_sums(content, labels) if response["sums_mm"] else Markup(""),
        tag=CATEGORY_TAGS.get(response["recist"], ""),
        tags=CATEGORY_TAGS,
        format_doubling=format_doubling,
        describe_fit=describe_fit,
    )


def _scan_names(content: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    """Date or number of each scan, with the name of its file."""
    return [f"{label} ({name})" for label, name in zip(labels, content["scans"], strict=True)]


def _describe_burden(burdens: Sequence[float | None]) -> str:
    """Share of the organ at the first and the last date, where the lesions lie in one."""
    first, last = burdens[0], burdens[-1]
    if first is None or last is None:
        return ""
    return f"; {100 * first:.1f} → {100 * last:.1f} % of the organ"


def describe_partners(lesion: Mapping[str, Any], lesions: Sequence[Mapping[str, Any]]) -> str:
    """With which lesions one merged, or from which one it split, as text after the status."""
    if lesion["merged_into"]:
        return f" into {lesion['merged_into']}"
    if lesion["split_from"]:
        return f" from {lesion['split_from']}"
    partners = []
    for other in lesions:
        if lesion["id"] in (other["merged_into"], other["split_from"]):
            partners.append(str(other["id"]))
    # A lesion that took another one in, or that lost a piece, carries the number on.
    word = {"merged": " with ", "split": ": also "}.get(lesion["status"])
    return word + ", ".join(partners) if word and partners else ""


def describe_fit(growth: Mapping[str, Any] | None) -> str:
    """Which growth law describes a lesion best; known with four dates and more."""
    if growth is None or growth["best_model"] is None:
        return ""
    return f"best fit of four dates and more: {growth['best_model']}"


def format_doubling(growth: Mapping[str, Any] | None) -> str:
    """Doubling or halving time with its interval, in days; an asterisk where the growth is within the
    measurement error."""
    if growth is None or growth["doubling_days"] is None:
        return "–"
    days = growth["doubling_days"]
    kind = "doubles" if days > 0 else "halves"
    if not growth["is_significant"]:
        return f"{kind} in {abs(days):.0f} d *"
    # Halving times are negative; their ends change order with the sign.
    ends = [abs(end) for end in growth["doubling_interval"] if end is not None]
    return f"{kind} in {abs(days):.0f} d ({min(ends):.0f}–{max(ends):.0f})"
