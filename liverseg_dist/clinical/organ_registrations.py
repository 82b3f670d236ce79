"""Registrations of a follow-up: each organ that holds lesions is registered by itself.

Kidney and liver slide along each other while the patient breathes, so a lesion is brought to the
baseline by the registration of the organ it lies in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from liverseg_dist.clinical.registration import (
    OrganScan,
    Registration,
    identity_registration,
    register_organs,
)
from liverseg_dist.clinical.registration_backends import BackendName, choose_backend
from liverseg_dist.clinical.scan_checks import LEAST_SIMILARITY, describe_poor_fit, find_mismatch
from liverseg_dist.errors import UserError
from liverseg_dist.labels import LabelScheme
from liverseg_dist.volume import Volume


class MaskedScan(Protocol):
    """What a registration asks of a time point."""

    @property
    def name(self) -> str: ...

    @property
    def mask(self) -> Volume: ...

    @property
    def image(self) -> Volume | None: ...


@dataclass(frozen=True)
class DateRegistrations:
    """The registrations of one date to the baseline.

    Attributes:
        main: Of the organ the patient is registered by.
        others: By the name of a further organ.
        organ_of: The organ that each lesion structure lies in.
    """

    main: Registration
    others: Mapping[str, Registration]
    organ_of: Mapping[str, str]

    def of_structure(self, structure: str) -> Registration:
        """The registration that moves lesions of a structure."""
        return self.others.get(self.organ_of.get(structure, ""), self.main)


def register_dates(
    points: Sequence[MaskedScan],
    scheme: LabelScheme,
    organ: str,
    backend: BackendName,
    allow_mismatch: bool,
    note: Callable[[str], None],
) -> tuple[list[DateRegistrations], list[str]]:
    """Register every scan to the first one.

    Args:
        points: The scans, baseline first.
        scheme: What their labels mean.
        organ: The organ that must be in all scans, and that shows whether they are of one patient.
        backend: The deformable step.
        allow_mismatch: Go on although the scans look like two patients'.
        note: Called with what is being done.

    Returns:
        The registrations of each date, and warnings.

    Raises:
        UserError: A mask has no organ, or the scans are not of one patient.
    """
    name, deform = choose_backend(backend)
    organ_of = {lesion.name: lesion.inside or organ for lesion in scheme.lesions}
    further = [other for other in dict.fromkeys(organ_of.values()) if other != organ]
    baseline = _organ_scan(points[0], scheme, organ)
    of_baseline = {other: _find_organ_scan(points[0], scheme, other) for other in further}
    found = [DateRegistrations(identity_registration(points[0].mask.grid), {}, organ_of)]
    warnings: list[str] = []
    for point in points[1:]:
        note(f"registering {point.name}")
        main = register_organs(baseline, _organ_scan(point, scheme, organ), deform, name)
        warnings += _check_main(main, points[0].name, point.name, organ, allow_mismatch)
        others = {}
        for other, first in of_baseline.items():
            second = _find_organ_scan(point, scheme, other)
            # Without the organ in both scans the main organ is the best guess.
            if first is not None and second is not None:
                note(f"registering {point.name}: {other}")
                others[other] = register_organs(first, second, deform, name)
                warnings += describe_poor_fit(others[other], point.name, other)
        found.append(DateRegistrations(main, others, organ_of))
    return found, warnings


def _check_main(
    registration: Registration, baseline: str, name: str, organ: str, allow_mismatch: bool
) -> list[str]:
    """Warnings about a registration. Raises `UserError` where the scans are of two patients."""
    problem = find_mismatch(registration, baseline, name, organ)
    if problem is not None and not allow_mismatch:
        raise UserError(problem)
    warnings = [problem] if problem is not None else []
    # The rigid step only: a deformation can also make the textures of two patients alike.
    similarity = registration.quality.rigid_similarity
    if problem is None and similarity is not None and similarity < LEAST_SIMILARITY:
        warnings.append(
            f"{name}: the texture of the {organ} correlates by {similarity:.2f} only with the "
            "baseline's; another contrast phase, or another patient"
        )
    return warnings + describe_poor_fit(registration, name, organ)


def _organ_scan(point: MaskedScan, scheme: LabelScheme, organ: str) -> OrganScan:
    scan = _find_organ_scan(point, scheme, organ)
    # Masks of a failed segmentation may be empty; registration would fail later without a name.
    if scan is None:
        raise UserError(f"{point.name}: the mask holds no {organ}, so it cannot be registered")
    return scan


def _find_organ_scan(point: MaskedScan, scheme: LabelScheme, organ: str) -> OrganScan | None:
    mask = scheme.mask_of(point.mask.voxels, organ)
    if not mask.any():
        return None
    lesions = np.zeros(mask.shape, dtype=bool)
    for structure in scheme.lesions:
        lesions |= scheme.mask_of(point.mask.voxels, structure)
    return OrganScan(Volume(mask, point.mask.grid), lesions, point.image)
