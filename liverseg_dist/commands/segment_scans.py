"""Segment scans on all ranks, for `predict` and for the commands that segment before they measure."""

import contextlib
import logging
from dataclasses import replace

from liverseg_dist.commands.case_progress import case_progress
from liverseg_dist.commands.run_distributed import report_case_failure
from liverseg_dist.console import write_lines, write_notes
from liverseg_dist.distributed.collectives import broadcast_from_rank0, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.window_parallel import PeerFailed, WindowParallel
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.inference.mask_table import format_result_line, write_dataset_file
from liverseg_dist.inference.predict_scans import ScanPredictor
from liverseg_dist.inference.scan_checks import ScanRefused, format_warnings
from liverseg_dist.inference.scan_files import ScanFiles
from liverseg_dist.inference.scan_stages import Outcome, segment_in_stages
from liverseg_dist.inference.work_division import divide_work

_logger = logging.getLogger(__name__)


def segment_scans(
    prediction: ScanPredictor,
    scans: list[ScanFiles],
    world: World,
    monitor: HeartbeatMonitor,
    in_stages: bool = False,
) -> dict[str, bool]:
    """Segment the share of this rank. All ranks return at the same time.

    Args:
        prediction: what segments a scan.
        scans: all scans.
        world: this rank.
        monitor: reports the progress to the other ranks.
        in_stages: read, compute and write different scans at the same time (`scan_stages`).

    Returns:
        The scans that failed on any rank -> whether it was a mistake of the user.
    """
    # All ranks must divide the same list, so they use what rank 0 has read.
    done = set() if prediction.recompute else broadcast_from_rank0(prediction.ledger.done())
    by_id = {scan.scan_id: scan for scan in scans}
    known = [scan for scan in scans if scan.scan_id in done]
    # The size of the file stands for the time; the header is not read before it is this scan's
    # turn.
    sizes = {scan.scan_id: scan.size_bytes for scan in scans if scan.scan_id not in done}
    division = divide_work(sizes, world.global_rank, world.world_size)
    _logger.debug(
        "%d cases of an earlier call, %d new ones: %d of them alone, %d with the other ranks",
        len(known),
        len(sizes),
        len(division.whole),
        len(division.shared),
    )
    parallel = WindowParallel(world.device)
    shared = replace(
        prediction,
        predictor=prediction.predictor.with_window_mapper(parallel.map_windows),
        window_scope=parallel.case_scope,
    )
    # Finished scans are divided too: each prints a line, and its checksum is compared.
    own = [*known[world.global_rank :: world.world_size], *(by_id[one] for one in division.whole)]
    failed: dict[str, bool] = {}
    with case_progress("predict", len(scans), monitor) as progress:
        for scan in (by_id[one] for one in division.shared):
            progress.report_activity(f"segmenting {scan.name}")
            failed |= _segment_shared_scan(shared, scan, world)
            progress.advance(note=scan.name, shared=True)
        if in_stages:
            progress.report_activity(f"segmenting {len(own)} scans")
            with contextlib.closing(segment_in_stages(prediction, own)) as outcomes:
                for scan, outcome in outcomes:
                    failed |= _report_outcome(prediction, scan, outcome, world)
                    progress.advance(note=scan.name)
                    progress.report_activity(f"segmenting the scans after {scan.name}")
        else:
            for scan in own:
                progress.report_activity(f"segmenting {scan.name}")
                failed |= _segment_own_scan(prediction, scan, world)
                progress.advance(note=scan.name)
        progress.report_activity("waiting for the scans of other ranks")
        all_failed: dict[str, bool] = {}
        for part in gather_from_ranks(failed):
            all_failed |= part
        progress.complete(len(scans))
        progress.report_activity("writing the table")
    share_from_rank0(lambda: write_dataset_file(prediction.out, prediction.labels))
    return all_failed


def _segment_own_scan(prediction: ScanPredictor, scan: ScanFiles, world: World) -> dict[str, bool]:
    """Segment a scan on this rank; returns its name and whether it was a user's mistake if it failed."""
    try:
        outcome: Outcome = prediction.segment_scan(scan)
    except (UserError, RunFailed) as error:
        outcome = error
    return _report_outcome(prediction, scan, outcome, world)


def _report_outcome(
    prediction: ScanPredictor, scan: ScanFiles, outcome: Outcome, world: World
) -> dict[str, bool]:
    """Print the result or the failure of a scan; returns as `_segment_own_scan`."""
    if isinstance(outcome, Exception):
        # The rank that failed has printed the reason.
        if not isinstance(outcome, PeerFailed):
            report_case_failure(outcome, world, prediction.out, scan.name)
        return {scan.scan_id: isinstance(outcome, UserError)}
    record, was_done = outcome
    channels = [channel.name for channel in prediction.settings.data.image_channels]
    write_lines(format_result_line(record, was_done, prediction.labels, channels))
    write_notes(*format_warnings(record["case_id"], record["findings"]))
    return {}


def _segment_shared_scan(
    prediction: ScanPredictor, scan: ScanFiles, world: World
) -> dict[str, bool]:
    """Segment a scan together with all other ranks; rank 0 writes the mask and records a failure."""

    def segment() -> dict[str, bool]:
        return _segment_own_scan(prediction, scan, world)

    def compute_windows() -> dict[str, bool]:
        try:
            prediction.compute_shared_windows(scan)
        except (UserError, RunFailed) as error:
            # The rank that segments the scan has the same reason for a refused one, and a rank that
            # failed prints its own reason.
            if not isinstance(error, (PeerFailed, ScanRefused)):
                report_case_failure(error, world, prediction.out, scan.name)
        return {}

    return world.select_for_rank(segment, compute_windows)
