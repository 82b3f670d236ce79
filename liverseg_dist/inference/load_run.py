"""Load what a training run left: its resolved settings and its weights."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.augment import augmentation_preset
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.results import EVALUATION, SUMMARY
from liverseg_dist.files import file_sha256
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.model import build_model
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.texts.paths import quoted

CONFIG = "config.yaml"
POSTPROCESS = "postprocess.yaml"
"""What `liverseg postprocess` chose, laid over the settings of training."""
WEIGHTS_COMMENT = "# weights_sha256: "
"""Starts the line of `postprocess.yaml` that names the weights it was chosen for."""
CHOSEN_FOR_OTHERS = "was chosen for earlier weights; run `liverseg postprocess` again or delete it"
WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
"""Weights at the end of training, and those that were best on validation."""


@dataclass(frozen=True)
class LoadedRun:
    path: Path
    settings: Settings
    model: nn.Module
    """On the device, in evaluation mode."""
    weights_sha256: str


def load_run(
    run_dir: Path | str,
    device: torch.device,
    overrides: Iterable[str] = (),
    weights: str = "last",
    postprocessed: bool = True,
) -> LoadedRun:
    """The model of a run folder and its settings: those of training, the post-processing that was chosen for the run
    (unless it is not wanted), then `inference.*` overrides. Raises `UserError`."""
    path = Path(run_dir)
    file = path / WEIGHTS[weights]
    _expect_run(path, file, weights)
    files = [path / CONFIG]
    if postprocessed and (path / POSTPROCESS).is_file():
        files.append(path / POSTPROCESS)
    settings = load_settings(files, inference_only(overrides))
    for section, key in (("data", "spacing_mm"), ("data", "intensity"), ("model", "features")):
        if getattr(getattr(settings, section), key) is None:
            raise UserError(
                f"{path / CONFIG}: {section}.{key} is not filled in; give a folder that training wrote"
            )
    spacing_mm = settings.data.spacing_mm
    assert spacing_mm is not None
    try:
        with torch.device(
            "meta"
        ):  # no memory for what the settings claim; the weights are those of the file
            model = build_model(
                resolve_topology(settings.model, settings.data.patch_size, spacing_mm)
            )
        model.load_state_dict(
            {name: tensor.float() for name, tensor in load_file(file).items()}, assign=True
        )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); copy it again, or train on to write it anew"
        ) from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: the weights do not fit the model in {CONFIG} ({reason})"
        ) from None
    if device.type == "cuda":
        _set_arithmetic(settings.inference.precision)
    return LoadedRun(path, settings, model.to(device).eval(), file_sha256(file))


def _set_arithmetic(precision: str) -> None:
    """fp32 is that (cuDNN's default is TF32), and a scan gives the same mask each time."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def predictor_for(
    runs: Sequence[LoadedRun], device: torch.device, threads: int = 1
) -> SlidingWindowPredictor:
    """The predictor of one run, or of several whose probabilities are averaged: all must see scans alike.

    The first run's inference settings count. Raises `UserError` where runs differ in what the network gets.
    """
    first = runs[0]
    for other in runs[1:]:
        for key, ours, theirs in (
            ("data.spacing_mm", first.settings.data.spacing_mm, other.settings.data.spacing_mm),
            ("data.intensity", first.settings.data.intensity, other.settings.data.intensity),
            ("data.patch_size", first.settings.data.patch_size, other.settings.data.patch_size),
            ("model.regions", first.settings.model.regions, other.settings.model.regions),
            ("convert.cleaning", first.settings.convert.cleaning, other.settings.convert.cleaning),
        ):
            if ours != theirs:
                raise UserError(
                    f"{other.path}: {key} is not that of {first.path}; only runs on one store with one patch size can "
                    "be averaged"
                )
    settings = first.settings
    models = [run.model for run in runs]
    data = settings.data
    axes = mirrored_axes(runs)
    return SlidingWindowPredictor(
        models, data.patch_size, settings.model.regions, settings.inference, device, threads, axes
    )


ALL_AXES = (0, 1, 2)


