"""Compare what `liverseg follow` found on phantom patients with the truth about them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

FAR_MM = 15.0
"""Of a track from the place of its lesion; pieces of large lesions lie up to 20 mm from the
middle."""
FAR_PIECE_MM = 25.0


@dataclass
class Comparison:
    """Of lesions over several patients.

    Attributes:
        right: Lesions with the right status and partner.
        wrong: What is wrong with the others.
        errors_mm: Distance, in the baseline's space, between the mapped and the true place of
            lesions at later dates.
    """

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    errors_mm: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.right / max(1, self.right + len(self.wrong))


def expected_status(lesion: dict[str, Any]) -> str:
    if lesion["law"] in ("merge", "split"):
        return {"merge": "merged", "split": "split"}[lesion["law"]]
    if lesion["radius_mm"][0] == 0:
        return "new"
    return "vanished" if lesion["radius_mm"][-1] == 0 else "persistent"


def compare_patient(truth: dict[str, Any], content: dict[str, Any], found: Comparison) -> None:
    """Two dates. Each true lesion must be one track with the right status; a track may stand for
    one lesion only."""
    used: set[int] = set()
    places = {one["identity"]: np.array(one["centre_mm"][0]) for one in truth["lesions"]}
    for lesion in truth["lesions"]:
        name = f"{truth['patient']} lesion {lesion['identity']} ({lesion['law']})"
        # Which of two pieces carries the old lesion on is open: each is looked for around the whole.
        whole = places[lesion["split_from"]] if lesion["split_from"] else None
        place = np.array(lesion["centre_mm"][0]) if whole is None else whole
        candidates = []
        for track in content["lesions"]:
            distance = float(np.linalg.norm(np.array(track["centroid_mm"]) - place))
            if track["id"] not in used and distance <= (FAR_MM if whole is None else FAR_PIECE_MM):
                candidates.append((track["status"] != expected_status(lesion), distance, track))
        if not candidates:
            found.wrong.append(f"{name}: no track near")
            continue
        is_wrong, _, track = min(candidates, key=lambda one: one[:2])
        used.add(track["id"])
        if is_wrong:
            found.wrong.append(f"{name}: {track['status']}")
            continue
        found.right += 1
        if track["status"] == "persistent":
            found.errors_mm.append(float(np.linalg.norm(np.array(track["baseline_mm"][1]) - place)))
