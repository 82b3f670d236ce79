"""Load a trained run: its resolved settings and its weights.

Used by every command that applies a run, by the Python interface (`api`), and by conversion where
it labels scans with a run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from liverseg_dist.config import CT_CHANNELS, Settings, load_settings
from liverseg_dist.config.registry import find_registered
from liverseg_dist.data.augment import build_preset
from liverseg_dist.errors import UserError
from liverseg_dist.files import file_sha256
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.inference.structure_settings import dump_inference
from liverseg_dist.inference.structure_values import is_task03
from liverseg_dist.model import build_model
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.texts.paths import quote_path

CONFIG = "config.yaml"
POSTPROCESS = "postprocess.yaml"
"""The choice of `liverseg postprocess`; its settings replace those of training."""
WEIGHTS_COMMENT = "# weights_sha256: "
"""Starts the line of `postprocess.yaml` that names the weights it was chosen for."""
WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
"""Weights at the end of training, and those with the best validation score."""
ALL_AXES = (0, 1, 2)
MAX_REASON_CHARACTERS = 200
CLEANING_KEYS_WITHOUT_EFFECT_ON_MASKS = {"standardise", "min_slices"}
"""Cleaning settings that are applied elsewhere, or that decide only whether a scan is segmented."""
RESOLVED_KEYS = (("data", "spacing_mm"), ("data", "intensity"), ("model", "features"))
"""Settings that training fills in; a run cannot be loaded without them."""
SHARED_KEYS = (
    ("data", "spacing_mm"),
    ("data", "intensity"),
    ("data", "patch_size"),
    ("data", "image_channels"),
    ("data", "label_scheme"),
    ("model", "regions"),
    ("convert", "cleaning"),
)
"""Settings that runs must have in common for their probabilities to be averaged."""


@dataclass(frozen=True)
class LoadedRun:
    """A run that can be applied to scans.

    Attributes:
        path: the run's folder.
        settings: resolved settings, with post-processing and overrides.
        model: the model on the device, in evaluation mode.
        weights_sha256: checksum of the weights' file.
    """

    path: Path
    settings: Settings
    model: nn.Module
    weights_sha256: str


@dataclass(frozen=True)
class CudaArithmetic:
    """Whether matrix products and convolutions of a GPU round their float32 inputs to TF32."""

    matmul_tf32: bool
    convolution_tf32: bool


CUDA_ARITHMETIC = {
    # cuDNN's default is TF32, so fp32 must switch it off.
    "fp32": CudaArithmetic(matmul_tf32=False, convolution_tf32=False),
    "tf32": CudaArithmetic(matmul_tf32=True, convolution_tf32=True),
    "bf16": CudaArithmetic(matmul_tf32=False, convolution_tf32=True),
    "fp16": CudaArithmetic(matmul_tf32=False, convolution_tf32=True),
}
"""By the name of `inference.precision`."""


def load_run(
    run_dir: Path | str,
    device: torch.device,
    overrides: Iterable[str] = (),
    weights: str = "last",
    postprocessed: bool = True,
) -> LoadedRun:
    """Load the model of a run folder and its settings.

    The settings are those of training, then the post-processing that was chosen for the run, then
    the overrides.

    Args:
        run_dir: folder that training wrote.
        device: device for the model.
        overrides: `inference.*` settings, for example `inference.overlap=0.25`.
        weights: a key of `WEIGHTS`.
        postprocessed: whether to apply `postprocess.yaml` of the run.

    Raises:
        UserError: the folder is no run, a file cannot be read, or an override is not allowed.
    """
    path = Path(run_dir)
    file = path / find_registered(WEIGHTS, weights, "weights")
    # Whether the folder is a run at all is checked first, for an error that names what is missing.
    _check_run_folder(path, file, weights)
    config_files = [path / CONFIG]
    if postprocessed and (path / POSTPROCESS).is_file():
        config_files.append(path / POSTPROCESS)
    settings = load_settings(
        # Old keys of a finished run are no mistake of the user, who did not write the file.
        config_files,
        check_inference_overrides(overrides),
        warn_of_old_keys=False,
    )
    for section, key in RESOLVED_KEYS:
        if getattr(getattr(settings, section), key) is None:
            raise UserError(
                f"{path / CONFIG}: {section}.{key} has no value; "
                "give a folder that `liverseg train` wrote"
            )
    model = _load_model(settings, file)
    if device.type == "cuda":
        _configure_cuda_precision(settings.inference.precision)
    return LoadedRun(path, settings, model.to(device).eval(), file_sha256(file))


def _load_model(settings: Settings, file: Path) -> nn.Module:
    spacing_mm = settings.data.spacing_mm
    assert spacing_mm is not None
    topology = resolve_topology(settings.model, settings.data.patch_size, spacing_mm)
    try:
        # The meta device allocates nothing: wrong settings cannot exhaust the memory before the
        # weights are compared with them.
        with torch.device("meta"):
            model = build_model(topology)
        # Weights may be stored in half precision; the model computes in float32 unless autocast is
        # on.
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        # `assign` takes the tensors as parameters: no second copy of the weights.
        model.load_state_dict(tensors, assign=True)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); copy it again, or continue the training, "
            "which writes it again"
        ) from None
    except RuntimeError as error:
        # torch lists every tensor that does not fit; the first ones are enough for a message.
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        raise UserError(
            f"{file}: the weights do not fit the model in {CONFIG} ({reason})"
        ) from None
    return model


def _configure_cuda_precision(precision: str) -> None:
    """Set the arithmetic of the GPU; deterministic, so a scan gives the same mask each time."""
    arithmetic = find_registered(CUDA_ARITHMETIC, precision, "inference.precision")
    torch.backends.cuda.matmul.allow_tf32 = arithmetic.matmul_tf32
    torch.backends.cudnn.allow_tf32 = arithmetic.convolution_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def build_predictor(
    runs: Sequence[LoadedRun], device: torch.device, threads: int = 1
) -> SlidingWindowPredictor:
    """The predictor of one run, or of several runs whose probabilities are averaged.

    Args:
        runs: runs with equal input; the inference settings of the first one are used.
        device: device of the models.
        threads: batches computed in parallel on a CPU.

    Raises:
        UserError: the runs differ in a setting of `SHARED_KEYS`.
    """
    # Runs of other voxel sizes or labels have probabilities with another meaning.
    first = runs[0]
    for other in runs[1:]:
        for section, key in SHARED_KEYS:
            expected = getattr(getattr(first.settings, section), key)
            if getattr(getattr(other.settings, section), key) != expected:
                raise UserError(
                    f"{other.path}: {section}.{key} is not that of {first.path}; "
                    "only runs with the same store and patch size can be averaged"
                )
    settings = first.settings
    return SlidingWindowPredictor(
        [run.model for run in runs],
        settings.data.patch_size,
        OutputChannels(settings.data.label_scheme, settings.model.regions),
        settings.inference,
        device,
        threads,
        find_common_mirror_axes(runs),
    )


def find_common_mirror_axes(runs: Sequence[LoadedRun]) -> tuple[int, ...]:
    """The axes of z, y, x along which all runs were mirrored in training.

    A network gives wrong results for scans mirrored along another axis. nnU-Net's
    `inference_allowed_mirroring_axes` is the same rule.
    """
    common = set(ALL_AXES)
    for run in runs:
        common &= set(build_preset(run.settings.data).mirror.axes)
    return tuple(sorted(common))


def fingerprint_runs(runs: Sequence[LoadedRun]) -> dict[str, object]:
    """All settings and weights that a mask depends on; the batch size changes the speed only."""
    settings = runs[0].settings
    # Keys are added only where they change something, because a new key would make all earlier
    # results invalid.
    content: dict[str, Any] = {}
    axes = find_common_mirror_axes(runs)
    # Absent for all axes: fingerprints of earlier versions, which had no such key, stay valid.
    if settings.inference.mirror and axes != ALL_AXES:
        content["mirrored_axes"] = axes
    content["weights_sha256"] = [run.weights_sha256 for run in runs]
    labels = settings.data.label_scheme
    content["inference"] = dump_inference(settings.inference, labels)
    # The batch size is a question of memory; a user who changes it must not lose finished masks.
    del content["inference"]["batch_size"]
    content["data"] = settings.data.model_dump(
        mode="json", include={"spacing_mm", "intensity", "patch_size"}
    )
    # Absent for the labels of Task03 and one channel of CT, as in earlier versions.
    if not is_task03(labels):
        content["labels"] = labels.to_json()
    if settings.data.image_channels != CT_CHANNELS:
        content["channels"] = [
            channel.model_dump(mode="json") for channel in settings.data.image_channels
        ]
    cleaning = settings.convert.cleaning.model_dump(
        mode="json", by_alias=True, exclude=CLEANING_KEYS_WITHOUT_EFFECT_ON_MASKS
    )
    content["convert"] = {"cleaning": cleaning}
    return content


def check_inference_overrides(overrides: Iterable[str]) -> list[str]:
    """The overrides, if all of them are `inference.*`.

    The other settings of a finished run describe how its weights were made.

    Raises:
        UserError: another setting is overridden.
    """
    # A list: the iterable may be a generator, and it is used again after the check.
    checked = list(overrides)
    for override in checked:
        if not override.startswith("inference."):
            raise UserError(
                f"'{override}': a finished run takes inference.* only, e.g. inference.overlap=0.25"
            )
    return checked


def _check_run_folder(path: Path, file: Path, weights: str) -> None:
    if not path.is_dir():
        command = f"liverseg train ... {quote_path(f'run.dir={path}')}"
        raise UserError(f"{path}: no such run folder; `{command}` makes one")
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