def mirrored_axes(runs: Sequence[LoadedRun]) -> tuple[int, ...]:
    """The axes of z, y, x along which all these runs were mirrored in training: others they would not recognise.

    As nnU-Net's `inference_allowed_mirroring_axes`.
    """
    trained = [set(augmentation_preset(run.settings.data).mirror_axes) for run in runs]
    return tuple(sorted(set.intersection(*trained)))


def runs_fingerprint(runs: Sequence[LoadedRun]) -> dict[str, object]:
    """Everything about the runs that a mask depends on; the batch size changes speed only."""
    settings = runs[0].settings
    axes = mirrored_axes(runs)
    mirrored = (
        {"mirrored_axes": axes} if settings.inference.mirror and axes != ALL_AXES else {}
    )  # once, all was meant
    return {
        **mirrored,
        "weights_sha256": [run.weights_sha256 for run in runs],
        "inference": settings.inference.model_dump(mode="json", exclude={"batch_size"}),
        "data": settings.data.model_dump(
            mode="json", include={"spacing_mm", "intensity", "patch_size"}
        ),
        "convert": {
            "cleaning": settings.convert.cleaning.model_dump(
                mode="json", exclude=NO_CONCERN_OF_A_MASK
            )
        },
    }


NO_CONCERN_OF_A_MASK = {"standardise", "min_slices"}
"""Cleaning settings that are applied elsewhere, or that decide only whether a scan is segmented."""


def results_of_other_weights(run_dir: Path) -> list[str]:
    """What lies in a run's folder and was made with weights that the run no longer has: a sentence for each.

    Evaluations and the choice of `liverseg postprocess` name the weights they belong to; both stay in the folder when
    a run is extended or trained again.
    """
    present = {
        file_sha256(run_dir / name) for name in WEIGHTS.values() if (run_dir / name).is_file()
    }
    if not present:
        return []
    found: list[str] = []
    folder = run_dir / EVALUATION
    for summary in (folder / SUMMARY, *sorted(folder.glob(f"*/{SUMMARY}"))):
        used = _weights_of_summary(summary)
        if used and not present.intersection(used):
            found.append(
                f"{summary.parent} holds scores of earlier weights; run `liverseg evaluate` again"
            )
    used = _weights_of_choice(run_dir / POSTPROCESS)
    if used and not present.intersection(used):
        found.append(f"{run_dir / POSTPROCESS} {CHOSEN_FOR_OTHERS}")
    return found


def uses_choice_of_other_weights(loaded: LoadedRun) -> bool:
    """Whether the run's `postprocess.yaml` was chosen for weights that neither it nor this model has."""
    used = _weights_of_choice(loaded.path / POSTPROCESS)
    files = [loaded.path / name for name in WEIGHTS.values() if (loaded.path / name).is_file()]
    return (
        bool(used)
        and loaded.weights_sha256 not in used
        and not used.intersection(map(file_sha256, files))
    )


def _weights_of_summary(file: Path) -> set[str]:
    """Checksums of the weights that an evaluation used; empty where it does not say."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return set(map(str, content["details"]["weights_sha256"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _weights_of_choice(file: Path) -> set[str]:
    """Checksums in the comment that `liverseg postprocess` writes; empty where there is none."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    marked = [
        line.removeprefix(WEIGHTS_COMMENT) for line in lines if line.startswith(WEIGHTS_COMMENT)
    ]
    return {checksum for line in marked for checksum in line.split()}


def inference_only(overrides: Iterable[str]) -> list[str]:
    """The overrides, if all are `inference.*`: the rest of a finished run is what its weights were made with."""
    kept = list(overrides)
    for override in kept:
        if not override.startswith("inference."):
            raise UserError(
                f"'{override}': a finished run takes inference.* only, e.g. inference.overlap=0.25"
            )
    return kept


def _expect_run(path: Path, file: Path, weights: str) -> None:
    if not path.is_dir():
        raise UserError(
            f"{path}: no such run folder; `liverseg train ... {quoted(f'run.dir={path}')}` makes one"
        )
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path}: holds no {CONFIG}, so it is no run folder; give the run.dir of a training run"
        )
    if not file.is_file():
        remedy = "train to the end (the same `liverseg train` line continues)"
        if weights == "best":
            remedy = (
                "training writes it after the first validation; --weights last takes the last ones"
            )
        raise UserError(f"{path}: has no {file.name} yet; {remedy}")
