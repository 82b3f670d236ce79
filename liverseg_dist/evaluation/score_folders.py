"""Score pairs of mask files in parallel.

Each case is scored once: the ledger makes the work resumable. A case that cannot be scored is
recorded with its error and does not stop the others.
"""

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.errors import RunFailed, UserError, printable
from liverseg_dist.evaluation.label_translation import LabelTranslation
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name, fingerprint_of
from liverseg_dist.evaluation.metrics.case import score_case
from liverseg_dist.evaluation.metrics.lesions import LITS_CONNECTIVITY
from liverseg_dist.evaluation.pairing import SAME_PLACE_MM, MaskPair, align_prediction
from liverseg_dist.evaluation.report.picture_files import save_pictures
from liverseg_dist.files import file_sha256
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.volume import Volume
from liverseg_dist.workers import terminal_signals_blocked, worker_pool

ReadMask = Callable[[Path], Volume]
"""Reads a file. Importable by name: it is sent to worker processes."""


@dataclass(frozen=True)
class ScoreJob:
    """What a worker needs in addition to the pair."""

    ledger: Ledger
    read_mask: ReadMask
    connectivity: int = LITS_CONNECTIVITY
    ignore_affine: bool = False
    labels: LabelScheme = LITS_SCHEME
    translation: LabelTranslation | None = None
    """Of predicted values into those of `labels`; None: they are the same."""


@dataclass(frozen=True)
class PictureJob:
    """Folder of the pictures, and the CT (HU, read with `read_image`) of each case that has one."""

    folder: Path
    images: Mapping[str, Path]
    read_image: ReadMask


@dataclass(frozen=True)
class ScoreOutcome:
    """Result of the work on one pair; the scores themselves are in the ledger."""

    case_id: str
    error: str | None = None
    is_user_error: bool = False
    is_reused: bool = False


def open_ledger(
    folder: Path,
    connectivity: int,
    ignore_affine: bool,
    labels: LabelScheme = LITS_SCHEME,
    translation: LabelTranslation | None = None,
) -> Ledger:
    """Open the ledger of a comparison of folders; other settings need other entries."""
    settings: dict[str, object] = {
        "score": "folders",
        "connectivity": connectivity,
        "ignore_affine": ignore_affine,
    }
    # Absent for LiTS: ledgers of earlier versions, which had no choice, stay valid.
    if labels != LITS_SCHEME:
        settings["labels"] = labels.to_json()
    if translation is not None:
        settings["translation"] = [list(translation.table), list(translation.scored)]
    return Ledger(folder, settings)


def score_pairs(pairs: Sequence[MaskPair], job: ScoreJob, workers: int) -> Iterator[ScoreOutcome]:
    """Score all pairs with `workers` processes; scores go to the ledger.

    Yields:
        The outcome of each pair, in the order in which they end.

    Raises:
        RunFailed: A worker died; pairs that were scored before stay in the ledger.
    """
    yield from _map_pairs(functools.partial(score_pair, job=job), pairs, workers)


def draw_pairs(
    pairs: Sequence[MaskPair], job: ScoreJob, drawing: PictureJob, workers: int
) -> Iterator[ScoreOutcome]:
    """Save the pictures of these pairs (`overlays.save_pictures`), remove those of all others."""
    # A second run may show other cases than the first.
    kept = {encode_file_name(pair.case_id) for pair in pairs}
    for file in drawing.folder.glob("*"):
        if file.suffix in (".json", ".png") and file.name.removesuffix(file.suffix) not in kept:
            file.unlink(missing_ok=True)
    yield from _map_pairs(functools.partial(draw_pair, job=job, drawing=drawing), pairs, workers)


def _map_pairs(
    work: Callable[[MaskPair], ScoreOutcome], pairs: Sequence[MaskPair], workers: int
) -> Iterator[ScoreOutcome]:
    if workers <= 1 or len(pairs) <= 1:
        yield from map(work, pairs)
        return
    # spawn: a forked child inherits locks of threads, such as those of BLAS, and may hang.
    context = multiprocessing.get_context("spawn")
    with worker_pool(min(workers, len(pairs)), context) as pool:
        with terminal_signals_blocked():
            futures = [pool.submit(work, pair) for pair in pairs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise RunFailed(
                "a worker died, possibly because memory ran out; "
                "run the same command again with fewer --workers to continue"
            ) from None


def score_pair(pair: MaskPair, job: ScoreJob) -> ScoreOutcome:
    """Score one pair, unless the ledger has scores of the same files. Errors go to the ledger."""
    try:
        inputs = fingerprint_of(
            {"prediction": _hash_mask_file(pair.prediction), "truth": _hash_mask_file(pair.truth)}
        )
        if job.ledger.read(pair.case_id, inputs) is not None:
            return ScoreOutcome(pair.case_id, is_reused=True)
        prediction, truth = read_pair(pair, job)
        scores = score_case(
            pair.case_id,
            prediction.voxels,
            truth.voxels,
            truth.spacing_mm,
            job.connectivity,
            labels=job.labels,
            annotated=None if job.translation is None else job.translation.scored,
        )
    # One bad file must not stop the other cases, so every error is recorded.
    except Exception as error:
        message = str(error)
        if not isinstance(error, (UserError, RunFailed)):
            message = f"{type(error).__name__}: {error}"
        job.ledger.write_failure(pair.case_id, shorten_paths(message, pair))
        return ScoreOutcome(pair.case_id, error=message, is_user_error=isinstance(error, UserError))
    job.ledger.write(pair.case_id, scores, inputs)
    return ScoreOutcome(pair.case_id)


def shorten_paths(message: str, pair: MaskPair) -> str:
    """Shorten the paths of both files in a message to folder and file name.

    Results are passed on to other people: they must not contain paths of this machine. The folder's
    name stays, because prediction and truth often have the same file name.
    """
    for file in (pair.prediction, pair.truth):
        for path in (str(file), printable(file)):
            message = message.replace(path, printable(f"{file.parent.name}/{file.name}"))
    return printable(message)


def draw_pair(pair: MaskPair, job: ScoreJob, drawing: PictureJob) -> ScoreOutcome:
    """Save the pictures of one pair.

    Without a CT that can be read and has the grid of the masks, only masks are drawn; the outcome
    then has the reason.
    """
    try:
        prediction, truth = read_pair(pair, job)
        image, error = None, None
        if pair.case_id in drawing.images:
            image, error = _read_matching_image(
                drawing.images[pair.case_id], truth, drawing.read_image
            )
        save_pictures(drawing.folder, pair.case_id, prediction, truth, image, job.labels)
    # The scores are complete without pictures, so no error here fails the command.
    except Exception as failure:
        return ScoreOutcome(pair.case_id, error=f"{pair.case_id}: no pictures: {failure}")
    return ScoreOutcome(pair.case_id, error=error)


def _read_matching_image(
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
    """Read prediction and truth, the prediction on the grid of the truth."""
    truth = job.read_mask(pair.truth)
    prediction = job.read_mask(pair.prediction)
    if job.translation is not None:
        voxels = job.translation.apply(prediction.voxels, pair.case_id)
        prediction = Volume(voxels, prediction.grid)
    return align_prediction(prediction, truth, pair, job.ignore_affine), truth


def _hash_mask_file(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:  # for example a link without a target, or a folder with a mask's name
        raise UserError(f"{file}: {error.strerror}") from None
