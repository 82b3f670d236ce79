"""Score pairs of masks in parallel, each case once: resumable by the ledger; a bad case does not stop the rest."""

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.errors import RunFailed, UserError, printable
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name, fingerprint_of
from liverseg_dist.evaluation.metrics.case import score_case
from liverseg_dist.evaluation.metrics.lesions import LITS_CONNECTIVITY
from liverseg_dist.evaluation.pairing import SAME_PLACE_MM, MaskPair, align_prediction
from liverseg_dist.evaluation.report.overlays import save_pictures
from liverseg_dist.files import file_sha256
from liverseg_dist.volume import Volume
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

ReadMask = Callable[[Path], Volume]
"""Reads a label file; importable by name, because it is sent to worker processes."""


@dataclass(frozen=True)
class ScoreJob:
    """What a worker needs beside the pair."""

    ledger: Ledger
    read_mask: ReadMask
    connectivity: int = LITS_CONNECTIVITY
    ignore_affine: bool = False


@dataclass(frozen=True)
class PictureJob:
    """Where pictures go, and the CT of each case that has one (read with `read_image`, HU)."""

    folder: Path
    images: Mapping[str, Path]
    read_image: ReadMask


@dataclass(frozen=True)
class ScoreOutcome:
    case_id: str
    error: str | None = None
    users_mistake: bool = False
    reused: bool = False


def open_ledger(folder: Path, connectivity: int, ignore_affine: bool) -> Ledger:
    """The ledger of a comparison of folders; another setting makes other entries."""
    return Ledger(
        folder, {"score": "folders", "connectivity": connectivity, "ignore_affine": ignore_affine}
    )


def score_pairs(pairs: Sequence[MaskPair], job: ScoreJob, workers: int) -> Iterator[ScoreOutcome]:
    """Score all pairs with `workers` processes and yield what became of each as it ends; scores go to the ledger.

    Raises `RunFailed` when a worker dies; what was scored until then stays in the ledger.
    """
    yield from _in_parallel(functools.partial(score_pair, job=job), pairs, workers)


def draw_pairs(
    pairs: Sequence[MaskPair], job: ScoreJob, drawing: PictureJob, workers: int
) -> Iterator[ScoreOutcome]:
    """Save the pictures of these pairs (`pictures.save_pictures`) and remove those of all others."""
    kept = {encode_file_name(pair.case_id) for pair in pairs}
    for file in drawing.folder.glob("*"):
        if file.suffix in (".json", ".png") and file.name.removesuffix(file.suffix) not in kept:
            file.unlink(missing_ok=True)
    yield from _in_parallel(functools.partial(draw_pair, job=job, drawing=drawing), pairs, workers)


def _in_parallel(
    work: Callable[[MaskPair], ScoreOutcome], pairs: Sequence[MaskPair], workers: int
) -> Iterator[ScoreOutcome]:
    if workers <= 1 or len(pairs) <= 1:
        yield from map(work, pairs)
        return
    context = multiprocessing.get_context("spawn")
    with worker_pool(min(workers, len(pairs)), context) as pool:
        with terminal_signals_blocked():
            futures = [pool.submit(work, pair) for pair in pairs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise RunFailed(
                "a worker died, perhaps for want of memory; run the same line again with fewer --workers to continue"
            ) from None


def score_pair(pair: MaskPair, job: ScoreJob) -> ScoreOutcome:
    """Score one pair unless the ledger has it for these very files; errors are recorded, not raised."""
    try:
        inputs = fingerprint_of(
            {"prediction": _hash_mask_file(pair.prediction), "truth": _hash_mask_file(pair.truth)}
        )
        if job.ledger.read(pair.case_id, inputs) is not None:
            return ScoreOutcome(pair.case_id, reused=True)
        prediction, truth = read_pair(pair, job)
        scores = score_case(
            pair.case_id, prediction.voxels, truth.voxels, truth.spacing_mm, job.connectivity
        )
    except Exception as error:  # whatever a file does to us, the other cases go on
        message = (
            str(error)
            if isinstance(error, (UserError, RunFailed))
            else f"{type(error).__name__}: {error}"
        )
        job.ledger.write_failure(pair.case_id, shorten_paths(message, pair))
        return ScoreOutcome(pair.case_id, error=message, users_mistake=isinstance(error, UserError))
    job.ledger.write(pair.case_id, scores, inputs)
    return ScoreOutcome(pair.case_id)


def shorten_paths(message: str, pair: MaskPair) -> str:
    """As results tell it: of the files' paths the last two parts, which say whose mask is meant."""
    for file in (pair.prediction, pair.truth):
        for path in (str(file), printable(file)):
            message = message.replace(path, printable(f"{file.parent.name}/{file.name}"))
    return printable(message)


def draw_pair(pair: MaskPair, job: ScoreJob, drawing: PictureJob) -> ScoreOutcome:
    """Save the pictures of one pair. A CT that cannot be read, or lies on another grid, is left out and said."""
    try:
        prediction, truth = read_pair(pair, job)
        image, error = None, None
        if pair.case_id in drawing.images:
            image, error = _matching_image(drawing.images[pair.case_id], truth, drawing.read_image)
        save_pictures(drawing.folder, pair.case_id, prediction, truth, image)
    except Exception as error_:  # a picture is no reason to fail
        return ScoreOutcome(pair.case_id, error=f"{pair.case_id}: no pictures: {error_}")
    return ScoreOutcome(pair.case_id, error=error)


def _matching_image(
    file: Path, truth: Volume, read_image: ReadMask
) -> tuple[Volume | None, str | None]:
    try:
        image = read_image(file).reoriented(truth.grid.orientation)
    except UserError as error:
        return None, str(error)
    if not image.grid.matches(truth.grid, SAME_PLACE_MM):
        return None, f"{file}: not on the grid of its mask; pictures are drawn without it"
    return image, None


def read_pair(pair: MaskPair, job: ScoreJob) -> tuple[Volume, Volume]:
    """Prediction and truth on the truth's grid."""
    truth = job.read_mask(pair.truth)
    prediction = job.read_mask(pair.prediction)
    return align_prediction(prediction, truth, pair, job.ignore_affine), truth


def _hash_mask_file(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:  # for example a link without a target, or a folder with a mask's name
        raise UserError(f"{file}: {error.strerror}") from None
