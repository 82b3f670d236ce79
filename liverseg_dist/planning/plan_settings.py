"""Settings of a plan: given ones and decided ones, and the decisions that every plan shares."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.planning.experiment_rules import Decision
from liverseg_dist.planning.fingerprint import DatasetFingerprint

GIVEN = "given by the user"


@dataclass(frozen=True)
class ExperimentPlan:
    """The decisions, in the order of the file, and what they cost."""

    decisions: tuple[Decision, ...]
    settings: Settings
    """With the decisions and the topology filled in."""
    summary: dict[str, Any]
    """Figures for `--json` and the printed text."""

    def value(self, key: str) -> Any:
        """Return the value of a decision; None if the plan leaves the default."""
        return next((d.value for d in self.decisions if d.key == key), None)


def build_settings(values: Mapping[str, Any]) -> Settings:
    """Return settings from values by dotted key. Raises `UserError` where they do not fit."""
    texts = []
    for key, value in values.items():
        # Text is taken as written; JSON is YAML for everything else.
        texts.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    # Through the same parser as the command line, so that a plan obeys the same checks.
    return load_settings([], texts)


def list_given(settings: Settings) -> dict[str, Any]:
    """Return the settings that a user has set, by dotted key."""
    found: dict[str, Any] = {}
    _collect_given(settings, settings.model_dump(mode="json", exclude_unset=True), "", found)
    return found


def _collect_given(
    section: BaseModel, values: Mapping[str, Any], prefix: str, found: dict[str, Any]
) -> None:
    for name, value in values.items():
        inner = getattr(section, name)
        # A mapping such as convert.labels is one value: its keys may be any text.
        if isinstance(inner, BaseModel):
            _collect_given(inner, value, f"{prefix}{name}.", found)
        else:
            found[f"{prefix}{name}"] = value


def replace_given(decisions: Sequence[Decision], given: Mapping[str, Any]) -> tuple[Decision, ...]:
    """Return the decisions with the user's own values, so that the file holds all of them."""
    # Given settings come last in the file, where a reader finds them together.
    kept = [decision for decision in decisions if decision.key not in given]
    return (*kept, *(Decision(key, value, GIVEN) for key, value in given.items()))


def add_network_channels(settings: Settings, fingerprint: DatasetFingerprint) -> Settings:
    """Return the settings with the network's inputs and outputs, which training takes from the
    store: they decide the memory, but are not written into the plan."""
    scheme = fingerprint.scheme
    # The ignore value has no output of its own.
    classes = sum(1 for value, _ in scheme.values if value != scheme.ignore)
    outputs = len(scheme.structures) if settings.model.regions else classes
    update = {"in_channels": len(fingerprint.channels), "out_channels": outputs}
    return settings.model_copy(update={"model": settings.model.model_copy(update=update)})


_INTENSITY_REASONS = {
    "ct": "clip to the foreground's percentiles, one mean and deviation for all scans (HU agree)",
    "zscore": "mean and deviation of each scan, because its unit is arbitrary (nnU-Net)",
    "percentiles": "the range of each scan, because its unit is arbitrary",
    "range": "a fixed range",
}


def normalisation_decisions(fingerprint: DatasetFingerprint) -> list[Decision]:
    """Choose how each channel is normalised."""
    channels = fingerprint.channels
    if len(channels) == 1 and channels[0].intensity == "ct":
        low, middle, high = fingerprint.foreground_percentiles(0, (0.5, 50, 99.5)) or (0, 0, 0)
        reason = (
            "CT as in nnU-Net: clip to the foreground's 0.5 and 99.5 percentiles "
            f"({low:.0f} and {high:.0f} HU, median {middle:.0f}), then its mean and deviation"
        )
        return [Decision("convert.cleaning.outliers", "percentile", reason)]
    value, reasons = [], []
    for channel in channels:
        value.append(
            {"name": channel.name, "modality": channel.modality, "intensity": channel.intensity}
        )
        reasons.append(f"{channel.name}: {_INTENSITY_REASONS[channel.intensity]}")
    return [Decision("convert.channels", value, "; ".join(reasons))]
