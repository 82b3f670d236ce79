"""`liverseg follow` on phantom patients whose truth is known: matched lesions, centre error, response.

  python tools/bench/follow_up.py OUT [--patients 40] [--seed 11] [--registration auto] [--masks-only]

Makes the patients (a baseline and one later date, with breathing, another position and other slices),
follows them by `liverseg follow --table`, and compares each `follow.json` with the truth:

- matched: each true lesion is one track with the right status (persistent, new, vanished, merged, split);
- centre error, mm: of each persistent lesion the centroid at the later date, brought to the baseline
  by the registration, against its centroid at the baseline; and against the true centre there, which
  adds the lumps of the lesion's outline (its centroid lies 1.3 mm from the centre it was drawn
  around);
- response: RECIST 1.1 from the laws by which the lesions change. It is compared where the truth is
  further from every threshold than the measurement error (95 %).

Both steps continue where they were stopped.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.clinical.growth import Z95, diameter_sd_mm
from liverseg_dist.evaluation.ledger import encode_file_name

FAR_MM = 15.0
"""Of a track from the place of its lesion; pieces of large lesions lie up to 20 mm from the
middle."""
FAR_PIECE_MM = 25.0
MEASURABLE_MM, MAX_TARGETS = 10.0, 2
"""RECIST 1.1: all lesions lie in one organ, so two targets at most."""
Lesion = dict[str, Any]


@dataclass
class Comparison:
    """Of lesions over several patients.

    Attributes:
        right: Lesions with the right status and partner.
        wrong: What is wrong with the others.
        errors_mm: Distance of the two centroids of a persistent lesion after registration.
        truth_errors_mm: Distance of the later one to the true centre.
        responses: (patient, true category, category that was found) outside the measurement error.
        targets: As `responses`, of the target lesions alone: a new lesion makes most patients PD.
        borderline: Patients whose true sum lies within the measurement error of a threshold.
    """

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    errors_mm: list[float] = field(default_factory=list)
    truth_errors_mm: list[float] = field(default_factory=list)
    responses: list[tuple[str, str, str]] = field(default_factory=list)
    targets: list[tuple[str, str, str]] = field(default_factory=list)
    borderline: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.right / max(1, self.right + len(self.wrong))

    @property
    def wrong_responses(self) -> list[tuple[str, str, str]]:
        return [one for one in (*self.responses, *self.targets) if one[1] != one[2]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for phantoms and results")
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--registration", default="auto")
    parser.add_argument("--masks-only", action="store_true", help="register without the scans")
    args = parser.parse_args()
    phantoms = args.out / "phantoms"
    run("phantom", phantoms, "--cases", args.patients, "--follow-up", 1, "--seed", args.seed)
    results = args.out / f"{args.registration}{'-masks' if args.masks_only else ''}"
    table = write_table(phantoms, with_images=not args.masks_only)
    run("follow", "--table", table, "--registration", args.registration, "--out", results)
    truths = json.loads((phantoms / "follow_up.json").read_text())["patients"]
    found = Comparison()
    for truth in truths:
        content = read_result(results, truth["patient"])
        if content is None:
            # Such as a pair that is taken for two patients; the command has said why.
            found.wrong += [f"{truth['patient']}: not followed"] * len(truth["lesions"])
        else:
            compare_patient(truth, content, found)
    print_table(found, len(truths))


def run(*arguments: object) -> None:
    """A command; a patient that cannot be followed does not stop the comparison."""
    subprocess.run([sys.executable, "-m", "liverseg_dist", *map(str, arguments)], check=False)


def write_table(phantoms: Path, with_images: bool) -> Path:
    """The table of all patients, without the scans where only the masks are to be used."""
    table = phantoms / "visits.csv"
    if with_images:
        return table
    rows = [line.rsplit(",", 1)[0] for line in table.read_text().splitlines()]
    masks_only = phantoms / "visits_masks.csv"
    masks_only.write_text("\n".join(rows) + "\n")
    return masks_only


def read_result(results: Path, patient: str) -> dict[str, Any] | None:
    file = results / "patients" / encode_file_name(patient) / "follow.json"
    return json.loads(file.read_text()) if file.is_file() else None


def expected_status(lesion: Lesion) -> str:
    if lesion["law"] in ("merge", "split"):
        return {"merge": "merged", "split": "split"}[lesion["law"]]
    if lesion["radius_mm"][0] == 0:
        return "new"
    return "vanished" if lesion["radius_mm"][-1] == 0 else "persistent"


def compare_patient(truth: dict[str, Any], content: dict[str, Any], found: Comparison) -> None:
    """Two dates. Each true lesion must be one track with the right status; a track may stand for
    one lesion only."""
    used: set[int] = set()
    tracks: dict[int, Lesion] = {}
    places = {one["identity"]: np.array(one["centre_mm"][0]) for one in truth["lesions"]}
    for lesion in truth["lesions"]:
        name = f"{truth['patient']} lesion {lesion['identity']} ({lesion['law']})"
        # Which of two pieces carries the old lesion on is open: each is looked for around the whole.
        whole = places[lesion["split_from"]] if lesion["split_from"] else None
        place = places[lesion["identity"]] if whole is None else whole
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
        tracks[lesion["identity"]] = track
        if is_wrong:
            found.wrong.append(f"{name}: {track['status']}")
            continue
        found.right += 1
        first, last = track["baseline_mm"]
        if track["status"] == "persistent":
            found.errors_mm.append(float(np.linalg.norm(np.subtract(last, first))))
            found.truth_errors_mm.append(float(np.linalg.norm(np.subtract(last, place))))
    compare_response(truth, tracks, content, found)


def compare_response(
    truth: dict[str, Any],
    tracks: dict[int, Lesion],
    content: dict[str, Any],
    found: Comparison,
) -> None:
    """RECIST 1.1 by the laws of the phantom, against the category that was found.

    A long axis at the later date is the one at baseline times the ratio of the true radii; which
    lesion is which is the phantom's knowledge. Two balls that merge are measured as one.
    """
    lesions = truth["lesions"]
    # Sizes at baseline are measured: the phantom knows volumes, not long axes of lumpy lesions.
    baseline = {}
    for lesion in lesions:
        track = tracks.get(lesion["identity"])
        if lesion["radius_mm"][0] > 0 and track is not None and track["long_axis_mm"][0]:
            baseline[lesion["identity"]] = track["long_axis_mm"][0]
    measurable = [name for name in baseline if baseline[name] >= MEASURABLE_MM]
    targets = sorted(measurable, key=lambda name: -baseline[name])[:MAX_TARGETS]
    before = [baseline[name] for name in targets]
    after = expected_axes_mm(lesions, targets, baseline)
    category, is_clear = true_response(lesions, targets, baseline, before, after)
    of_targets, targets_clear = true_target_response(before, after)
    if targets and targets_clear:
        target = content["response"]["dates"][-1]["target"]
        found.targets.append((truth["patient"], of_targets, target))
    if is_clear:
        found.responses.append((truth["patient"], category, content["response"]["recist"]))
    else:
        found.borderline.append(truth["patient"])


def expected_axes_mm(
    lesions: Sequence[Lesion], targets: Sequence[int], baseline: dict[int, float]
) -> list[float]:
    """Long axes of the targets and of what became of them at the later date."""
    by_identity = {lesion["identity"]: lesion for lesion in lesions}
    axes = []
    joined: set[int] = set()
    for name in targets:
        lesion = by_identity[name]
        first, last = lesion["radius_mm"]
        # From the nominal patient's millimetres to this one's, and the shape of the lesion.
        scale = baseline[name] / (2 * first)
        if lesion["law"] == "merge":
            family = lesion["merged_into"] or name
            if family not in joined:
                joined.add(family)
                axes.append(merged_axis_mm(lesions, family, scale))
        elif lesion["law"] == "split":
            pieces = [one for one in lesions if one["split_from"] == name]
            axes += [2 * scale * one["radius_mm"][1] for one in (lesion, *pieces)]
        elif last > 0:
            axes.append(2 * scale * last)
    return axes


def merged_axis_mm(lesions: Sequence[Lesion], family: int, scale: float) -> float:
    """Longest axial diameter of two overlapping balls: through both, where they lie side by side."""
    pair = [one for one in lesions if family in (one["identity"], one["merged_into"])]
    apart = np.subtract(pair[0]["centre_mm"][1], pair[1]["centre_mm"][1])
    radius = scale * max(one["radius_mm"][1] for one in pair)
    in_plane, along_z = float(np.hypot(apart[0], apart[1])), abs(float(apart[2]))
    # A slice at height z cuts balls of radius r at -h/2 and h/2: half chords of both and their gap.
    heights = np.linspace(-along_z / 2 - radius, along_z / 2 + radius, 801)
    low = np.sqrt(np.maximum(radius**2 - (heights + along_z / 2) ** 2, 0.0))
    high = np.sqrt(np.maximum(radius**2 - (heights - along_z / 2) ** 2, 0.0))
    both = np.where((low > 0) & (high > 0), in_plane + low + high, 0.0)
    return float(np.maximum(both, np.maximum(2 * low, 2 * high)).max())


def true_response(
    lesions: Sequence[Lesion],
    targets: Sequence[int],
    baseline: dict[int, float],
    before: Sequence[float],
    after: Sequence[float],
) -> tuple[str, bool]:
    """(category, whether the truth is clear of all thresholds by the measurement error)."""
    if any(lesion["law"] == "appear" and lesion["radius_mm"][1] > 0 for lesion in lesions):
        return "PD", True
    others = [one for one in lesions if one["identity"] in baseline]
    # Lesions of a family with a target are measured with it.
    others = [one for one in others if not {one["identity"], one["merged_into"]} & set(targets)]
    volume = sum(one["radius_mm"][0] ** 3 for one in others)
    later = sum(one["radius_mm"][1] ** 3 for one in others)
    category, is_clear = true_target_response(before, after)
    # A fifth: the error of the volume of all other lesions together.
    is_clear &= not others or not 1.5 < later / volume < 2.0
    if others and later >= 1.73 * volume:
        return "PD", is_clear
    if not targets:
        return "non-CR/non-PD", False
    if category == "CR" and later > 0:
        return "PR", is_clear
    return category, is_clear


def true_target_response(before: Sequence[float], after: Sequence[float]) -> tuple[str, bool]:
    """The same of the target lesions alone, by their long axes at both dates."""
    start, end = sum(before), sum(after)
    # Of a sum: the errors of its parts are independent. Pixels of 3 mm, slices of up to 5 mm.
    parts = [diameter_sd_mm(mm, 3.0, 5.0) for mm in (*before, *after)]
    error = Z95 * math.sqrt(sum(part**2 for part in parts))
    thresholds = (0.7 * start, max(1.2 * start, start + 5.0))
    is_clear = all(abs(end - value) > error for value in thresholds)
    if end >= thresholds[1]:
        return "PD", is_clear
    if end == 0:
        return "CR", is_clear
    return ("PR" if end <= thresholds[0] else "SD"), is_clear


def print_table(found: Comparison, patients: int) -> None:
    print(f"\n{patients} pairs, {found.right + len(found.wrong)} lesions\n")
    print("| | found | goal |\n|---|--:|--:|")
    print(f"| lesions matched | {100 * found.share:.1f} % | 98 % |")
    for name, errors in (
        ("centroids after registration, mean", found.errors_mm),
        ("centroid to true centre, mean", found.truth_errors_mm),
    ):
        p95 = np.percentile(errors, 95)
        print(f"| {name} (95 %) | {np.mean(errors):.2f} ({p95:.1f}) mm | 2 mm |")
    for name, responses in (("response", found.responses), ("of the targets", found.targets)):
        right = sum(true == category for _, true, category in responses)
        print(f"| {name} right, of {len(responses)} clear | {right} | all |")
    print(f"| response within the measurement error | {len(found.borderline)} | |")
    for line in found.wrong:
        print(f"wrong match: {line}")
    for patient, true, category in found.wrong_responses:
        print(f"wrong response: {patient} is {true}, found {category}")


if __name__ == "__main__":
    main()
